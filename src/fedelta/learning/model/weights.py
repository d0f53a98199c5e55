"""Weights of a model folder or hub, from safetensors alone, checked against what the model needs.

transformers initializes what a file lacks and drops what a model does not use, and says so in a log. Here, every weight
of the backbone must come from the files, and the head may be new.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.device import is_out_of_memory
from fedelta.learning.model.model_folder import check_folder
from fedelta.learning.model.model_warning import ModelWarning

_SLACK = 2**26
"""Elements that a model may have beyond twice those of its files, for buffers such as masks."""

_NAMELESS_LABEL = re.compile(r"LABEL_\d+")


def load_weights(name: str, auto_class: Any, outputs: dict[str, Any], options: dict[str, Any], head: bool) -> Any:
    """Build a model and load its weights.

    Args:
        name: folder, or name on a hub.
        auto_class: class of transformers that loads the model.
        outputs: fields of the configuration that say what a head returns.
        options: arguments of the class's `from_pretrained`.
        head: True if the modules outside the backbone may be new: they classify.

    Raises:
        FedeltaError: if the files contradict each other, lack a weight of the backbone, or hold NaN or infinity.
    """
    from transformers import AutoConfig, GenerationConfig

    with library_errors(f"model {name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **outputs)
        if config.is_encoder_decoder and not head:
            raise FedeltaError(
                f"model {name}: {config.model_type} is an encoder with a decoder, expected a causal model"
            )
        text = config.get_text_config()
        padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if padding is not None and rows and not -rows <= padding < rows:
            text.pad_token_id = None  # No embedding can be built with it. The tokenizer's own follows later.
        if Path(name).is_dir():
            _check_size(name, auto_class, config)
        model, loading = auto_class.from_pretrained(
            name,
            config=config,
            **options,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            # Only the configuration of a run decides how text is generated, so a file of the model is not read.
            generation_config=GenerationConfig(),
        )
    _check_coverage(name, model, loading, head)
    _check_finite(name, model)
    return model


@contextmanager
def library_errors(subject: str) -> Iterator[None]:
    """Turn what a library raises about a model's files, which may be anything, into one line about `subject`.

    Raises:
        FedeltaError: with the beginning of the library's text.
    """
    try:
        yield
    except FedeltaError:
        raise
    except BaseException as error:
        # The tokenizers library panics with an exception that is not an `Exception`.
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        text = one_line(first)[:180]
        if "above report" in text:
            text = "its weights cannot be converted to the layers of its config.json"
        kind = "" if isinstance(error, OSError | ValueError | RuntimeError) and text else f"{type(error).__name__}: "
        raise FedeltaError(f"{subject}: {kind}{text}") from error


def _check_size(name: str, auto_class: Any, config: Any) -> None:
    """Raise if the model would be much larger than its files, before any memory is taken."""
    files = check_folder(Path(name))
    with torch.device("meta"):
        empty = auto_class.from_config(config, trust_remote_code=False)
    needed = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    if needed > 2 * files.elements + _SLACK:
        raise FedeltaError(
            f"model {name}: its config.json describes {needed:,} numbers, but its weights hold {files.elements:,}"
        )


def _check_coverage(name: str, model: Any, loading: dict[str, Any], head: bool) -> None:
    """Raise if a weight of the backbone is missing or has another shape. Say what else did not fit."""
    backbone = f"{model.base_model_prefix}."

    def may_be_new(key: str) -> bool:
        return head and (not key.startswith(backbone) or key.startswith(f"{backbone}pooler."))

    missing = sorted(key for key in loading["missing_keys"] if not may_be_new(key))
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        expected = "" if head or missing[0].startswith(backbone) else ", expected a causal language model with its head"
        raise FedeltaError(f"model {name}: its files lack the weight {missing[0]}{more}{expected}")
    mismatched = sorted((key, tuple(found), tuple(wanted)) for key, found, wanted in loading["mismatched_keys"])
    for key, found, wanted in mismatched:
        if not may_be_new(key):
            raise FedeltaError(f"model {name}: weight {key} is {found} in its files, {wanted} by its config.json")
    if head:
        _report_head(name, model, mismatched, loading["missing_keys"], backbone)
    _report_unused(name, model, loading["unexpected_keys"], backbone)


def _report_head(name: str, model: Any, mismatched: Sequence[Any], missing: Any, backbone: str) -> None:
    """Say what becomes of a head that the files hold."""
    if mismatched:
        key, found, wanted = mismatched[0]
        warnings.warn(
            f"model {name}: its head {key.rpartition('.')[0]} has {found[0]} outputs, the data need {wanted[0]}; "
            "a new head replaces it",
            ModelWarning,
            stacklevel=2,
        )
        return
    kept = [key for key, _ in model.named_parameters() if not key.startswith(backbone) and key not in missing]
    if kept:
        labels = ", ".join(map(str, (getattr(model.config, "id2label", None) or {}).values()))
        order = "" if not labels or _NAMELESS_LABEL.match(labels) else f", trained for {one_line(labels)[:100]}"
        warnings.warn(
            f"model {name}: training continues from its own head{order}; classes take its outputs in their order",
            ModelWarning,
            stacklevel=2,
        )


def _report_unused(name: str, model: Any, unexpected: Any, backbone: str) -> None:
    """Say which weights in the files no layer of the backbone uses, as when config.json has too few layers."""
    children = {child for child, _ in model.base_model.named_children()} if model.base_model is not model else set()
    unused = sorted(key for key in unexpected if key.startswith(backbone) or key.partition(".")[0] in children)
    if unused:
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        warnings.warn(f"model {name}: weight {unused[0]}{more} in its files is not used", ModelWarning, stacklevel=2)


@torch.no_grad()
def _check_finite(name: str, model: Any) -> None:
    for key, tensor in model.named_parameters():
        # The sum of a tensor is finite if its elements are, and takes no memory.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            wrong = int((~tensor.isfinite()).sum())
            if wrong:
                raise FedeltaError(
                    f"model {name}: weight {key} holds NaN or infinity in {wrong} of {tensor.numel()} numbers"
                )
