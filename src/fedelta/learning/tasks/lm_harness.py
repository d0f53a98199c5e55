"""Scores by lm-evaluation-harness, on the tasks that it has and on any that a folder of YAML files describes."""

import functools
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from fedelta.errors import FedeltaError
from fedelta.learning.model.lora_model import LoraModel
from fedelta.settings import Settings


class HarnessSettings(Settings):
    """What lm-evaluation-harness evaluates, once, with the final model.

    Args:
        tasks: their names there, such as gsm8k or hellaswag.
        few_shot: examples before each question; None is the task's own number.
        limit: questions of each task at most; None takes all.
        include: folder with task files of one's own.
        batch_size: of its passes.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    few_shot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    include: str | None = None
    batch_size: int = Field(default=8, ge=1)


def check_harness(settings: HarnessSettings) -> None:
    """Before a run, and not after it.

    Raises:
        FedeltaError: if the harness is not installed, or lacks a task.
    """
    if find_spec("lm_eval") is None:
        raise FedeltaError("evaluation.harness needs lm_eval: pip install 'fedelta[harness]'")
    if settings.include is not None and not Path(settings.include).expanduser().is_dir():
        raise FedeltaError(f"evaluation.harness.include: {settings.include} is no folder")
    known = set(_manager(settings).all_tasks)
    for task in settings.tasks:
        if task not in known:
            raise FedeltaError(f"evaluation.harness.tasks: lm-evaluation-harness has no task {task!r}")


def harness_scores(model: LoraModel, tokenizer: Any, settings: HarnessSettings, chat: bool = False) -> dict[str, float]:
    """Scores of the loaded model: `TASK/METRIC`, with `/FILTER` where a task has several ways to find the answer.

    Args:
        chat: whether questions become turns of the tokenizer's chat template, as in training.

    Raises:
        FedeltaError: if a task's data are not there, or the harness fails otherwise.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model.peft.eval()
    wrapped = HFLM(pretrained=model.peft, tokenizer=tokenizer, batch_size=settings.batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(settings.tasks),
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            task_manager=_manager(settings),
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except Exception as error:
        # Tasks are programs of many people, which fail in many ways.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FedeltaError(f"evaluation.harness: {line}") from error
    scores = {}
    for task, measured in found["results"].items():
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                scores[f"{task}/{metric}" if chosen in ("", "none") else f"{task}/{metric}/{chosen}"] = float(value)
    return scores


@functools.cache
def _manager(settings: HarnessSettings) -> Any:
    """Reads the YAML of all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    # It warns that a model which is handed over is not one that it loaded.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if settings.include is None else str(Path(settings.include).expanduser())
    return TaskManager(include_path=folder)
