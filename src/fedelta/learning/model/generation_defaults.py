"""What a model itself says about generation: its end tokens are kept, the configuration of a run decides all else.

A `generation_config.json` may change answers (a temperature, forced or suppressed tokens, a minimal length) and
differs from model to model.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.model.model_folder import read_json
from fedelta.learning.model.model_warning import ModelWarning

FILE = "generation_config.json"

_NOT_ABOUT_ANSWERS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("transformers_version", "_from_model_config", "use_cache", "max_length", "max_new_tokens"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
}


def forget_own_generation(model: Any, tokenizer: Any, name: str) -> None:
    """Give a model a new generation configuration, which holds its special tokens and nothing else.

    A model may have several end tokens, such as one for the end of a turn. All of them end an answer.

    Args:
        model: a causal language model, changed in place.
        tokenizer: its tokenizer.
        name: name of the model in the warning about what is not used.
    """
    from transformers import GenerationConfig

    own = _own_fields(model, name)
    text = model.config.get_text_config()
    rows = model.get_input_embeddings().num_embeddings
    ends: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(text, "eos_token_id", None), own.get("eos_token_id")):
        values: Any = value if isinstance(value, list | tuple) else [value]
        ends |= {end for end in values if _is_token(end, rows)}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    ignored = sorted(key for key, value in own.items() if key not in _NOT_ABOUT_ANSWERS and value is not None)
    if ignored:
        fields = one_line(", ".join(ignored))[:120]
        warnings.warn(
            f"model {name}: of its {FILE} only the end tokens are used, not {fields}; task.generate decides",
            ModelWarning,
            stacklevel=2,
        )


def _is_token(value: Any, rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows


def _own_fields(model: Any, name: str) -> Mapping[str, Any]:
    """Fields of the model's own file, or of a model in memory."""
    source = str(model.config._name_or_path)
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        try:
            found = cached_file(source, FILE, _raise_exceptions_for_missing_entries=False) if source else None
        except (OSError, ValueError):
            found = None
        file = Path(found) if found else None
    else:
        file = Path(source) / FILE
    if file is None or not file.is_file():
        # A model that was built in memory has them in the object.
        own = getattr(model, "generation_config", None)
        return own.to_diff_dict() if own is not None else {}
    try:
        return read_json(file)
    except FedeltaError as error:
        warnings.warn(f"model {name}: {error}; it is not used", ModelWarning, stacklevel=2)
        return {}
