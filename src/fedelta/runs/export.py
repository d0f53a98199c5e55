"""Export the server's global model as one PEFT adapter or as a merged model."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import Checkpoint
from fedelta.federation.round_lines import DamagedFileWarning
from fedelta.federation.run_folder import RunFolder
from fedelta.federation.server import Server, ServerState
from fedelta.files import new_folder, write_file
from fedelta.learning.model.base_model import load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.files.peft_read import CONFIG
from fedelta.lora.files.peft_write import write_adapter
from fedelta.lora.files.vllm import vllm_line
from fedelta.lora.lowrank import add
from fedelta.lora.patch_log import PatchedBase
from fedelta.runs.assemble import make_model, make_server
from fedelta.runs.card import CARD, Attachments, adapter_card, class_names
from fedelta.runs.config import Config, parse_config
from fedelta.runs.task_file import TASK_FILE, task_file


def single_adapter(state: ServerState, scale: float) -> Adapter:
    """Return C + s·B·A as one adapter, exact to rounding, where C is the sum of all patches of the base.

    Without patches, this is the global adapter itself with the scale of a client of its rank. With patches, each module
    is recompressed to its numerical rank, with balanced factors and scale 1.

    Args:
        state: state of the server.
        scale: scale s of the global adapter.
    """
    if state.log.version == 0:
        return state.method.adapter.with_scale(scale)
    # Keep factors wherever the log has them: the SVD of a large dense matrix takes seconds.
    base = PatchedBase(state.log.dense_nbytes)
    base.apply(state.log.since(0))
    patches = base.patches()
    pairs = {}
    for module, product in state.method.adapter.products().items():
        total = (add([product, patches[module]]) if module in patches else product).recompress()
        # PEFT does not support rank 0: an unchanged module keeps one rank index of zeros.
        pairs[module] = LoraPair(total.V, total.U) if total.width else state.method.adapter[module].truncate(1)
    return Adapter(pairs)


def cut_adapter(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """Return the best adapter of at most this rank, and the share of ‖ΔW‖_F that it lacks.

    Each module is truncated by itself, which is optimal in the Frobenius norm (Eckart–Young).

    Args:
        adapter: adapter to cut.
        rank: largest rank of the result.
    """
    pairs, lost, total = {}, 0.0, 0.0
    for module, pair in adapter.items():
        product = pair.product()
        best = product.truncate(rank)
        # PEFT does not support rank 0.
        pairs[module] = LoraPair(best.V, best.U) if best.width else pair.truncate(1)
        total += product.norm() ** 2
        lost += add([product, best.scaled(-1.0)]).norm() ** 2
    return Adapter(pairs), (lost / total) ** 0.5 if total > 0 else 0.0


def export_adapter(folder: Path, state: ServerState, model: LoraModel, scale: float, tokenizer: Any = None) -> Adapter:
    """Write the global model as one PEFT folder and return its adapter."""
    adapter = single_adapter(state, scale)
    write_global(folder, adapter, state, model, tokenizer)
    return adapter


def export_personal(folder: Path, state: ServerState, model: LoraModel, adapters: Mapping[str, Adapter]) -> Adapter:
    """Write one PEFT folder per client, under the client's name, and return the adapter of the largest rank."""
    with new_folder(folder) as temporary:
        for client, adapter in adapters.items():
            # One tokenizer per client could fill the disk.
            write_global(temporary / client, adapter, state, model)
    return max(adapters.values(), key=lambda adapter: adapter.rank)


def export_state(
    folder: Path,
    server: Server,
    state: ServerState,
    kept: Mapping[str, Adapter],
    model: LoraModel,
    tokenizer: Any = None,
) -> Adapter:
    """Write the global model as one PEFT folder, or one folder per client if the method has no global model.

    Args:
        folder: folder to write.
        server: server of the run.
        state: state of the server.
        kept: client → factors that it keeps from one round to the next.
        model: model of the run, for the names of its base and modules.
        tokenizer: tokenizer to write next to a global model; None leaves it out.
    """
    if server.method.personal:
        return export_personal(folder, state, model, server.personal_adapters(state, kept))
    return export_adapter(folder, state, model, server.scale(state.method.adapter.rank), tokenizer)


def write_global(folder: Path, adapter: Adapter, state: ServerState, model: LoraModel, tokenizer: Any = None) -> None:
    """Write an adapter with the state's heads as a PEFT folder, with the names of its classes and the tokenizer."""
    with new_folder(folder) as temporary:
        write_adapter(
            temporary / "adapter",
            adapter,
            state.heads,
            base_model=_findable(model.base_name),
            modules_to_save=model.head_modules,
            task_type=model.task_type,
            fan_in_fan_out=any(layer.fan_in_fan_out for layer in model.layers.values()),
        )
        for file in (temporary / "adapter").iterdir():
            file.replace(temporary / file.name)
        (temporary / "adapter").rmdir()
        Attachments(state.classes, tokenizer).write(temporary)


