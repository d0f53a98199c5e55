"""Reading of PEFT folders: `adapter_config.json` and `adapter_model.safetensors` only.

A folder whose update is not s·B·A is refused with the reason: DoRA, `lora_bias`, LoRA on embeddings. Pickles are never
loaded.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, finite, lora_scale

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA rescales the weight by a magnitude, so its update is not s·B·A",
    "lora_bias": "a bias on B is not part of s·B·A",
    "layer_replication": "replicated layers do not have their own weight in the base model",
    "use_qalora": "QALoRA pools the input before A",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "trainable_token_indices": "trained token embeddings are neither LoRA nor a head",
    "target_parameters": "LoRA on bare parameters is not a module's B·A",
    "velora_config": "VeLoRA changes what A receives",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors",
    "kasa_config": "KaSA changes the base weight",
    "monteclora_config": "MonteCLoRA samples its factors",
    "arrow_config": "Arrow routes between adapters by token",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Layer(NamedTuple):
    """One adapted layer of a folder: its rank, its shape (m, n), out×in, and its scale s."""

    rank: int
    shape: tuple[int, int]
    scale: float


@dataclass(frozen=True, eq=False)
class PeftFolder:
    """A PEFT adapter with a validated configuration and header. Tensors are read on demand.

    Args:
        path: the folder.
        config: content of `adapter_config.json`.
        layers: module → rank, shape and scale, including `rank_pattern`, `alpha_pattern` and rsLoRA.
        heads: `module.parameter` → shape, of the tensors of `modules_to_save`.
    """

    path: Path
    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    heads: Mapping[str, tuple[int, ...]]

    def read(self, modules: Iterable[str] | None = None) -> Adapter:
        """Read the pairs of some or all modules, in fp32.

        Args:
            modules: names of the modules; None reads all.

        Raises:
            FedeltaError: naming the module that holds NaN or infinite values.
        """
        pairs = {}
        with _opened(self.path) as tensors:
            for module in self.layers if modules is None else modules:
                factors = []
                for name in ("A", "B"):
                    factor = tensors.get_tensor(f"{PREFIX}{module}.lora_{name}.weight").float()
                    if not finite(factor):
                        raise FedeltaError(f"{self.path}: module {module}: {name} holds NaN or infinite values")
                    factors.append(factor)
                pairs[module] = LoraPair(factors[0], factors[1], self.layers[module].scale)
        return Adapter(pairs)

    def read_heads(self) -> dict[str, Tensor]:
        """Read the heads: `module.parameter` → tensor.

        Raises:
            FedeltaError: naming the head that holds NaN or infinite values.
        """
        heads = {}
        with _opened(self.path) as tensors:
            for name in self.heads:
                heads[name] = tensors.get_tensor(PREFIX + name)
                if heads[name].is_floating_point() and not finite(heads[name]):
                    raise FedeltaError(f"{self.path}: head {name} holds NaN or infinite values")
        return heads


def open_adapter(folder: str | Path) -> PeftFolder:
    """Read the configuration and header of a PEFT LoRA folder and check that they are consistent.

    Raises:
        FedeltaError: naming the folder and what is missing, damaged or not supported.
    """
    folder = _snapshot(Path(folder))
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise FedeltaError(
                f"{folder}: {PICKLE} is a pickle, which can run code and is never loaded; open it with PEFT if "
                "you trust it and save it again: model.save_pretrained(folder, safe_serialization=True)"
            )
        raise FedeltaError(f"{folder}: no {WEIGHTS}")
    with _opened(folder) as tensors:
        shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    A, B, heads = _sort_keys(folder, shapes)
    layers = {}
    for module in sorted(A | B):
        if module not in A or module not in B:
            raise FedeltaError(f"{folder}: module {module} has no lora_{'A' if module in B else 'B'}")
        for name, shape in (("A", A[module]), ("B", B[module])):
            if len(shape) != 2:
                raise FedeltaError(f"{folder}: module {module}: {name} is {shape}, expected a matrix")
        if A[module][0] != B[module][1]:
            raise FedeltaError(f"{folder}: module {module}: A {A[module]} and B {B[module]} do not share a rank")
        rank = A[module][0]
        stated = _pattern(config.get("rank_pattern"), module, config["r"])
        if rank != stated:
            raise FedeltaError(f"{folder}: module {module} has rank {rank}, but {CONFIG} says {stated}")
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        if not _positive(alpha):
            raise FedeltaError(f"{folder}: module {module} has lora_alpha {alpha!r}, expected a positive number")
        scale = lora_scale(float(alpha), rank, "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r")
        layers[module] = Layer(rank, (B[module][0], A[module][1]), scale)
    return PeftFolder(folder, config, layers, heads)


def _snapshot(folder: Path) -> Path:
    """Return the folder, or its newest revision if it is a folder of the Hub's cache (`models--owner--name`)."""
    if (folder / CONFIG).exists() or not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        return folder / "snapshots" / main.read_text().strip()
    revisions = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
    return revisions[-1] if revisions else folder


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open the weights of a folder; errors of the library become a `FedeltaError`."""
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as tensors:
            yield tensors
    except (safetensors.SafetensorError, OSError) as error:
        raise FedeltaError(f"{folder / WEIGHTS}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` and raise if its update is not s·B·A."""
    if folder.is_file():
        raise FedeltaError(f"{folder}: a file, expected an adapter folder")
    if not folder.is_dir():
        raise FedeltaError(f"{folder}: no such folder")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise FedeltaError(f"{folder}: no {CONFIG}") from error
    except ValueError as error:
        raise FedeltaError(f"{folder / CONFIG}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise FedeltaError(f"{folder / CONFIG}: a {type(config).__name__}, expected names and values")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise FedeltaError(f"{folder / CONFIG}: {key} is {config[key]!r}, expected names and numbers")
    if config.get("peft_type") != "LORA":
        raise FedeltaError(f"{folder}: a {config.get('peft_type')} adapter, expected LORA")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise FedeltaError(f"{folder}: {key} is not supported: {reason}")
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_CHANGES_BASE):
        raise FedeltaError(
            f"{folder}: init_lora_weights={initial!r} moves a part of the base weight into the adapter, so its "
            "update is not s·B·A; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if config.get("bias", "none") != "none":
        raise FedeltaError(f"{folder}: bias={config['bias']!r} trains biases of the base, expected 'none'")
    for key in ("r", "lora_alpha"):
        if not _positive(config.get(key)):
            raise FedeltaError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, expected a positive number")
    return config


Shape = tuple[int, ...]


def _sort_keys(
    folder: Path, tensors: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, Shape]]:
    """Split the shapes of all tensors into A and B by module, and heads by `module.parameter`."""
    A, B, heads = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key or "lora_embedding" in name or "lora_magnitude" in name or name.endswith(".base_layer.weight"):
            raise FedeltaError(f"{folder}: unexpected tensor {key}, expected only lora_A, lora_B and heads")
        if name.endswith(".lora_A.weight"):
            A[name.removesuffix(".lora_A.weight")] = tensor
        elif name.endswith(".lora_B.weight"):
            B[name.removesuffix(".lora_B.weight")] = tensor
        elif ".lora_" in name:
            raise FedeltaError(f"{folder}: tensor {key} is not supported, expected only weights of lora_A and lora_B")
        else:
            heads[name] = tensor
    if not A:
        raise FedeltaError(f"{folder / WEIGHTS}: no LoRA weights, found {len(tensors)} other tensors")
    return A, B, heads


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return a module's value in `rank_pattern` or `alpha_pattern`, matched as PEFT does."""
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(pattern.keys(), module), default)
