from dataclasses import replace

import pytest
import torch

from fedelta.adapter import LoraPair, initial_adapter
from fedelta.contribution import receive
from fedelta.errors import BadUpdate, FedeltaError
from fedelta.lowrank import LowRank
from fedelta.messages import Broadcast, ClientUpdate, count_bytes
from fedelta.patch_log import PatchLog

SHAPES = {"x": (6, 4), "y": (5, 5)}


def broadcast(train: str = "AB", seed_A: int | None = None) -> Broadcast:
    adapter = initial_adapter(SHAPES, 2, seed=3).map(lambda p: LoraPair(p.A, p.B + 1))
    log = PatchLog(SHAPES).append({"x": LowRank(torch.ones(6, 3), torch.ones(3, 4))})
    return Broadcast(
        client="client-001",
        round=4,
        rank=2,
        scale=8.0,
        train=frozenset(train),
        A={} if seed_A is not None else {m: p.A for m, p in adapter.items()},
        B={m: p.B for m, p in adapter.items()},
        heads={"head.weight": torch.ones(3, 5)},
        patch=log.since(0),
        seed_A=seed_A,
        wants_validation=True,
    )


def answer(sent: Broadcast) -> ClientUpdate:
    adapter = sent.adapter(SHAPES)
    return ClientUpdate(
        client=sent.client,
        round=sent.round,
        rank=sent.rank,
        scale=sent.scale,
        version=sent.patch.end,
        digest=sent.patch.digests[sent.patch.end],
        examples=10,
        A={m: p.A + 0.5 for m, p in adapter.items()} if "A" in sent.train else {},
        B={m: p.B + 0.5 for m, p in adapter.items()} if "B" in sent.train else {},
        heads={name: t + 1 for name, t in sent.heads.items()},
        metrics={"train_loss": 1.5},
    )


@pytest.mark.parametrize("seed_A", [None, 3])
def test_a_broadcast_survives_the_wire(seed_A: int | None) -> None:
    sent = broadcast(seed_A=seed_A)
    got = Broadcast.from_bytes(sent.to_bytes())
    assert (got.client, got.round, got.rank, got.scale, got.train) == ("client-001", 4, 2, 8.0, sent.train)
    assert got.wants_validation
    assert got.seed_A == seed_A
    for module, pair in sent.adapter(SHAPES).items():
        assert torch.equal(got.adapter(SHAPES)[module].A, pair.A)
        assert torch.equal(got.adapter(SHAPES)[module].B, pair.B)
    assert torch.equal(got.patch.entries[1]["x"].U, sent.patch.entries[1]["x"].U)
    assert got.patch.digests == sent.patch.digests
    assert sent.to_bytes() == got.to_bytes()


def test_an_update_survives_the_wire() -> None:
    update = answer(broadcast())
    got = ClientUpdate.from_bytes(update.to_bytes(), "sender")
    assert got.metrics == {"train_loss": 1.5}
    assert torch.equal(got.B["y"], update.B["y"])
    assert got.to_bytes() == update.to_bytes()


def test_bytes_are_counted_by_content_and_add_up_to_the_message() -> None:
    blob = broadcast().to_bytes()
    count = count_bytes(blob)
    assert count.adapter == 4 * 2 * (6 + 4 + 5 + 5)
    assert count.heads == 4 * 15
    assert count.patch == 4 * 3 * (6 + 4)
    assert count.total == len(blob)


def test_a_frozen_drawn_A_is_not_on_the_wire() -> None:
    assert count_bytes(broadcast(seed_A=3).to_bytes()).adapter == 4 * 2 * (6 + 5)


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_a_truncated_message_is_refused(cut: int) -> None:
    with pytest.raises(FedeltaError, match="truncated|damaged"):
        Broadcast.from_bytes(broadcast().to_bytes()[:cut])


def test_a_tensor_that_nothing_reads_is_refused() -> None:
    update = answer(broadcast())
    blob = replace(update, heads={**update.heads}).to_bytes()
    with pytest.raises(FedeltaError, match="holds tensors that nothing reads: patch"):
        ClientUpdate.from_bytes(blob.replace(b"head/head.weight", b"patch/ad.weights"), "sender")


def test_the_door_lets_a_good_update_in_with_frozen_factors_filled_in() -> None:
    sent = broadcast(train="B", seed_A=3)
    got = receive(answer(sent), sent, SHAPES)
    assert got.weight == 10
    assert torch.equal(got.adapter["x"].A, sent.adapter(SHAPES)["x"].A)
    assert got.adapter["x"].scale == 8.0


def bad(**changes: object) -> ClientUpdate:
    return replace(answer(broadcast()), **changes)  # type: ignore[arg-type]


good = answer(broadcast())
nan = torch.full((6, 2), float("nan"))


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (bad(client="client-002"), "its update says client client-002, expected client-001"),
        (bad(round=3), "round 3, expected 4"),
        (bad(rank=4), "rank 4, expected 2"),
        (bad(scale=1.0), "scale 1.0, expected 8.0"),
        (bad(version=0), "base version 0, expected 1"),
        (bad(digest="00"), "base version 1, expected 1"),
        (bad(examples=0), "reports 0 training examples"),
        (bad(B={**good.B, "x": nan}), "B of module x holds NaN or infinite values"),
        (bad(B={**good.B, "x": nan.nan_to_num(1) / 0}), "B of module x holds NaN or infinite values"),
        (bad(B={**good.B, "x": torch.ones(4, 2)}), r"B of module x is torch.float32 \(4, 2\), expected .* \(6, 2\)"),
        (bad(B={"x": good.B["x"]}), "B of module y is missing"),
        (bad(A={**good.A, "z": good.A["x"]}), "A of module z was not asked for"),
        (bad(metrics={"train_loss": float("nan")}), "reports train_loss nan, expected a finite number"),
        (bad(metrics={"train_loss": "low"}), "reports train_loss 'low'"),
        (bad(heads={}), "head head.weight is missing"),
        (bad(heads={"head.weight": nan}), r"head head.weight is .* \(6, 2\), expected .* \(3, 5\)"),
        (bad(A={m: t.half() for m, t in good.A.items()}), "torch.float16"),
    ],
)
def test_the_door_refuses_with_the_reason(update: ClientUpdate, reason: str) -> None:
    with pytest.raises(BadUpdate, match=f"client client-001: .*{reason}"):
        receive(update, broadcast(), SHAPES)


def test_the_door_refuses_a_factor_that_was_frozen() -> None:
    sent = broadcast(train="B")
    with pytest.raises(BadUpdate, match="it sent A, which was frozen"):
        receive(replace(answer(sent), A=good.A), sent, SHAPES)


def test_a_large_sum_that_overflows_is_not_taken_for_infinity() -> None:
    huge = {**good.B, "x": torch.full((6, 2), 3e38)}
    assert receive(bad(B=huge), broadcast(), SHAPES).weight == 10


def test_a_broadcast_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(FedeltaError, match="differ in adapted modules"):
        broadcast().adapter({"x": (6, 4)})
    with pytest.raises(FedeltaError, match="module y: .* does not fit a 7×5 layer"):
        broadcast().adapter({"x": (6, 4), "y": (7, 5)})