def _findable(base: str) -> str:
    """The name of a base model, from which PEFT can load it in any working directory."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def write_cards(folder: Path, config: Config, state: ServerState, result: Mapping[str, Any] | None) -> None:
    """Write `task.json` and the model card of an adapter, or of each client's adapter.

    Args:
        folder: folder that `export_state` has written.
        config: configuration of the run.
        state: the state that was exported.
        result: `result.json`, which has scores if it is about this state; None leaves them out.
    """
    known = result is not None and result["rounds"] == state.round
    scores = {split: result[split] for split in ("test", "validation")} if result and known else {}
    for each in sorted({file.parent for file in folder.glob(f"**/{CONFIG}")}):
        rank = json.loads((each / CONFIG).read_text())["r"]
        write_file(each / TASK_FILE, task_file(config))
        write_file(each / CARD, adapter_card(config, state, rank, each, scores))


def export_merged(folder: Path, adapter_folder: Path, base: Any, tokenizer: Any) -> None:
    """Merge an exported adapter into the base model, and write the result with its tokenizer.

    Args:
        folder: folder to write. It appears complete or not at all.
        adapter_folder: folder written by `export_adapter`.
        base: base model without adapters, as loaded for training. It is changed.
        tokenizer: tokenizer of the base model.
    """
    import peft

    merged = peft.PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    with new_folder(folder) as temporary:
        try:
            merged.save_pretrained(temporary)
        except SafetensorError as error:
            # A full disk, for example, is not an OSError here.
            raise FedeltaError(f"{folder}: {error}") from error
        tokenizer.save_pretrained(temporary)


def _outputs(adapter: str | Path | None, merged: str | Path | None) -> tuple[Path | None, Path | None]:
    """Return the outputs as paths. Raise if there is none, if both are the same folder, or if one exists."""
    if adapter is None and merged is None:
        raise FedeltaError("export: neither an adapter nor a merged model was asked for")
    adapter, merged = (None if output is None else Path(output) for output in (adapter, merged))
    if adapter is not None and adapter == merged:
        raise FedeltaError(f"--adapter and --merged are both {adapter}, expected two places")
    for output in (adapter, merged):
        if output is not None and output.exists():
            raise FedeltaError(f"{output} already exists")
    return adapter, merged


def _checkpoint(folder: Path) -> Checkpoint:
    """Load the newest checkpoint of a run that can be used; warn if it is not the newest one."""
    run_folder = RunFolder(folder, {})
    checkpoint = run_folder.saved(lambda line: warnings.warn(line, DamagedFileWarning, stacklevel=4))
    if checkpoint is None:
        raise FedeltaError(f"no checkpoint at {run_folder.checkpoint_file}")
    return checkpoint


def export_run(
    folder: Path, adapter: str | Path | None, merged: str | Path | None, rank: int | None = None
) -> list[str]:
    """Write the model of a run's checkpoint as a PEFT adapter, a merged model, or both.

    Args:
        folder: folder of the run.
        adapter: folder for the adapter, or None. It must not exist.
        merged: folder for the merged model, or None. It must not exist.
        rank: rank to cut the adapter to. It is allowed for an adapter alone.

    Returns:
        One line of text for each output.

    Raises:
        FedeltaError: if there is no checkpoint, an output folder exists, or the method has no global model to merge or
            cut.
    """
    adapter, merged = _outputs(adapter, merged)
    state, data, kept, *_ = _checkpoint(folder)
    result = RunFolder(folder, {}).result()  # Read before anything is written, because it may be damaged.
    config = parse_config(data, str(folder))
    server = make_server(config)
    if merged and server.method.personal:
        raise FedeltaError(
            f"--merged: method {server.method.name} has no global model; --adapter writes one adapter per client"
        )
    if rank is not None and (merged or server.method.personal):
        raise FedeltaError(
            "--rank cuts the adapter of a global model: expected --adapter alone, and a method with a global model"
        )
    tokenizer, lines = config.task.with_template(load_tokenizer(config.model)), []
    with tempfile.TemporaryDirectory() as scratch:
        target = adapter or Path(scratch) / "adapter"
        # Only the names and shapes of the model are used here, so a quantized base does not need to be quantized.
        plain = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "none"})})
        model = make_model(plain, len(state.classes), tokenizer)
        uncut = target if rank is None else Path(scratch) / "uncut"
        exported = export_state(uncut, server, state, kept, model, tokenizer)
        lost = ""
        if rank is not None:
            exported, share = cut_adapter(exported, rank)
            write_global(target, exported, state, model, tokenizer)
            lost = f", which lacks {share:.2%} of the update's norm"
        if adapter:
            write_cards(adapter, config, state, result if rank is None else None)
            lines.append(f"adapter   {adapter}: rank {exported.rank}, {exported.parameters:,} LoRA parameters{lost}")
            if not server.method.personal:
                lines.append(f"vLLM      {vllm_line(adapter)}")
        if merged:
            # Merge in fp32 for every training dtype: rounding to bf16 would lose most of a small update.
            full_precision = config.model.model_copy(update={"dtype": "float32", "quantization": "none"})
            base = load_base(full_precision, len(state.classes), tokenizer, 0, config.task.model_kind)
            for name, value in class_names(state.classes).items():
                setattr(base.config, name, value)
            export_merged(merged, target, base, tokenizer)
            bits = config.model.quantization
            note = "" if bits == "none" else f": into the base in full precision; the run used {bits} weights"
            lines.append(f"merged    {merged}{note}")
    return lines
