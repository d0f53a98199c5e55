"""Complete runs in process, with a real model, real texts and real messages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.errors import FedeltaError
from fedelta.federation import client as client_module
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.federation.client import Trainer
from fedelta.federation.engines import Observer
from fedelta.federation.engines.evaluation import Evaluator
from fedelta.federation.server import Server, ServerState
from fedelta.learning.tasks import Classification, evaluate
from fedelta.lora.adapter import lora_scale
from fedelta.lora.patch_log import PatchedBase, PatchLog
from fedelta.methods import make_method, methods
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import count_bytes
from fedelta.runs import assemble
from fedelta.runs.runner import Run, run
from federations import VARIANTS, label

CHURN = {"participation": 0.5}
HARD = {"epochs": 4, "batch_size": 8, "learning_rate": 0.01}


class Tap(Observer):
    """Collects every warning."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """Each broadcast and its update in a test's runs, as bytes, in order."""
    exchanges: list[tuple[bytes, bytes]] = []
    reply = Trainer.reply

    def listen(self: Trainer, blob: bytes, shard: Any) -> bytes:
        update = reply(self, blob, shard)
        exchanges.append((blob, update))
        return update

    monkeypatch.setattr(Trainer, "reply", listen)
    return exchanges


def files(finished: Run) -> tuple[bytes, bytes]:
    adapter = (finished.folder.adapter_folder / "adapter_model.safetensors").read_bytes()
    return adapter, finished.folder.rounds_file.read_bytes()


@pytest.mark.parametrize("name", methods())
def test_every_method_learns(name: str, tiny_config: Any) -> None:
    ranks = {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5}
    if not methods()[name].mixed_ranks:
        ranks = {"allocation": "uniform", "high": 4}
    finished = run(tiny_config(method=name, ranks=ranks, rounds=12, training=HARD))
    assert finished.result["test"]["accuracy"] > finished.result["constant_score"] + 0.2
    assert [r["round"] for r in finished.records] == list(range(12))
    for record in finished.records:
        assert all(0 <= d < 3 for d in record["deviation"].values())


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=label)
def test_updates_of_every_variant_can_be_serialized(name: str, options: dict[str, Any], tiny_config: Any) -> None:
    """At α = r, tensors enter a message unscaled, so a tensor that a method returns twice is the same object twice."""
    ranks, method = {"allocation": "uniform", "high": 4}, {"name": name, **options}
    finished = run(tiny_config(method=method, ranks=ranks, rounds=3, lora={"alpha": 4}))
    assert len(finished.records) == 3


def test_equal_runs_give_equal_bytes(tiny_config: Any) -> None:
    one, two = run(tiny_config(name="one", method="fedex")), run(tiny_config(name="two", method="fedex"))
    assert files(one) == files(two)


def test_equal_ranks_give_identical_adapters_for_three_methods(tiny_config: Any) -> None:
    results = []
    for name in ("fedit", "zero-padding", "replication"):
        finished = run(tiny_config(name=name, method=name, ranks={"allocation": "uniform", "high": 3}))
        # Broadcasts contain the method's name, and names differ in length.
        records = [{k: v for k, v in record.items() if "bytes" not in k} for record in finished.records]
        results.append((files(finished)[0], records))
    assert results[0] == results[1] == results[2]


def test_the_method_changes_what_clients_upload_in_the_next_round(
    tiny_config: Any, messages: list[tuple[bytes, bytes]]
) -> None:
    uploads = {}
    for name in ("zero-padding", "replication", "fedex"):
        messages.clear()
        run(tiny_config(name=name, method=name, rounds=2))
        uploads[name] = [reply for _, reply in messages]
    first = [replies[:4] for replies in uploads.values()]
    assert first[0] == first[1] == first[2], "round 0 starts from the same model and data"
    second = [b"".join(replies[4:]) for replies in uploads.values()]
    assert len(set(second)) == 3


