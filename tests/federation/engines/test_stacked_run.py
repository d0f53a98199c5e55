"""Runs that train several clients in one pass give the results of training one by one, up to rounding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.engines import measure
from fedelta.runs import assemble, runner
from fedelta.runs.runner import Run, run

TRAINING = {"steps": 4, "batch_size": 8, "learning_rate": 0.01}


@pytest.fixture
def calm_config(tiny_config: Any, calm_bert: Path) -> Any:
    """The tiny configuration on a base without dropout.

    With dropout, fused attention would draw for all clients of a stack from one generator.
    """

    def make(stack: int | str, **changes: Any) -> Any:
        return tiny_config(
            **{
                "model": {"name": str(calm_bert)},
                "training": {**TRAINING, "stack": stack},
                "name": f"stack-{stack}",
                **changes,
            }
        )

    return make


def adapter(finished: Run) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(finished.folder.adapter_folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bits(finished: Run) -> list[bytes]:
    folder = finished.folder
    return [folder.rounds_file.read_bytes(), folder.checkpoint_file.read_bytes()[-4096:]]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Number of clients trained by each attempt at a stack; None if they could only train one by one."""
    sizes: list[int | None] = []
    reply_together = Trainer.reply_together

    def count(self: Trainer, *arguments: Any) -> Any:
        updates = reply_together(self, *arguments)
        sizes.append(len(updates) if updates else None)
        return updates

    monkeypatch.setattr(Trainer, "reply_together", count)
    return sizes


