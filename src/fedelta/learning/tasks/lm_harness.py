"""Scores by lm-evaluation-harness, on its own tasks and on those that a folder of YAML files describes."""

import functools
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from fedelta.errors import FedeltaError
from fedelta.learning.model.lora_model import LoraModel
from fedelta.learning.tasks.chat_template import ChatTemplate
from fedelta.settings import Settings


class HarnessSettings(Settings):
    """Evaluation of the final model by lm-evaluation-harness.

    Args:
        tasks: names of tasks in the harness, such as gsm8k or hellaswag.
        few_shot: number of examples before each question. None uses the task's own number.
        limit: maximum number of questions of each task. None uses all.
        include: folder with your own task files.
        batch_size: number of texts per forward pass.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    few_shot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    include: str | None = None
    batch_size: int = Field(default=8, ge=1)


def check_harness(settings: HarnessSettings) -> None:
    """Check that the harness can score the tasks, so that a run fails early.

    Raises:
        FedeltaError: if the harness is not installed, or lacks a task.
    """
    if find_spec("lm_eval") is None:
        raise FedeltaError("evaluation.harness needs lm_eval: pip install 'fedelta[harness]'")
    if settings.include is not None and not Path(settings.include).expanduser().is_dir():
        raise FedeltaError(f"evaluation.harness.include: {settings.include} is not a folder")
    known = set(_manager(settings).all_tasks)
    for task in settings.tasks:
        if task not in known:
            raise FedeltaError(f"evaluation.harness.tasks: lm-evaluation-harness has no task {task!r}")


def harness_scores(
    model: LoraModel, tokenizer: Any, settings: HarnessSettings, chat: ChatTemplate | None = None
) -> dict[str, float]:
    """Compute scores of the loaded model: `TASK/METRIC`, plus `/FILTER` if a task extracts answers in several ways.

    Args:
        chat: template by which questions become turns, as in training. None asks them as plain texts.

    Raises:
        FedeltaError: if a task's data are missing, or the harness fails for another reason.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model.peft.eval()

    class WithTemplate(HFLM):
        """A model of the harness whose chats are rendered as in training, with the same date."""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            assert chat is not None
            if add_generation_prompt:
                return chat.render(chat_history, True)
            return chat.render_up_to_last(chat_history)

    wrapped = WithTemplate(pretrained=model.peft, tokenizer=tokenizer, batch_size=settings.batch_size)
    try:
        report = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(settings.tasks),
            num_fewshot=settings.few_shot,
            limit=settings.limit,
            task_manager=_manager(settings),
            bootstrap_iters=0,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat is not None,
        )
    except Exception as error:
        # Tasks are programs by many authors, so any exception is possible.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FedeltaError(f"evaluation.harness: {line}") from error
    scores = {}
    for task, measured in report["results"].items():
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and metric != "sample_len":
                scores[f"{task}/{metric}" if chosen in ("", "none") else f"{task}/{metric}/{chosen}"] = float(value)
    return scores


@functools.cache
def _manager(settings: HarnessSettings) -> Any:
    """Read the YAML files of all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    # The harness warns about a model that it did not load itself.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if settings.include is None else str(Path(settings.include).expanduser())
    return TaskManager(include_path=folder)
