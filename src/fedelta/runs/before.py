"""Evaluation of the initial model on the test split, for comparison with the final one.

The runs of a comparison that share seed, base model and data also share this result, so it is computed once.
"""

import json
from typing import NamedTuple

from fedelta.federation.engines.evaluation import Evaluator, Scores
from fedelta.federation.server import ServerState
from fedelta.learning.data import Examples
from fedelta.learning.tasks import Answer
from fedelta.runs.assemble import splits_key
from fedelta.runs.config import Config


class Before(NamedTuple):
    """The initial model on the test split.

    Args:
        scores: its scores.
        answers: its generated answers, if the task generates text.
    """

    scores: Scores
    answers: list[Answer]


_last: dict[str, Before] = {}
"""The newest result, by everything that it depends on."""


def evaluate_before(config: Config, state: ServerState, evaluator: Evaluator, test: Examples) -> Before:
    """Evaluate the model before round 0 on the test split.

    Args:
        config: configuration of the run.
        state: the server's state before round 0.
        evaluator: evaluates the global model.
        test: the test split.
    """
    adapter = state.method.adapter
    # Only an adapter without effect leaves a model that does not depend on the method and its initial factors.
    shared = all(not (pair.A.any() and pair.B.any()) for pair in adapter.values())
    parts = {"seed": config.seed, "threads": config.threads, "batch": config.evaluation.batch_size}
    key = json.dumps([splits_key(config), parts, config.lora.model_dump(mode="json")], sort_keys=True)
    if shared and key in _last:
        return _last[key]
    answers: list[Answer] = []
    scores = evaluator.evaluate(state, test, "test", answers=answers)
    before = Before(scores, answers)
    if shared:
        _last.clear()
        _last[key] = before
    return before
