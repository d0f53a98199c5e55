"""Names of tensors in an adapter's file: PEFT's own, and those that wrappers of the model leave in them.

PEFT matches names exactly. An adapter whose names carry the name of a wrapper loads without an error and without an
effect. Names that are certain are repaired, and the rest is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedelta.errors import FedeltaError
from fedelta.lora.files.weights import Entry

PREFIX = "base_model.model."
MAX_NAME = 256
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "DeepSpeed",
}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(\.(?P<rest>.+))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>[^.].*)")
_QUANTIZED = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGERS = {"I64", "I32", "I16", "I8", "U8"}


@dataclass
class Names:
    """Tensors of a file by what they are.

    Args:
        A, B: module → tensor.
        embeddings: modules whose factors are those of an embedding.
        heads: `module.parameter` → tensor, of modules that are trained whole.
        repairs: what was repaired, without repetition.
    """

    A: dict[str, Entry] = field(default_factory=dict)
    B: dict[str, Entry] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    heads: dict[str, Entry] = field(default_factory=dict)
    repairs: dict[str, None] = field(default_factory=dict)


def sort_names(folder: str, entries: Mapping[str, Entry]) -> Names:
    """Split the tensors of a file into factors by module, and heads.

    Raises:
        FedeltaError: naming the tensor that is not supported, or two tensors of one name.
    """
    result = Names()
    adapters: dict[str, None] = {}
    taken: dict[str, str] = {}
    prefixed = {key: _unwrap(key, result.repairs) for key in entries}
    bare = [key for key, (_, has_prefix) in prefixed.items() if not has_prefix]
    if bare and len(bare) < len(entries):
        raise FedeltaError(f"{folder}: unexpected tensor {bare[0][:120]}, expected a name that begins with {PREFIX}")
    if bare:
        result.repairs[f"{PREFIX} added to all names"] = None
    for key, entry in entries.items():
        name, _ = prefixed[key]
        _check_name(folder, key, name)
        if ".original_module." in name:
            continue  # PEFT's copy of the base's own head, which the trained one replaces
        plain = _place(folder, name, entry, result, adapters)
        if plain in taken:
            raise FedeltaError(f"{folder}: tensors {taken[plain][:90]} and {key[:90]} are the same one, {plain[:60]}")
        taken[plain] = key
    if len(adapters) > 1:
        raise FedeltaError(f"{folder}: the file holds the adapters {', '.join(list(adapters)[:4])}, expected one")
    if adapters:
        result.repairs[f"the adapter's name {next(iter(adapters))!r} removed from names"] = None
    if not result.A and not result.B:
        first = next(iter(entries), "nothing")
        raise FedeltaError(f"{folder}: no LoRA weights in PEFT's layout, found {len(entries)} tensors: {first[:80]}")
    return result


def _unwrap(key: str, repairs: dict[str, None]) -> tuple[str, bool]:
    """Return a name without wrappers and prefixes, and whether it had PEFT's prefix."""
    parts = key.split(".")
    for wrapper in _WRAPPERS:
        if wrapper in parts:
            repairs[f"{wrapper} ({_WRAPPERS[wrapper]}) removed from names"] = None
    parts = [part for part in parts if part not in _WRAPPERS]
    prefixes = 0
    while True:
        if parts[:1] == ["module"]:
            repairs["module. (DDP) removed from names"] = None
            parts = parts[1:]
        elif parts[:2] == ["base_model", "model"]:
            prefixes += 1
            parts = parts[2:]
        else:
            break
    if prefixes > 1:
        repairs[f"a repeated {PREFIX} removed from names"] = None
    return ".".join(parts), prefixes > 0


def _check_name(folder: str, key: str, name: str) -> None:
    if len(name) > MAX_NAME or not name.isprintable() or re.search(r"\s|^\.|\.\.|\.$|^$|[\[\]]", name):
        shown = "".join(c if c.isprintable() else "?" for c in key[:80])
        raise FedeltaError(f"{folder}: tensor {shown!r} is not the name of a module's parameter")


def _place(folder: str, name: str, entry: Entry, result: Names, adapters: dict[str, None]) -> str:
    """Add a tensor to the result and return its plain name."""
    if "lora_magnitude" in name:
        raise FedeltaError(f"{folder}: tensor {name[:120]} is DoRA's magnitude, so the update is not s·B·A")
    if name.endswith(_QUANTIZED) or "quant_state" in name:
        raise FedeltaError(f"{folder}: tensor {name[:120]} belongs to quantized weights of the base, not to an adapter")
    if entry.shape and 0 in entry.shape:
        raise FedeltaError(
            f"{folder}: tensor {name[:100]} is empty, {entry.shape}: saved without gathering the shards of "
            "DeepSpeed or FSDP; save it again from the gathered model"
        )
    if match := _FACTOR.fullmatch(name):
        module, factor = match["module"], match["factor"]
        adapter = _adapter_name(folder, name, match["rest"], embedding=bool(match["kind"]))
        if adapter:
            adapters[adapter] = None
        if entry.dtype not in FLOATS:
            raise FedeltaError(f"{folder}: tensor {name[:120]} is {entry.dtype}, expected one of {', '.join(FLOATS)}")
        if match["kind"]:
            result.embeddings.add(module)
        (result.A if factor == "A" else result.B)[module] = entry
        return f"{module}.lora_{factor}"
    if match := _SAVED.fullmatch(name):
        adapters[match["adapter"]] = None
        name = f"{match['module']}.{match['parameter']}"
    if re.search(r"(^|\.)(lora_|token_adapter|trainable_tokens)", name):
        raise FedeltaError(f"{folder}: tensor {name[:120]} is not supported, expected only lora_A, lora_B and heads")
    if entry.dtype not in FLOATS and entry.dtype not in _INTEGERS:
        raise FedeltaError(f"{folder}: head {name[:120]} is {entry.dtype}, expected a plain float or whole numbers")
    result.heads[name] = entry
    return name


def _adapter_name(folder: str, name: str, rest: str | None, embedding: bool) -> str | None:
    """Return the adapter's name inside a factor's name; None if there is none."""
    if embedding:
        if rest is None or "." not in rest:
            return None if rest == "weight" else rest
    elif rest == "weight":
        return None
    elif rest is not None and rest.endswith(".weight") and rest.count(".") == 1:
        return rest.removesuffix(".weight")
    raise FedeltaError(f"{folder}: tensor {name[:120]} is not supported, expected only weights of lora_A and lora_B")
