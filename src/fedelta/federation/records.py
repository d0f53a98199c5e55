"""The schema of what a run writes about itself: a line of `rounds.jsonl`, and `result.json`."""

from collections.abc import Mapping
from typing import TypedDict

Scores = Mapping[str, float]


class Bytes(TypedDict):
    """Bytes in one direction by content; `overhead` is names, shapes and metadata."""

    adapter: int
    heads: int
    patch: int
    overhead: int
    total: int


class RoundRecord(TypedDict):
    """A line of `rounds.jsonl`.

    Keys:
        round: index of the round, from 0.
        clients: the clients whose updates were aggregated.
        skipped: client → why its update was not.
        promoted: clients that were given a higher rank after this round.
        pruned: clients that took a lower rank.
        ranks: rank → number of clients that have it after this round.
        train_loss: mean over clients by weight; None if none reported it.
        validation: scores of the global model on the server's validation split; None if it was not evaluated.
        metric: the score that the run is judged by.
        bytes_down, bytes_up: of all clients together, as serialized.
        bytes_by_client: client → [bytes down, bytes up].
        deviation: module → ‖Σ p s B A − B̄ Ā‖_F / ‖Σ p s B A‖_F, what averaging A and B apart would lose.
        scaled_deviation: module → the norm divided by √(m n), as in FedEx-LoRA's figures.
        deviation_mean: of `deviation` over modules; None where it was not measured.
        patch_width: the largest width of this round's base patch; 0 without one.
        energy_by_rank: energy of the new global adapter by rank index.
        version: of the base after this round.
        failed_attempts: for each attempt that had too few usable updates, client → reason.
        clients_validation: client → scores of its own model, where these are evaluated.
        late: client → round of an update that arrived after its round and was dropped.
        bytes_late: bytes of such updates.
        caught_up: client → base version that it had come back with.
    """

    round: int
    clients: list[str]
    skipped: dict[str, str]
    promoted: list[str]
    pruned: list[str]
    ranks: dict[str, int]
    train_loss: float | None
    validation: Scores | None
    metric: str
    bytes_down: Bytes
    bytes_up: Bytes
    bytes_by_client: dict[str, list[int]]
    deviation: dict[str, float]
    scaled_deviation: dict[str, float]
    deviation_mean: float | None
    patch_width: int
    energy_by_rank: list[float]
    version: int
    failed_attempts: list[dict[str, str]]
    clients_validation: dict[str, dict[str, float | None]]
    late: dict[str, int]
    bytes_late: int
    caught_up: dict[str, int]


class Events(TypedDict):
    """What an engine adds to a line of `rounds.jsonl`; the keys are those of `RoundRecord`."""

    late: dict[str, int]
    bytes_late: int
    caught_up: dict[str, int]


class Result(TypedDict):
    """`result.json`: the final model of a run.

    Keys:
        classes: name of each class index; empty where the task has no classes.
        clients: client → number of training rows.
        constant_score: test score of always giving the same answer; None where that says nothing.
        validation, test: scores of the final model. The test split is used here and nowhere else.
        adapter_rank: rank of the exported adapter.
        lora_parameters: rank → LoRA parameters of a client of that rank.
        base_parameters: parameters of the model without LoRA, heads included.
    """

    method: str
    seed: int
    rounds: int
    classes: list[str]
    clients: dict[str, int]
    constant_score: float | None
    validation: Scores
    test: Scores
    adapter_rank: int
    lora_parameters: dict[str, int]
    base_parameters: int
