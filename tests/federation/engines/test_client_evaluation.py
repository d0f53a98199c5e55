"""Evaluation of clients' own models on the server: their scores before averaging, and ranks by these scores."""

from typing import Any

import pytest
import torch

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.lora.adapter import Adapter, LoraPair, initial_adapter
from fedelta.runs.assemble import make_server
from fedelta.runs.runner import run

SINGLE_CLIENT = {"partition": {"kind": "iid", "clients": 1}, "ranks": {"allocation": "uniform", "high": 4}}


def test_a_single_client_has_the_scores_of_the_global_model(tiny_config: Any) -> None:
    for method in ("replication", "fed-plora"):
        finished = run(tiny_config(name=method, method=method, evaluation={"clients": 2}, **SINGLE_CLIENT))
        for record in finished.records:
            if record["round"] < 2:
                (own,) = record["clients_validation"].values()
                assert own.pop("rank") == 4
                assert own == pytest.approx(record["validation"], rel=1e-6)
            else:
                assert record["clients_validation"] == {}


def test_evaluating_clients_covers_the_rounds_clients_and_changes_nothing_else(tiny_config: Any) -> None:
    plain = run(tiny_config(name="plain", method="fedex"))
    evaluated = run(tiny_config(name="evaluated", method="fedex", evaluation={"clients": 3}, workers=2))
    for before, after in zip(plain.records, evaluated.records, strict=True):
        own = after.pop("clients_validation")
        assert set(own) == set(after["clients"])
        assert {scores["rank"] for scores in own.values()} == {2, 4}
        before.pop("clients_validation")
        assert before == after
    different = {scores["loss"] for scores in own.values()}
    assert len(different) == len(own), "each client's model is its own"


def test_clients_that_keep_factors_are_not_evaluated_one_by_one(tiny_config: Any) -> None:
    finished = run(tiny_config(method="fedsa", rounds=1, evaluation={"clients": 1}, **SINGLE_CLIENT))
    assert finished.records[0]["clients_validation"] == {}


def test_the_server_ranks_clients_by_the_loss_on_its_own_rows(tiny_config: Any) -> None:
    ranks = {"allocation": "loss", "loss_on": "server", "low": 2, "high": 4, "share": 0.25}
    # Clients hold out no rows, so they could not report a loss.
    data = {**tiny_config().dump()["data"], "client_validation": 0}
    config = tiny_config(ranks=ranks, evaluation={"clients": 1}, rounds=2, data=data)
    finished = run(config)
    own = finished.records[0]["clients_validation"]
    losses = load_checkpoint(finished.folder.checkpoint_file).state.first_losses
    assert losses == {client: scores["loss"] for client, scores in own.items()}
    (best,) = finished.records[0]["promoted"]
    assert losses[best] == min(losses.values())
    assert finished.records[1]["ranks"] == {"2": 3, "4": 1}
    again = run(config.model_copy(update={"name": "two", "workers": 2}))
    assert again.folder.rounds_file.read_bytes() == finished.folder.rounds_file.read_bytes()


def test_loss_rows_measures_the_loss_on_a_subset_of_the_servers_rows(tiny_config: Any) -> None:
    ranks = {"allocation": "loss", "loss_on": "server", "loss_rows": 5, "low": 2, "high": 4, "share": 0.25}
    finished = run(tiny_config(ranks=ranks, evaluation={"clients": 1}, rounds=1))
    losses = load_checkpoint(finished.folder.checkpoint_file).state.first_losses
    whole = {client: scores["loss"] for client, scores in finished.records[0]["clients_validation"].items()}
    assert set(losses) == set(whole)
    assert all(losses[client] != whole[client] for client in whole)


def test_the_server_cannot_measure_the_loss_of_clients_that_keep_factors(tiny_config: Any) -> None:
    ranks = {"allocation": "loss", "loss_on": "server", "low": 4, "high": 4}
    message = "fedsa keeps factors at clients, so the server can't measure their losses; expected ranks.loss_on: own"
    with pytest.raises(FedeltaError, match=message):
        make_server(tiny_config(method="fedsa", ranks=ranks))


def test_energy_by_rank_is_the_energy_of_the_outer_products() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = {
        name: LoraPair(torch.randn(r, 5, generator=generator), torch.randn(7, r, generator=generator), scale)
        for name, r, scale in (("one", 3, 2.0), ("two", 2, 0.5))
    }
    dense = torch.zeros(3, dtype=torch.float64)
    for pair in pairs.values():
        for j in range(pair.rank):
            product = pair.scale * torch.outer(pair.B[:, j].double(), pair.A[j].double())
            dense[j] += (product**2).sum()
    assert torch.allclose(Adapter(pairs).energy_by_rank(), dense, rtol=1e-12)


def test_rounds_record_the_energy_by_rank_and_zero_padding_loses_it_above_the_low_rank(tiny_config: Any) -> None:
    ranks = {"allocation": "fixed", "low": 2, "high": 4, "share": 0.25}
    above = {}
    for method in ("zero-padding", "replication"):
        finished = run(tiny_config(name=method, method=method, ranks=ranks))
        energy = finished.records[-1]["energy_by_rank"]
        state = load_checkpoint(finished.folder.checkpoint_file).state
        assert energy == state.method.adapter.energy_by_rank().tolist()
        above[method] = sum(energy[2:]) / sum(energy)
    assert above["zero-padding"] < 0.2 * above["replication"]
    assert initial_adapter({"m": (3, 4)}, 2, 0).energy_by_rank().tolist() == [0.0, 0.0], "B is zero"


def test_a_score_that_is_not_finite_neither_promotes_nor_ends_a_run(tiny_config: Any, monkeypatch: Any) -> None:
    from fedelta.federation.engines.evaluation import Evaluator

    evaluate_client = Evaluator.evaluate_client

    def broken(self: Evaluator, state: Any, sent: Any, update: Any, examples: Any) -> dict[str, float]:
        scores = evaluate_client(self, state, sent, update, examples)
        return scores | {"loss": float("nan")} if sent.client == "client-000" else scores

    monkeypatch.setattr(Evaluator, "evaluate_client", broken)
    ranks = {"allocation": "loss", "loss_on": "server", "low": 2, "high": 4, "share": 0.25}
    finished = run(tiny_config(ranks=ranks, evaluation={"clients": 1}, rounds=2))
    assert finished.records[0]["clients_validation"]["client-000"]["loss"] is None
    assert all(record["promoted"] != ["client-000"] for record in finished.records)
    assert "client-000" not in load_checkpoint(finished.folder.checkpoint_file).state.first_losses


def test_a_refused_update_is_not_evaluated(tiny_config: Any, monkeypatch: Any) -> None:
    from fedelta.federation.client import Trainer

    reply = Trainer.reply

    def spoiled(self: Trainer, blob: bytes, shard: Any) -> bytes:
        update = reply(self, blob, shard)
        return update.replace(b"client-001", b"client-009") if b"client-001" in update else update

    monkeypatch.setattr(Trainer, "reply", spoiled)
    ranks = {"allocation": "loss", "loss_on": "server", "low": 2, "high": 4, "share": 0.25}
    finished = run(tiny_config(ranks=ranks, evaluation={"clients": 1}, rounds=1))
    (record,) = finished.records
    assert set(record["skipped"]) == {"client-001"}
    assert "client-001" not in record["clients_validation"]
    assert "client-001" not in load_checkpoint(finished.folder.checkpoint_file).state.first_losses