def test_ffa_clients_never_send_or_receive_A_and_keep_it_frozen(
    tiny_config: Any, messages: list[tuple[bytes, bytes]]
) -> None:
    trained = []
    finished = run(tiny_config(method="ffa"))
    for blob, reply in messages:
        sent, update = Broadcast.from_bytes(blob), ClientUpdate.from_bytes(reply, "sender")
        assert set(sent.factors) == set(update.factors) == {"B"}
        before, after = sent.factors["B"], update.factors["B"]
        assert set(before) == set(after)
        trained.append(any(not torch.equal(after[m], before[m]) for m in before))
    assert all(trained)
    assert all(d < 1e-6 for record in finished.records for d in record["deviation"].values())


def test_recorded_bytes_are_the_sizes_of_the_messages(tiny_config: Any, messages: list[tuple[bytes, bytes]]) -> None:
    finished = run(tiny_config(method="fedex"))
    for i, record in enumerate(finished.records):
        in_round = messages[4 * i : 4 * i + 4]
        for key, blobs in (("bytes_down", [b for b, _ in in_round]), ("bytes_up", [r for _, r in in_round])):
            assert record[key]["total"] == sum(map(len, blobs))
            assert record[key]["patch"] == sum(count_bytes(blob).patch for blob in blobs)
            assert record[key]["heads"] > 0
    assert finished.records[1]["bytes_down"]["patch"] > 0
    assert finished.records[1]["bytes_up"]["patch"] == 0


def test_upload_bytes_grow_in_proportion_to_rank(tiny_config: Any, messages: list[tuple[bytes, bytes]]) -> None:
    run(tiny_config(rounds=1))
    sizes = [count_bytes(reply).adapter for _, reply in messages]
    assert sizes == [2 * sizes[2], 2 * sizes[2], sizes[2], sizes[2]]


