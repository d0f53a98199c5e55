"""Compatibility of PEFT adapters with vLLM, from its documentation (vllm.lora.peft_helper, vllm.config.lora)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.lora.files.peft_read import CONFIG

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank; 16 is the default."""

DEFAULT_RANK = 16


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """Return the reasons why vLLM refuses an adapter with this configuration; empty if it accepts the adapter."""
    reasons = []
    if config["r"] > MAX_RANKS[-1]:
        reasons.append(f"rank {config['r']} is above {MAX_RANKS[-1]}: cut it by --rank, or serve the merged model")
    if saved := config.get("modules_to_save"):
        reasons.append(f"modules trained whole ({', '.join(saved)}): serve the merged model")
    if config.get("fan_in_fan_out"):
        reasons.append("LoRA on Conv1D layers: serve the merged model")
    return reasons


def vllm_line(folder: Path) -> str:
    """Return one line that says whether vLLM accepts the adapter, with the options that serve it."""
    config = json.loads((folder / CONFIG).read_text())
    if reasons := _refusals(config):
        return f"would refuse it: {'; '.join(reasons)}"
    max_rank = next(allowed for allowed in MAX_RANKS if config["r"] <= allowed)
    flag = f" --max-lora-rank {max_rank}" if max_rank > DEFAULT_RANK else ""
    return f"takes it: --enable-lora{flag} --lora-modules NAME={folder}"
