"""What an adapter's folder holds besides the adapter: names of the classes, the tokenizer, and a model card.

The card is a README.md with the front matter that model hubs read. Equal runs write equal bytes, so it has no date and
no path: of a local file or folder it has the name only.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedelta import __version__
from fedelta.errors import quantity
from fedelta.federation.server import ServerState
from fedelta.learning.in_memory import PREFIX
from fedelta.learning.model.base_model import ModelKind
from fedelta.learning.tasks.metrics import METRICS
from fedelta.runs.config import Config

CARD, LABELS = "README.md", "labels.json"
PACKAGES = ("torch", "transformers", "peft")
NOT_ABOUT_THE_MODEL = ("name", "output", "workers", "compare")
"""Keys of a configuration on which the model does not depend."""

_LOADERS: dict[ModelKind, str] = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "completion": "CausalLM",
}
_TAGS: dict[ModelKind, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "completion": "text-generation",
}


def class_names(classes: Sequence[str]) -> dict[str, Any]:
    """Return the names of the classes as a model's configuration has them; nothing without classes."""
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}} if classes else {}


class Attachments(NamedTuple):
    """Files that are written next to an adapter.

    Args:
        classes: names of the classes by index; empty if the task has none.
        tokenizer: the model's tokenizer; None leaves it out.
    """

    classes: Sequence[str]
    tokenizer: Any = None

    def write(self, folder: Path) -> None:
        """Write the names of the classes as a model's `config.json` has them, and the tokenizer's files."""
        if self.classes:
            (folder / LABELS).write_text(
                json.dumps(class_names(self.classes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        if self.tokenizer is not None:
            tokenizer = copy.deepcopy(self.tokenizer)
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                # What was tokenized last has left its settings in the tokenizer.
                backend.no_truncation()
                backend.no_padding()
            tokenizer.save_pretrained(folder)


def adapter_card(
    config: Config, state: ServerState, rank: int, folder: Path, scores: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the model card of an adapter.

    Args:
        config: configuration of the run.
        state: state of the server after its last round.
        rank: rank of the adapter.
        folder: folder of the adapter, for its files.
        scores: split → scores of the final model, as far as they are known.
    """
    base, method, kind = _name(config.model.name), config.method.make(), config.task.model_kind
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "federated-learning", "fedelta", _TAGS[kind]]}
    counts = sorted(Counter(state.ranks.values()).items())
    ranks = ", ".join(f"rank {rank}: {quantity(number, 'client')}" for rank, number in counts)
    adapts = "personal adapter of one client" if method.personal else "adapter"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# LoRA adapter for {base}\n",
        f"A LoRA {adapts} of rank {rank} for the base model `{base}`. It was trained by federated fine-tuning over "
        f"{quantity(state.round, 'round')} with {quantity(len(state.ranks), 'client')} ({ranks}). The updates were "
        f"aggregated by `{method.name}`: {method.summary} ({method.paper}).\n",
        *_scores(scores),
        "## Use\n",
        f"```python\n{_example(config, folder)}```\n",
        "`adapter_config.json` has the place of the base model; pass another one to PEFT if it has moved.\n",
        "## Configuration\n",
        _fenced("yaml", yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True)),
        "Made with " + ", ".join([f"fedelta {__version__}", *(f"{name} {version(name)}" for name in PACKAGES)]) + ".\n",
    ]
    return "\n".join(parts)


def _scores(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not scores:
        return []
    rows = ["## Scores\n", "| split | score | value |", "|---|---|---|"]
    for split, values in scores.items():
        for name, value in sorted(values.items()):
            metric = METRICS.get(name)
            title, shown = (metric.title, metric.format(value)) if metric else (name, f"{value:.4g}")
            rows.append(f"| {split} | {title} | {shown} |")
    return ["\n".join(rows) + "\n"]


def _example(config: Config, folder: Path) -> str:
    """Program that loads the adapter with PEFT, from the folder in which the card is."""
    loader, options = f"AutoPeftModelFor{_LOADERS[config.task.model_kind]}", ""
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = "folder" if has_tokenizer else "model.peft_config['default'].base_model_name_or_path"
    lines = [f"from peft import {loader}", "from transformers import AutoTokenizer", "folder = '.'  # of this card"]
    if config.task.model_kind == "classification":
        lines = ["import json", *lines, f"labels = json.load(open(f'{{folder}}/{LABELS}'))['label2id']"]
        options = ", label2id=labels, id2label={i: name for name, i in labels.items()}"
    elif config.task.model_kind == "regression":
        options = ", num_labels=1"
    lines.append(f"model = {loader}.from_pretrained(folder{options})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})")
    if config.task.model_kind != "completion":
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    return "\n".join(lines) + "\n"


def _settings(config: Config) -> dict[str, Any]:
    """The configuration without what the model does not depend on, and without paths."""
    data = {key: value for key, value in config.dump().items() if key not in NOT_ABOUT_THE_MODEL}
    data["model"]["name"] = _name(config.model.name)
    source = config.data.source
    data["data"]["source"] = _name(source) if isinstance(source, str) else [_name(file) for file in source]
    data["data"]["splits"] = {split: place and _name(place) for split, place in config.data.splits.items()}
    harness = data["evaluation"]["harness"]
    if harness and harness["include"]:
        harness["include"] = _name(harness["include"])
    return data


def _name(place: str) -> str:
    """The name of a model or data set; of a path, its last part."""
    if place.startswith(PREFIX):
        return "in-memory"
    is_path = place.startswith((".", "/", "~", "$")) or place.count("/") > 1 or "\\" in place or Path(place).exists()
    return Path(place.replace("\\", "/")).name or "local" if is_path else place


def _fenced(language: str, text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}\n"