def test_each_sampled_client_has_the_servers_base_over_thirty_rounds(
    tiny_config: Any, messages: list[tuple[bytes, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client folds only the patches it is sent, into a base of its own. The server's log is the reference."""
    logs: list[PatchLog] = []
    step = Server.step

    def remember(self: Server, state: ServerState, replies: Any) -> Any:
        logs.append(state.log)
        return step(self, state, replies)

    monkeypatch.setattr(Server, "step", remember)
    config = tiny_config(
        method="fedex",
        rounds=30,
        partition={"kind": "iid", "clients": 6},
        federation={"participation": 0.34},
        training={"steps": 1, "batch_size": 8, "learning_rate": 0.01},
        evaluation={"every": 30},
        data={"source": tiny_config().data.source, "max_length": 16, "evaluation_limit": 5},
    )
    finished = run(config)
    server, clients, missed = PatchedBase(), {}, []
    stream = iter(messages)
    for log, record in zip(logs, finished.records, strict=True):
        server.apply(log.since(server.version))
        for _ in record["clients"]:
            sent = Broadcast.from_bytes(next(stream)[0])
            base = clients.setdefault(sent.client, PatchedBase())
            missed.append(sent.patch.end - base.version)
            assert sent.patch.start == base.version, "a broadcast has exactly the patches that the client lacks"
            base.apply(sent.patch)
            assert base.content_hash() == server.content_hash()
    assert len(clients) == 6
    assert max(missed) > 3, "some client missed several rounds"
    assert server.version >= 25


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_gpt2"])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("method", ["fedex", "fedex, start-relative", "fed-plora", "flora"])
def test_clients_train_on_base_plus_all_patches_plus_their_scaled_product(
    method: Any,
    fixture: str,
    rule: str,
    tiny_config: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare the model at the start of local training with a dense float64 sum of the messages."""
    checked = []
    original: dict[str, torch.Tensor] = {}
    sums: dict[str, torch.Tensor] = {}
    folded = [0]
    sent: list[Broadcast] = []
    reply, train = Trainer.reply, client_module.train

    def dense(product: Any) -> torch.Tensor:
        tensors = {part: tensor.double() for part, tensor in product.tensors.items()}
        return tensors["W"] if "W" in tensors else tensors["U"] @ tensors["V"]

    def listen(self: Trainer, blob: bytes, shard: Any) -> bytes:
        if not original:
            for module, layer in self.model.layers.items():
                weight = layer.get_base_layer().weight.detach().double().clone()
                original[module] = weight.T if layer.fan_in_fan_out else weight
                sums[module] = torch.zeros_like(original[module])
        sent.append(Broadcast.from_bytes(blob))
        for version, patch in sorted(sent[-1].patch.entries.items()):
            if version > folded[0]:
                folded[0] = version
                for module, product in patch.items():
                    sums[module] += dense(product)
        return reply(self, blob, shard)

    def look(model: Any, *arguments: Any, **more: Any) -> float:
        message = sent[-1]
        model.peft.eval()
        for module, layer in model.layers.items():
            n = model.shapes[module][1]
            with torch.no_grad():
                seen = (layer(torch.eye(n)) - layer(torch.zeros(1, n))).T.double()
            base = sums[module] + (dense(message.tail[module]) if module in message.tail else 0)
            pair = message.adapter(model.shapes)[module]
            s = lora_scale(8, message.rank, rule)  # type: ignore[arg-type]
            oracle = original[module] + base + s * pair.B.double() @ pair.A.double()
            assert torch.allclose(seen, oracle, atol=1e-5)
            checked.append(float(base.norm()))
        return train(model, *arguments, **more)

    monkeypatch.setattr(Trainer, "reply", listen)
    monkeypatch.setattr(client_module, "train", look)
    name, _, target = method.partition(", ")
    run(
        tiny_config(
            method={"name": name, "target": target} if target else name,
            model={"name": str(request.getfixturevalue(fixture))},
            lora={"alpha": 8, "scale": rule},
            rounds=4,
            training={"steps": 2, "batch_size": 8, "learning_rate": 0.05},
        )
    )
    assert len(checked) > 16
    assert max(checked) > 1e-3, "patches and tails were not negligible"
    assert any(message.tail for message in sent) == (method in ("fedex, start-relative", "fed-plora"))


def test_the_penalty_of_hetlora_shrinks_the_tail(tiny_config: Any) -> None:
    tails = {}
    for weight in (0.0, 30.0):
        options = {"name": "hetlora", "gamma": 0.5, "penalty_weight": weight, "min_rank": 4}
        finished = run(tiny_config(name=f"penalty-{weight}", method=options, rounds=4))
        state, *_ = load_checkpoint(finished.folder.checkpoint_file)
        tails[weight] = sum(float((pair.B[:, 2:] @ pair.A[2:]).norm()) for pair in state.method.adapter.values())
    assert tails[30.0] < 0.5 * tails[0.0]


def test_a_client_that_diverged_keeps_its_previous_factors(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedSA keeps B at the client, so a NaN in it would stay in the client's model forever."""
    finish = type(make_method("fedsa")).finish
    calls = [0]

    def diverge(self: Any, round: int, start: Any, trained: Any) -> Any:
        calls[0] += 1
        done = finish(self, round, start, trained)
        if calls[0] == 6:
            for pair in done.values():
                pair.A.fill_(float("nan"))
                pair.B.fill_(float("nan"))
        return done

    monkeypatch.setattr(type(make_method("fedsa")), "finish", diverge)
    finished = run(tiny_config(method="fedsa", rounds=3))
    assert [len(record["skipped"]) for record in finished.records] == [0, 1, 0]
    assert finished.result["test"]["loss"] < 10


def test_clients_that_drop_out_are_skipped_with_a_warning(tiny_config: Any) -> None:
    tap = Tap()
    finished = run(tiny_config(rounds=6, federation={"dropout": 0.4}), observer=tap)
    skipped = [client for record in finished.records for client in record["skipped"]]
    assert skipped
    assert len(tap.warnings) == len(skipped)
    assert "dropped out" in tap.warnings[0]
    for record in finished.records:
        assert len(record["clients"]) + len(record["skipped"]) == 4


def poison(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    reply = Trainer.reply

    def spoil(self: Trainer, blob: bytes, shard: Any) -> bytes:
        update = ClientUpdate.from_bytes(reply(self, blob, shard), "sender")
        if update.client == "client-002":
            next(iter(update.factors["B"].values()))[0, 0] = value
        return update.to_bytes()

    monkeypatch.setattr(Trainer, "reply", spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_update_is_skipped_and_the_client_named(
    value: float, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, value)
    tap = Tap()
    finished = run(tiny_config(rounds=2), observer=tap)
    assert all("client-002 skipped: B of module" in warning for warning in tap.warnings)
    assert len(tap.warnings) == 2
    assert "client-002" not in finished.records[0]["clients"]
    assert finished.result["test"]["loss"] < 10


def test_a_poisoned_update_stops_the_run_if_the_setting_is_refuse(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, float("nan"))
    config = tiny_config(federation={"on_bad_update": "refuse"})
    with pytest.raises(FedeltaError, match="client client-002: B of module .* holds NaN or infinite values"):
        run(config)
    assert not (config.folder / "adapter").exists()


@pytest.mark.parametrize("setting", ["skip", "refuse"])
def test_a_damaged_update_follows_the_setting(setting: str, tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = Trainer.reply
    calls = [0]

    def cut(self: Trainer, blob: bytes, shard: Any) -> bytes:
        calls[0] += 1
        return reply(self, blob, shard)[: None if calls[0] != 2 else -9]

    monkeypatch.setattr(Trainer, "reply", cut)
    config = tiny_config(rounds=1, federation={"on_bad_update": setting})
    if setting == "refuse":
        with pytest.raises(FedeltaError, match="client client-001: damaged message"):
            run(config)
    else:
        assert "damaged message" in run(config).records[0]["skipped"]["client-001"]


def test_weights_are_renormalized_over_the_clients_that_replied(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that fails leaves the same model as a client of weight 0."""
    reply = Trainer.reply

    def fail(self: Trainer, blob: bytes, shard: Any) -> bytes:
        if Broadcast.from_bytes(blob).client == "client-003":
            raise RuntimeError("out of memory")
        return reply(self, blob, shard)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "reply", fail)
        failing = run(tiny_config(name="failing", rounds=1))
    weighted = run(tiny_config(name="weighted", rounds=1, federation={"weighting": [*_sizes(failing)[:3], 0]}))
    assert files(failing)[0] == files(weighted)[0]
    assert failing.records[0]["skipped"] == {"client-003": "RuntimeError: out of memory"}


def _sizes(finished: Run) -> list[int]:
    return list(finished.result["clients"].values())


def test_too_few_usable_updates_stop_the_run(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Trainer, blob: bytes, shard: Any) -> bytes:  # noqa: ARG001
        raise RuntimeError("no disk")

    monkeypatch.setattr(Trainer, "reply", fail)
    with pytest.raises(FedeltaError, match="round 0: 0 usable updates, expected at least 1 .*no disk"):
        run(tiny_config())


def test_loss_based_allocation_promotes_the_best_newcomers(tiny_config: Any) -> None:
    config = tiny_config(ranks={"allocation": "loss", "low": 2, "high": 4, "share": 0.5}, rounds=3)
    finished = run(config)
    assert len(finished.records[0]["promoted"]) == 2
    assert finished.records[0]["ranks"] == {"2": 2, "4": 2}
    assert finished.records[1]["promoted"] == []


@pytest.mark.parametrize("allocation", ["uniform", "fixed", "random", "loss"])
def test_every_allocation_runs(allocation: str, tiny_config: Any) -> None:
    ranks = {"allocation": allocation, "low": 2, "high": 4, "share": 0.25}
    finished = run(tiny_config(ranks=ranks, rounds=2, federation=CHURN))
    assert finished.result["rounds"] == 2


def test_a_bf16_base_runs_with_fp32_messages(
    tiny_config: Any, tiny_bert: Path, messages: list[tuple[bytes, bytes]]
) -> None:
    finished = run(tiny_config(method="fedex", model={"name": str(tiny_bert), "dtype": "bfloat16"}))
    for blob, reply in messages:
        sent, update = Broadcast.from_bytes(blob), ClientUpdate.from_bytes(reply, "sender")
        tensors = [
            *sent.factors["A"].values(),
            *sent.heads.values(),
            *update.factors["B"].values(),
            *update.heads.values(),
        ]
        assert {t.dtype for t in tensors} == {torch.float32}
    assert finished.records[-1]["version"] == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_keep_factors_are_evaluated_with_their_own(workers: int, tiny_config: Any) -> None:
    finished = run(tiny_config(method="fedsa", workers=workers))
    checkpoint = load_checkpoint(finished.folder.checkpoint_file)
    trainer, data = assemble.prepare(finished.config)
    server = assemble.make_server(finished.config)
    scores = []
    for adapter in server.personal_adapters(checkpoint.state, checkpoint.kept).values():
        trainer.model.load(adapter, checkpoint.state.heads)
        scores.append(
            evaluate(
                Classification(), trainer.model, trainer.tokenizer, data.test, finished.config.evaluation.batch_size
            )
        )
    assert len({score["loss"] for score in scores}) == len(scores) == 4
    mean = sum(score["loss"] for score in scores) / len(scores)
    assert finished.result["test"]["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_model_that_diverges_raises_one_line(tiny_config: Any) -> None:
    training = {"steps": 2, "batch_size": 8, "learning_rate": 1e25, "max_grad_norm": None, "optimizer": "sgd"}
    with pytest.raises(FedeltaError, match="round 0|updates are too large"):
        run(tiny_config(training=training, federation={"on_bad_update": "skip"}))


def test_the_evaluator_refuses_a_stale_base(tiny_config: Any) -> None:
    finished = run(tiny_config(method="fedex"))
    state, *_ = load_checkpoint(finished.folder.checkpoint_file)
    evaluator = Evaluator.__new__(Evaluator)
    evaluator.trainer = Trainer.__new__(Trainer)
    evaluator.trainer.base = PatchedBase()
    with pytest.raises(FedeltaError, match="base is at version 0, but the server is at version 3"):
        evaluator.evaluate(state, None, "test")  # type: ignore[arg-type]


def test_round_records_have_no_timings_and_timings_have_no_scores(tiny_config: Any) -> None:
    finished = run(tiny_config())
    timing = json.loads(finished.folder.timings_file.read_text().splitlines()[0])
    assert set(timing) == {"round", "seconds", "in_workers", "counts"}
    assert "seconds" not in finished.records[0]


def test_clients_report_the_loss_on_their_held_out_rows(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = Trainer.reply
    differences = []

    def check(self: Trainer, blob: bytes, shard: Any) -> bytes:
        update = reply(self, blob, shard)
        reported = ClientUpdate.from_bytes(update, "sender").metrics["validation_loss"]
        on_held_out, on_trained = (
            evaluate(Classification(), self.model, self.tokenizer, rows, 64)["loss"]
            for rows in (shard.validation, shard.train)
        )
        assert reported == pytest.approx(on_held_out, rel=1e-6)
        differences.append(abs(reported - on_trained))
        return update

    monkeypatch.setattr(Trainer, "reply", check)
    run(tiny_config(ranks={"allocation": "loss", "low": 2, "high": 4, "share": 0.5}, rounds=1))
    assert max(differences) > 1e-3