@pytest.mark.parametrize("method", ["replication", "fedex", "hetlora", "ffa", "fedsa"])
def test_clients_in_a_stack_learn_what_they_learn_alone(
    method: str, calm_config: Any, stacks: list[int | None]
) -> None:
    ranks = {} if method == "replication" else {"ranks": {"allocation": "fixed", "low": 3, "high": 3}}
    alone, together = (run(calm_config(stack, method=method, **ranks)) for stack in (1, 3))
    assert stacks == [3] * 3  # each round has four clients: a stack of three, and one client that trains alone
    for stacked, single in zip(together.records, alone.records, strict=True):
        assert stacked["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)
        assert stacked["bytes_by_client"] == single["bytes_by_client"]
        assert stacked["clients"] == single["clients"]
    expected = adapter(alone)
    assert adapter(together).keys() == expected.keys()
    for name, tensor in adapter(together).items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-3, name


def test_clients_that_cannot_be_stacked_train_one_by_one_with_identical_results(
    calm_config: Any, stacks: list[int | None]
) -> None:
    ranks = {"ranks": {"allocation": "fixed", "low": 3, "high": 3}}
    alone, together = (run(calm_config(stack, method="fed-sb", **ranks)) for stack in (1, 4))
    assert stacks == [None] * 3
    assert bits(together)[0] == bits(alone)[0]


def test_clients_with_a_tail_train_one_by_one(calm_config: Any, stacks: list[int | None]) -> None:
    alone, together = (run(calm_config(stack, method="fed-plora")) for stack in (1, 4))
    assert None in stacks
    losses = [[record["train_loss"] for record in each.records] for each in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_clients_report_their_validation_losses_from_a_stack(calm_config: Any) -> None:
    changes = {
        "ranks": {"allocation": "loss", "low": 2, "high": 4, "share": 0.5},
        "data": {**calm_config(1).data.model_dump(), "client_validation": 0.2},
    }
    alone, together = (run(calm_config(stack, **changes)) for stack in (1, 4))
    assert [r["promoted"] for r in together.records] == [r["promoted"] for r in alone.records]
    assert any(r["promoted"] for r in alone.records)


def test_stacks_give_identical_results_in_workers(calm_config: Any) -> None:
    one, two = (run(calm_config(2, workers=workers, name=f"workers-{workers}")) for workers in (1, 2))
    assert bits(one)[0] == bits(two)[0]
    assert adapter(one).keys() == adapter(two).keys()
    assert all(torch.equal(tensor, adapter(two)[name]) for name, tensor in adapter(one).items())


def test_a_failing_client_does_not_affect_the_rest_of_its_stack(
    calm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Trainer._task

    def fail(self: Trainer, blob: bytes, shard: Any) -> Any:
        task = decode(self, blob, shard)
        if task.broadcast.client.endswith("1"):
            raise OSError("no disk")
        return task

    monkeypatch.setattr(Trainer, "_task", fail)
    warnings: list[str] = []
    observer = type("Watcher", (runner.Observer,), {"warn": lambda _, message: warnings.append(message)})()
    alone, together = (run(calm_config(stack), observer=observer) for stack in (1, 4))
    assert together.records == alone.records
    assert all(len(record["clients"]) == 3 and len(record["skipped"]) == 1 for record in together.records)
    assert sum("one by one: OSError: no disk" in warning for warning in warnings) == 1


def test_a_resumed_run_keeps_the_measured_stack(calm_config: Any) -> None:
    whole = run(calm_config(3, name="whole", rounds=4))
    run(calm_config(3, name="parts", rounds=2))
    # The run keeps the stack that it began with and does not measure again.
    resumed = run(calm_config("auto", name="parts", rounds=4), resume=True)
    assert bits(resumed)[0] == bits(whole)[0]
    assert all(torch.equal(tensor, adapter(resumed)[name]) for name, tensor in adapter(whole).items())
    assert resumed.folder.config["training"]["stack"] == 3


def test_auto_measures_the_stack_and_saves_it(calm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_ranks = []
    monkeypatch.setattr(runner, "fastest_stack", lambda _trainer, _examples, ranks: measured_ranks.append(ranks) or 2)
    finished = run(calm_config("auto"))
    assert measured_ranks == [[2, 4, 2, 4]] or sorted(measured_ranks[0]) == [2, 2, 4, 4]
    assert "stack: 2" in (finished.folder.path / "config.yaml").read_text()
    assert bits(finished)[0] == bits(run(calm_config(2)))[0]


def test_a_stack_that_fails_late_leaves_no_state_behind(calm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later client's update fails after the first client has kept its factors. All must start from the old state."""
    build_update = Trainer._update
    ranks = {"ranks": {"allocation": "fixed", "low": 3, "high": 3}}

    def fail(self: Trainer, task: Any, loss: float) -> bytes:
        if task.broadcast.client.endswith("2") and task.broadcast.round == 1:
            raise OSError("no disk")
        return build_update(self, task, loss)

    monkeypatch.setattr(Trainer, "_update", fail)
    alone, together = (run(calm_config(stack, method="fedsa", rounds=2, **ranks)) for stack in (1, 4))
    assert together.records[1]["skipped"] == alone.records[1]["skipped"]
    assert together.records[1]["train_loss"] == pytest.approx(alone.records[1]["train_loss"], rel=1e-4)
    counts = [json.loads(each.folder.timings_file.read_text().splitlines()[1])["counts"] for each in (alone, together)]
    assert counts[0]["texts"] == counts[1]["texts"]
    assert counts[0]["tokens"] == counts[1]["tokens"]


@pytest.mark.parametrize(("cost_of_a_pass", "best"), [(3.0, 5), (0.0, 1)])
def test_the_fastest_stack_is_found(
    cost_of_a_pass: float, best: int, calm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulated clock: either each pass has a fixed cost, or each further client costs more than the last."""
    now = [0.0]

    def alone(*_: Any, **__: Any) -> float:
        now[0] += cost_of_a_pass + 1.0
        return 0.0

    def stacked(_model: Any, _tokenizer: Any, clients: Any, _settings: Any) -> list[Any]:
        now[0] += cost_of_a_pass + len(clients) ** (1.0 if cost_of_a_pass else 1.2)
        return []

    config = calm_config(1)
    trainer, _ = assemble.prepare(config)
    tokenized, _ = assemble.tokenized_splits(config)
    assert measure.fastest_stack(trainer, tokenized.train, [2, 4, 2]) in (1, 2, 3)  # measured on the real clock
    monkeypatch.setattr(measure, "train", alone)
    monkeypatch.setattr(measure, "train_stacked", stacked)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.fastest_stack(trainer, tokenized.train, [2, 4, 2, 4, 2]) == best


def test_micro_batches_cannot_be_stacked(calm_config: Any) -> None:
    limited = {"training": {**TRAINING, "micro_batch_size": 2, "stack": 3}}
    with pytest.raises(FedeltaError, match="training: micro_batch_size needs stack: 1 or stack: auto, found stack: 3"):
        calm_config(3, **limited)
    limited["training"]["stack"] = "auto"
    assert run(calm_config("auto", **limited)).folder.config["training"]["stack"] == 1
