"""Whether adapter folders belong together: their base model, layers and heads, and what differs between them."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedelta.errors import FedeltaError, quantity
from fedelta.lora.files.adapter_config import shown
from fedelta.lora.files.peft_read import Layer, PeftFolder, parameters_of

BASE = "base_model_name_or_path"
_NO_NAME = re.compile(r"checkpoint[-_]?\d+|models?|base|final|merged|outputs?|best|latest")
_QUANTIZED = re.compile(r"[-_.](unsloth[-_.])?(bnb[-_.])?([48]bit|int[48]|gptq|awq|fp8|nf4)\b.*$")
_CONTAINERS = {"model", "language_model", "transformer", "base_model"}
_WRAPPERS = {"module", "default", "_orig_mod"}
"""Parts that tools add to names. Inside a name they may also be those of the model, so they are not removed there."""


class Base(NamedTuple):
    """The base model that an output names.

    Args:
        name: name or path; None if no folder names one.
        revision: its revision.
        notes: what was taken as equal, a line each.
    """

    name: str | None
    revision: str | None
    notes: list[str]


def common_base(folders: Sequence[PeftFolder], override: str | None) -> Base:
    """Return the base model of all folders.

    Folders that name no base match any. Two paths with the same last part are taken as one model, with a note.

    Args:
        folders: the folders.
        override: name of the base if the caller knows that all folders have it.

    Raises:
        FedeltaError: if two folders name different base models or revisions.
    """
    if override is not None:
        return Base(override, None, [])
    named = [folder for folder in folders if _named(folder)]
    if not named:
        return Base(None, None, [])
    first = named[0]
    expected, notes = _named(first), []
    for folder in named[1:]:
        found = _named(folder)
        if found == expected:
            if _revision(found, folder) != _revision(expected, first):
                raise _mismatch(
                    folder, "revision of the base", _revision(found, folder), first, _revision(expected, first)
                )
        elif _last_part(found) == _last_part(expected) and not _NO_NAME.fullmatch(_last_part(found)):
            notes.append(f"{folder.name}: base model {shown(found)} is taken to be {shown(expected)}; --base names one")
        else:
            copies = _QUANTIZED.sub("", _last_part(found)) == _QUANTIZED.sub("", _last_part(expected))
            hint = "one may be a quantized copy of the other: " if copies else ""
            raise FedeltaError(
                f"{folder.name}: base model {shown(found)}, but {first.name} has {shown(expected)}; {hint}pass --base "
                "NAME if they are one model"
            )
    return Base(expected, first.config.get("revision"), notes)


def _named(folder: PeftFolder) -> str:
    name = folder.config.get(BASE)
    return name if isinstance(name, str) else ""


def _revision(base: str, folder: PeftFolder) -> str:
    return str(folder.config.get("revision") or "main") if base else "main"


def _last_part(name: str) -> str:
    """Return the last part of a path or Hub name; of the Hub's cache, the name of the model."""
    parts = [part for part in re.split(r"[\\/]+", name.strip()) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    return parts[-1].casefold() if parts else ""


def all_layers(folders: Sequence[PeftFolder]) -> dict[str, Layer]:
    """Return the layers of all folders, sorted by name.

    Raises:
        FedeltaError: if a layer has another shape or place in two folders, or two names for one layer are likely.
    """
    owners: dict[str, PeftFolder] = {}
    for folder in folders:
        for name, layer in folder.layers.items():
            first = owners.setdefault(name, folder)
            expected = first.layers[name]
            if layer.layout != expected.layout:
                raise _mismatch(folder, f"module {name} is", _described(layer), first, _described(expected))
            if layer.shape != expected.shape:
                raise _mismatch(folder, f"module {name} is out×in", layer.shape, first, expected.shape)
            module = layer.layout.module
            if layer.layout.kind == "parameter" and first is not folder and layer.layout.expert == 0:
                mine, theirs = (sorted(parameters_of(module, each.config)) for each in (folder, first))
                if mine != theirs:
                    raise _mismatch(folder, f"module {module} adapts the parameters", mine, first, theirs)
    _check_wrappers(owners)
    _check_names(folders)
    return {name: owners[name].layers[name] for name in sorted(owners)}


def _described(layer: Layer) -> str:
    layout = layer.layout
    return f"{layout.kind} of {layout.experts} experts" if layout.experts > 1 else layout.kind


def _check_wrappers(owners: dict[str, PeftFolder]) -> None:
    """Raise if two layers have the same name but for a wrapper's: PEFT would load only one of them."""
    plain: dict[tuple[str, ...], str] = {}
    for name, folder in owners.items():
        parts = tuple(part for part in name.replace("base_model.model.", "").split(".") if part not in _WRAPPERS)
        if (other := plain.setdefault(parts, name)) != name:
            raise FedeltaError(
                f"{folder.name}: module {name[:80]} is {other[:80]} of {owners[other].name} inside of a wrapper; "
                "expected the names of the base model"
            )


def _check_names(folders: Sequence[PeftFolder]) -> None:
    """Raise if a folder shares no layer with the first one, and all of its layers have the other's names inside others.

    The same layers are called `encoder.layer.0` and `bert.encoder.layer.0` in two classes of one model. PEFT would load
    only one half of their union.
    """
    first = folders[0]
    inside = {_inner_name(name): name for name in first.layers}
    for folder in folders[1:]:
        if folder.layers.keys() & first.layers.keys():
            continue
        twins = [(name, inside.get(_inner_name(name)) or _suffix_of(name, first)) for name in folder.layers]
        if all(twin for _, twin in twins):
            mine, theirs = twins[0]
            raise FedeltaError(
                f"{folder.name}: module {mine[:80]} looks like {str(theirs)[:80]} of {first.name}: one layer in two "
                "classes of one model; expected the same names"
            )


def _inner_name(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part not in _CONTAINERS)


def _suffix_of(name: str, folder: PeftFolder) -> str | None:
    if len(folder.layers) > 2000 or name.count(".") < 2:  # names this short are the same in many places
        return None
    return next((n for n in folder.layers if n.endswith(f".{name}") or name.endswith(f".{n}")), None)


def missing_layers(folders: Sequence[PeftFolder], layers: dict[str, Layer]) -> list[str]:
    """Say which folders lack which modules, a line each."""
    notes = []
    for folder in folders:
        missing = dict.fromkeys(layer.layout.module for name, layer in layers.items() if name not in folder.layers)
        if missing:
            names = ", ".join(list(missing)[:2]) + (", …" if len(missing) > 2 else "")
            modules = len({layer.layout.module for layer in layers.values()})
            notes.append(
                f"{folder.name}: does not adapt {len(missing)} of {quantity(modules, 'module')} ({names[:160]}): no "
                "change there"
            )
    return notes


def check_transposed(folders: Sequence[PeftFolder]) -> bool:
    """Return `fan_in_fan_out` of the folders that adapt linear layers.

    Raises:
        FedeltaError: if it differs between them.
    """
    linear = [f for f in folders if any(layer.layout.kind == "linear" for layer in f.layers.values())]
    flags = [bool(folder.config.get("fan_in_fan_out")) for folder in linear]
    for folder, flag in zip(linear, flags, strict=True):
        if flag != flags[0]:
            raise _mismatch(folder, "fan_in_fan_out", flag, linear[0], flags[0])
    return any(flags)


def check_heads(folders: Sequence[PeftFolder]) -> None:
    """Check that all folders save the same heads.

    Raises:
        FedeltaError: naming the head.
    """
    first = folders[0]
    for folder in folders[1:]:
        if dict(first.heads) == dict(folder.heads):
            continue
        name = sorted(set(first.heads.items()) ^ set(folder.heads.items()))[0][0]
        if name in first.heads and name in folder.heads:
            raise _mismatch(folder, f"head {name} is", folder.heads[name], first, first.heads[name])
        has, lacks = (first, folder) if name in first.heads else (folder, first)
        raise FedeltaError(
            f"{lacks.name}: no head {name[:80]}, but {has.name} has one: a head replaces the base's own weights, which "
            "are not in the folders, so there is no mean; expected the same modules_to_save"
        )


def _mismatch(folder: PeftFolder, what: str, found: Any, other: PeftFolder, expected: Any) -> FedeltaError:
    return FedeltaError(f"{folder.name}: {what} {found}, but {other.name} has {expected}; expected the same")
