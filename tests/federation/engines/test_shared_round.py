"""Methods of a comparison that send the same in round 0 share one training, with the same files as without."""

from typing import Any

import pytest

from fedelta.federation.client import Trainer
from fedelta.runs.comparison import comparison_configs, run_comparison
from fedelta.runs.runner import Run, run

MIXED = {"ranks": {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5}, "rounds": 2, "workers": 1}


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The round of each training of a client, in order."""
    trained: list[int] = []
    task = Trainer._task

    def counted(self: Trainer, blob: bytes, shard: Any) -> Any:
        result = task(self, blob, shard)
        trained.append(result.broadcast.round)
        return result

    monkeypatch.setattr(Trainer, "_task", counted)
    return trained


def files(finished: Run) -> list[bytes]:
    adapter = finished.folder.adapter_folder / "adapter_model.safetensors"
    return [adapter.read_bytes(), finished.folder.rounds_file.read_bytes()]


def compare(tiny_config: Any, methods: tuple[str, ...], seeds: int = 1, **changes: Any) -> list[Run]:
    return run_comparison(comparison_configs(tiny_config(**MIXED | changes), methods, seeds), False, None)


@pytest.mark.parametrize("stack", [1, 2])
def test_round_0_is_trained_once_and_the_files_are_those_of_each_run_alone(
    tiny_config: Any, rounds: list[int], stack: int
) -> None:
    training = {"steps": 2, "batch_size": 4, "stack": stack}
    finished = compare(tiny_config, ("zero-padding", "replication", "fedex", "flora"), 2, training=training)
    per_round = len(finished[0].records[0]["clients"])
    assert rounds.count(0) == 2 * per_round
    assert rounds.count(1) == 2 * 4 * per_round
    for one in finished:
        alone = run(one.config.model_copy(update={"output": str(one.folder.path.parent.with_name("alone"))}))
        assert files(alone) == files(one)


@pytest.mark.parametrize(
    ("methods", "changes"),
    [
        (("replication", "hetlora"), {}),
        (("replication", "ffa"), {}),
        (("replication", "fedex"), {"federation": {"dropout": 0.3, "min_clients": 1}}),
        (("replication", "fedex"), {"federation": {"precision": "bfloat16"}}),
    ],
    ids=["a penalty", "another plan", "dropout", "compression"],
)
def test_clients_train_for_each_method_where_their_updates_could_differ(
    tiny_config: Any, rounds: list[int], methods: tuple[str, ...], changes: dict[str, Any]
) -> None:
    finished = compare(tiny_config, methods, rounds=1, **changes)
    assert rounds.count(0) == sum(len(one.records[0]["clients"]) for one in finished)


def test_updates_above_the_limit_are_not_kept(
    tiny_config: Any, rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedelta.federation.engines.shared_round.MAX_BYTES", 1000)
    finished = compare(tiny_config, ("replication", "fedex"), rounds=1)
    assert rounds.count(0) == sum(len(one.records[0]["clients"]) for one in finished)
