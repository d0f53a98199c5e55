"""What a run leaves to the world: one PEFT adapter, or a merged model, equal to the server's global model."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import Server, ServerState
from fedelta.files import new_folder
from fedelta.learning.model.base_model import load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.files.peft_write import write_adapter
from fedelta.lora.files.vllm import vllm_line
from fedelta.lora.lowrank import add
from fedelta.lora.patch_log import PatchedBase
from fedelta.runs.assemble import make_model, make_server
from fedelta.runs.config import parse_config


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


def export_run(folder: Path, adapter: Path | None, merged: Path | None, rank: int | None = None) -> list[str]:
    """Write the model of a run's checkpoint as a PEFT adapter, a merged model, or both.

    Args:
        rank: the adapter is cut to it; the merged model is not.

    Returns:
        A line for each thing written.

    Raises:
        FedeltaError: if there is no checkpoint, or an output exists.
    """
    if adapter is not None and adapter == merged:
        raise FedeltaError(f"--adapter and --merged both say {adapter}, expected two places")
    for output in (adapter, merged):
        if output is not None and output.exists():
            raise FedeltaError(f"{output} exists already")
    state, data, kept, _ = load_checkpoint(RunFolder(folder, {}).checkpoint_file)
    config = parse_config(data, str(folder))
    server = make_server(config)
    if merged and server.method.personal:
        raise FedeltaError(f"--merged: method {server.method.name} has no global model; --adapter writes one a client")
    if rank is not None and (merged or server.method.personal):
        raise FedeltaError("--rank cuts the one adapter of a global model: say it with --adapter alone")
    tokenizer = load_tokenizer(config.model)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        target = adapter or Path(scratch) / "adapter"
        # Of the model only names and shapes are asked for: a quantized base need not be quantized here too.
        plain = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
        model = make_model(plain, len(state.classes), tokenizer)
        exported = export_state(target if rank is None else Path(scratch) / "whole", server, state, kept, model)
        lost = ""
        if rank is not None:
            exported, share = cut_adapter(exported, rank)
            write_global(target, exported, state, model)
            lost = f", which lacks {share:.2%} of the update's norm"
        if adapter:
            parameters = f"{exported.parameters:,} LoRA parameters"
            lines.append(f"adapter   {adapter}: rank {exported.rank}, {parameters}{lost}")
            if not server.method.personal:
                lines.append(f"vLLM      {vllm_line(adapter)}")
        if merged:
            # In fp32 whatever the base was trained in: rounding to bf16 would lose most of a small update.
            whole = config.model.model_copy(update={"dtype": "float32", "quantization": "none"})
            base = load_base(whole, len(state.classes), tokenizer, 0, config.task.kind)
            if state.classes:
                base.config.id2label = dict(enumerate(state.classes))
                base.config.label2id = {label: i for i, label in enumerate(state.classes)}
            export_merged(merged, target, base, tokenizer)
            bits = config.model.quantization
            noted = "" if bits == "none" else f": into the base of full precision; the run's had {bits} weights"
            lines.append(f"merged    {merged}{noted}")
    return lines
