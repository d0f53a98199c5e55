"""The model of a run's checkpoint as files for others: `fedelta export`."""

import tempfile
from pathlib import Path

from fedelta.base_model import load_base, load_tokenizer
from fedelta.checkpoint import load_checkpoint
from fedelta.config import parse_config
from fedelta.errors import FedeltaError
from fedelta.export import cut_adapter, export_merged, export_state, write_global
from fedelta.runner import make_model, make_server
from fedelta.tracking import RunFolder
from fedelta.vllm import vllm_line


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
        # Of the model only names and shapes are asked for: a quantised base need not be quantised here too.
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
