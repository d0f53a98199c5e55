"""Schema of a run's output files: the lines of `rounds.jsonl` and `timings.jsonl`, and `result.json`."""

from collections.abc import Mapping
from typing import NotRequired, TypedDict

Scores = Mapping[str, float]


class Bytes(TypedDict):
    """Bytes sent in one direction, by content. `overhead` counts names, shapes and metadata."""

    adapter: int
    heads: int
    patch: int
    overhead: int
    total: int


class RoundRecord(TypedDict):
    """A line of `rounds.jsonl`.

    Keys:
        round: index of the round, from 0.
        clients: clients whose updates were aggregated.
        shares: client → its share of the mean, for `clients`. Under `norm_weighting`, norms replace these shares.
        norms: client → [norm of its adapter, norm of its heads] after its training, for `clients`. Runs of earlier
            versions have neither.
        skipped: client → why its update was not aggregated.
        promoted: clients that got a higher rank after this round.
        pruned: clients that chose a lower rank.
        ranks: rank → number of clients with this rank after the round.
        train_loss: mean training loss of `clients` by weight; None if none reported it.
        validation: scores of the global model on the server's validation split; None if it was not evaluated.
        metric: name of the task's main score.
        bytes_down, bytes_up: bytes to and from all clients together, as serialized.
        bytes_by_client: client → [bytes down, bytes up].
        deviation: module → ‖Σ p s B A − B̄ Ā‖_F / ‖Σ p s B A‖_F, the relative error of averaging A and B separately.
        scaled_deviation: module → ‖Σ p s B A − B̄ Ā‖_F / √(m n), as in the figures of FedEx-LoRA.
        deviation_mean: mean of `deviation` over modules; None if it was not measured.
        lost: module → ‖ΔW − (B A + patch)‖_F / ‖ΔW‖_F, what the method's step lost of the mean product ΔW that it
            approximates. Empty if it approximates none. Runs of earlier versions do not have it.
        lost_mean: mean of `lost` over modules; None if it is empty.
        patch_width: largest width of this round's base patch; 0 without a patch.
        energy_by_rank: energy of the new global adapter by rank index.
        version: version of the base after this round.
        failed_attempts: client → reason, for each attempt that had too few usable updates.
        clients_validation: client → scores of its own model, if these are evaluated.
        late: client → round of its update that arrived after that round had ended and was dropped.
        bytes_late: bytes of late updates.
        caught_up: client → base version that it had when it came back.
        changed_inputs: what had changed before this round, if the run was told to accept it.
    """

    round: int
    clients: list[str]
    shares: NotRequired[dict[str, float]]
    norms: NotRequired[dict[str, list[float]]]
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
    lost: NotRequired[dict[str, float]]
    lost_mean: NotRequired[float | None]
    patch_width: int
    energy_by_rank: list[float]
    version: int
    failed_attempts: list[dict[str, str]]
    clients_validation: dict[str, dict[str, float | None]]
    late: dict[str, int]
    bytes_late: int
    caught_up: dict[str, int]
    changed_inputs: NotRequired[list[str]]


class Timing(TypedDict):
    """A line of `timings.jsonl`.

    Keys:
        round: index of the round, from 0.
        seconds: phase of the main process → seconds.
        in_workers: phase inside the workers → seconds, summed over workers.
        counts: number of texts, tokens and squared lengths, in training and evaluation.
    """

    round: int
    seconds: dict[str, float]
    in_workers: dict[str, float]
    counts: dict[str, int]


class GeneratedAnswer(TypedDict):
    """A line of `generations.jsonl`: one answer that an evaluation has generated.

    Keys:
        round: index of the round after which it was generated, from 0; `before` for the initial model, `test` for the
            final one.
        split: `validation` or `test`.
        row: row of the split.
        client: client whose model answered, if there is no global model.
        prompt: text that the model saw, with special tokens.
        answer: the generated text, as it is compared with the references.
        references: texts that it is compared with.
        exact: whether it is an exact answer, if these are counted.
    """

    round: int | str
    split: str
    row: int
    client: NotRequired[str]
    prompt: str
    answer: str
    references: list[str]
    exact: NotRequired[bool]


class Events(TypedDict):
    """Keys that the engine adds to a line of `rounds.jsonl`; see `RoundRecord`."""

    late: dict[str, int]
    bytes_late: int
    caught_up: dict[str, int]


class InputPart(TypedDict):
    """One part of what a run learns from.

    Keys:
        digest: SHA-256 of its content, in hexadecimal digits.
        rows: number of rows, of a part that has rows.
    """

    digest: str
    rows: NotRequired[int]


Inputs = Mapping[str, InputPart]
"""Name of a part, such as `training rows` or `base weights` → its digest. A part that is not known is missing."""


class AcceptedChange(TypedDict):
    """Changed inputs that a resumed run was told to accept.

    Keys:
        round: index of the first round with the new inputs.
        changes: what had changed, one text for each part.
    """

    round: int
    changes: list[str]


class Result(TypedDict):
    """`result.json`: the final model of a run.

    Keys:
        method: name of the aggregation method.
        seed: the run's seed.
        rounds: number of finished rounds.
        classes: name of each class index; empty if the task has no classes.
        clients: client → number of training rows.
        constant_score: test score of always giving the same prediction; None if it is not meaningful for the task.
        validation, test: scores of the final model. The test split is used here and nowhere else.
        test_before: scores of the initial model on the test split, if `evaluation.before` asks for them.
        adapter_rank: rank of the exported adapter.
        lora_parameters: rank → number of LoRA parameters of a client with this rank.
        base_parameters: number of parameters of the model without LoRA, heads included.
        inputs: what the run has learned from, as it was in the last round.
        accepted: changes of the inputs between two rounds.
        config_digest: digest of the configuration in `config.yaml`, without the keys that may change later.
        rounds_digest: digest of the lines of `rounds.jsonl`.
        generations_digest: digest of the lines of `generations.jsonl`, if there are any.
        digest: digest of this file's other keys.
    """

    method: str
    seed: int
    rounds: int
    classes: list[str]
    clients: dict[str, int]
    constant_score: float | None
    validation: Scores
    test: Scores
    test_before: NotRequired[Scores]
    adapter_rank: int
    lora_parameters: dict[str, int]
    base_parameters: int
    inputs: NotRequired[Inputs]
    accepted: NotRequired[list[AcceptedChange]]
    config_digest: NotRequired[str]
    rounds_digest: NotRequired[str]
    generations_digest: NotRequired[str]
    digest: NotRequired[str]
