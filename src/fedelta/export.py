"""What a run leaves to the world: one PEFT adapter, or a merged model, equal to the server's global model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.adapter import Adapter, LoraPair
from fedelta.atomic import new_folder
from fedelta.lowrank import add
from fedelta.model import LoraModel
from fedelta.patch_log import PatchedBase
from fedelta.peft_write import write_adapter
from fedelta.server import Server, ServerState


def single_adapter(state: ServerState, scale: float) -> Adapter:
    """C + s·B·A as one adapter, exact to rounding.

    Without base patches that is the global adapter itself, at the scale that a client of its rank has. With
    patches every module is recompressed to its numerical rank, with balanced factors and scale 1.
    """
    if state.log.version == 0:
        return state.method.adapter.with_scale(scale)
    # As factors, wherever the log has them: the SVD of a large dense matrix takes seconds.
    base = PatchedBase(state.log.dense_nbytes)
    base.apply(state.log.since(0))
    patches = base.patches()
    pairs = {}
    for module, product in state.method.adapter.products().items():
        whole = (add([product, patches[module]]) if module in patches else product).recompress()
        # PEFT knows no rank 0: a module that nobody changed keeps one rank index of zeros.
        pairs[module] = LoraPair(whole.V, whole.U) if whole.width else state.method.adapter[module].truncate(1)
    return Adapter(pairs)


def cut_adapter(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The best adapter of at most this rank (Eckart–Young, module by module), and the share of ‖ΔW‖_F that it lacks."""
    pairs, lost, whole = {}, 0.0, 0.0
    for module, pair in adapter.items():
        product = pair.product()
        kept = product.truncate(rank)
        # PEFT knows no rank 0.
        pairs[module] = LoraPair(kept.V, kept.U) if kept.width else pair.truncate(1)
        whole += product.norm() ** 2
        lost += add([product, kept.scaled(-1.0)]).norm() ** 2
    return Adapter(pairs), (lost / whole) ** 0.5 if whole > 0 else 0.0


def export_adapter(folder: Path, state: ServerState, model: LoraModel, scale: float) -> Adapter:
    """Write the global model as one PEFT folder and return its adapter."""
    adapter = single_adapter(state, scale)
    write_global(folder, adapter, state, model)
    return adapter


def export_personal(folder: Path, state: ServerState, model: LoraModel, adapters: Mapping[str, Adapter]) -> Adapter:
    """Write one PEFT folder a client, under its name, and return the largest adapter."""
    with new_folder(folder) as temporary:
        for client, adapter in adapters.items():
            write_global(temporary / client, adapter, state, model)
    return max(adapters.values(), key=lambda adapter: adapter.rank)


def export_state(
    folder: Path, server: Server, state: ServerState, kept: Mapping[str, Adapter], model: LoraModel
) -> Adapter:
    """Write the global model as one PEFT folder, or each client's own where there is no global one.

    Args:
        kept: client → what it keeps from one round to the next.
    """
    if server.method.personal:
        return export_personal(folder, state, model, server.personal_adapters(state, kept))
    return export_adapter(folder, state, model, server.scale(state.method.adapter.rank))


def write_global(folder: Path, adapter: Adapter, state: ServerState, model: LoraModel) -> None:
    """Write an adapter with the state's heads as a PEFT folder."""
    write_adapter(
        folder,
        adapter,
        state.heads,
        base_model=model.base_name,
        modules_to_save=model.head_modules,
        task_type=model.task_type,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in model.layers.values()),
    )


def export_merged(folder: Path, adapter_folder: Path, base: Any, tokenizer: Any) -> None:
    """Write the base model with an exported adapter merged into it, and its tokenizer.

    Args:
        folder: appears whole, or not at all.
        adapter_folder: as written by `export_adapter`.
        base: the fresh model that it was trained on.
    """
    import peft

    merged = peft.PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    with new_folder(folder) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
