"""Messages keep their content, and the server refuses an update that does not fit its broadcast."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedelta.errors import BadUpdate, FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, draw_basis, initial_adapter
from fedelta.lora.lowrank import Dense, LowRank
from fedelta.lora.patch_log import PatchLog
from fedelta.protocol.factor_plan import FactorPlan, select_factors
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fedelta.protocol.serialization import count_bytes, pack, show, unpack
from fedelta.protocol.validation import receive

SHAPES = {"x": (6, 4), "y": (5, 5)}


SEED = 3
PLANS = {
    "both": FactorPlan(),
    "A drawn and frozen": FactorPlan(down=frozenset("B"), train=frozenset("B"), up=frozenset("B")),
    "B kept": FactorPlan(down=frozenset("A"), up=frozenset("A"), keep=frozenset("B")),
    "restart": FactorPlan(down=frozenset()),
    "core": FactorPlan(down=frozenset({"core"}), train=frozenset({"core"}), up=frozenset({"core"})),
}


def start_adapter(plan: FactorPlan) -> Adapter:
    drawn = initial_adapter(SHAPES, 2, SEED)
    if "core" in plan.down:
        return drawn.map(lambda p: LoraPair(p.A, draw_basis_of(p) @ torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
    return drawn.map(lambda p: LoraPair(p.A, p.B + 1)) if "B" in plan.down else drawn


def draw_basis_of(pair: LoraPair) -> torch.Tensor:
    (module,) = [m for m, shape in SHAPES.items() if shape == pair.shape]
    return draw_basis(module, pair.shape[0], pair.rank, SEED)


def broadcast(plan: FactorPlan = PLANS["both"], tail: bool = False) -> Broadcast:
    log = PatchLog(SHAPES).append({"x": LowRank(torch.ones(6, 1), torch.ones(1, 4)), "y": Dense(torch.ones(5, 5))})
    return Broadcast(
        client="client-001",
        round=4,
        rank=2,
        scale=8.0,
        method={"name": "replication", "options": {"refresh": 3}},
        plan=plan,
        factors=select_factors(start_adapter(plan), plan.down, SEED),
        seed=SEED,
        heads={"head.weight": torch.ones(3, 5)},
        patch=log.since(0),
        tail={"y": LowRank(torch.ones(5, 1), torch.ones(1, 5))} if tail else {},
        indices=(1, 3) if tail else None,
        wants_validation=True,
    )


def update_for(sent: Broadcast, shift: float = 0.5) -> ClientUpdate:
    factors = select_factors(sent.adapter(SHAPES), sent.plan.up, SEED)
    return ClientUpdate(
        client=sent.client,
        round=sent.round,
        rank=sent.rank,
        scale=sent.scale,
        version=sent.patch.end,
        digest=sent.patch.digests[sent.patch.end],
        examples=10,
        factors={name: {m: t + shift for m, t in by_module.items()} for name, by_module in factors.items()},
        heads={name: t + 1 for name, t in sent.heads.items()},
        metrics={"train_loss": 1.5},
    )


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_broadcast_survives_serialization(plan: FactorPlan, tail: bool) -> None:
    sent = broadcast(plan, tail)
    got = Broadcast.from_bytes(sent.to_bytes())
    for name in ("client", "round", "rank", "scale", "method", "plan", "seed", "indices", "wants_validation"):
        assert getattr(got, name) == getattr(sent, name)
    assert set(got.factors) == plan.down
    for module, pair in sent.adapter(SHAPES).items():
        assert torch.equal(got.adapter(SHAPES)[module].A, pair.A)
        assert torch.equal(got.adapter(SHAPES)[module].B, pair.B)
    assert torch.equal(got.patch.entries[1]["x"].U, sent.patch.entries[1]["x"].U)
    assert torch.equal(got.patch.entries[1]["y"].W, sent.patch.entries[1]["y"].W)
    assert set(got.tail) == set(sent.tail)
    assert got.patch.digests == sent.patch.digests
    assert sent.to_bytes() == got.to_bytes()


def test_a_factor_that_is_not_sent_is_drawn_zero_or_kept() -> None:
    drawn = initial_adapter(SHAPES, 2, SEED)
    fresh = broadcast(PLANS["restart"]).adapter(SHAPES)
    assert torch.equal(fresh["x"].A, drawn["x"].A)
    assert not fresh["x"].B.any()
    sent = broadcast(PLANS["B kept"])
    assert not sent.adapter(SHAPES)["x"].B.any()
    kept = drawn.map(lambda p: LoraPair(p.A, p.B + 2, 4.0))
    assert torch.allclose(sent.adapter(SHAPES, kept)["x"].B, torch.full((6, 2), 1.0)), "the product is unchanged"
    smaller = kept.truncate(1)
    promoted = sent.adapter(SHAPES, smaller)["x"].B
    assert torch.allclose(promoted, torch.tensor([1.0, 0.0]).expand(6, 2))


def test_a_plan_with_cores_sends_cores_alone() -> None:
    sent = broadcast(PLANS["core"])
    assert count_bytes(sent.to_bytes()).adapter == 2 * 4 * 4
    got = receive(update_for(sent), sent, SHAPES)
    core = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 0.5
    assert torch.allclose(got.adapter["x"].B, draw_basis("x", 6, 2, SEED) @ core, atol=1e-6)


def test_a_tail_counts_as_adapter() -> None:
    with_tail, without = (count_bytes(broadcast(tail=tail).to_bytes()).adapter for tail in (True, False))
    assert with_tail - without == 4 * (5 + 5)


def test_a_client_that_may_prune_itself_sends_a_lower_rank() -> None:
    sent = broadcast(FactorPlan(prune=True))
    update = update_for(sent)
    lower = {
        "A": {m: t[:1] for m, t in update.factors["A"].items()},
        "B": {m: t[:, :1] for m, t in update.factors["B"].items()},
    }
    got = receive(replace(update, rank=1, factors=lower), sent, SHAPES)
    assert got.adapter.rank == 1
    for rank in (0, 3):
        with pytest.raises(BadUpdate, match=f"its update says rank {rank}, expected 1 to 2"):
            receive(replace(update, rank=rank), sent, SHAPES)


def test_contributions_have_the_rank_indices_of_their_broadcast() -> None:
    sent = broadcast(tail=True)
    assert receive(update_for(sent), sent, SHAPES).indices.tolist() == [1, 3]


def test_an_update_survives_serialization() -> None:
    update = update_for(broadcast())
    got = ClientUpdate.from_bytes(update.to_bytes(), "sender")
    assert got.metrics == {"train_loss": 1.5}
    assert torch.equal(got.factors["B"]["y"], update.factors["B"]["y"])
    assert got.to_bytes() == update.to_bytes()


def test_bytes_are_counted_by_content_and_add_up_to_the_message() -> None:
    blob = broadcast().to_bytes()
    count = count_bytes(blob)
    assert count.adapter == 4 * 2 * (6 + 4 + 5 + 5)
    assert count.heads == 4 * 15
    assert count.patch == 4 * (6 + 4) + 4 * 25
    assert count.total == len(blob)


def test_a_frozen_drawn_A_is_not_sent() -> None:
    assert count_bytes(broadcast(PLANS["A drawn and frozen"]).to_bytes()).adapter == 4 * 2 * (6 + 5)


@pytest.mark.parametrize("cut", [3, 40, -1])
def test_a_truncated_message_is_refused(cut: int) -> None:
    with pytest.raises(FedeltaError, match="truncated|damaged"):
        Broadcast.from_bytes(broadcast().to_bytes()[:cut])


def test_an_unexpected_tensor_is_refused() -> None:
    update = update_for(broadcast())
    blob = replace(update, heads={**update.heads}).to_bytes()
    with pytest.raises(FedeltaError, match="update has unexpected tensors: patch"):
        ClientUpdate.from_bytes(blob.replace(b"head/head.weight", b"patch/ad.weights"), "sender")


def test_a_valid_update_is_accepted_and_its_frozen_factors_are_filled_in() -> None:
    sent = broadcast(PLANS["A drawn and frozen"])
    got = receive(update_for(sent), sent, SHAPES)
    assert got.weight == 10
    assert torch.equal(got.adapter["x"].A, sent.adapter(SHAPES)["x"].A)
    assert got.adapter["x"].scale == 8.0


def bad(**changes: object) -> ClientUpdate:
    for factor in {"A", "B"} & set(changes):
        changes["factors"] = {**good.factors, factor: changes.pop(factor)}
    return replace(update_for(broadcast()), **changes)  # type: ignore[arg-type]


good = update_for(broadcast())
nan = torch.full((6, 2), float("nan"))


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (bad(client="client-002"), "its update says client client-002, expected client-001"),
        (bad(round=3), "round 3, expected 4"),
        (bad(rank=4), "rank 4, expected 2"),
        (bad(scale=1.0), "scale 1.0, expected 8.0"),
        (bad(version=0), "base version 0, expected 1"),
        (bad(digest="00"), "base version 1 of another history, expected 1"),
        (bad(examples=0), "reports 0 training examples"),
        (bad(B={**good.factors["B"], "x": nan}), "B of module x holds NaN or infinite values"),
        (bad(B={**good.factors["B"], "x": nan.nan_to_num(1) / 0}), "B of module x holds NaN or infinite values"),
        (
            bad(B={**good.factors["B"], "x": torch.ones(4, 2)}),
            r"B of module x is torch.float32 \(4, 2\), expected .* \(6, 2\)",
        ),
        (bad(B={"x": good.factors["B"]["x"]}), "B of module y is missing"),
        (bad(A={**good.factors["A"], "z": good.factors["A"]["x"]}), "A of module z was not requested"),
        (bad(metrics={"train_loss": float("nan")}), "reports train_loss nan, expected a finite number"),
        (bad(metrics={"train_loss": 1e308}), "reports train_loss 1e"),
        (bad(metrics={"train_loss": -1.0}), "reports train_loss -1.0, expected a finite number from 0 to 1e"),
        (bad(metrics={"accuracy": 1.0}), "reports 'accuracy', expected only train_loss and validation_loss"),
        (bad(heads={"head.weight": torch.full((3, 5), 1e30)}), "head head.weight has the norm 3.9e\\+30"),
        (bad(heads={}), "head head.weight is missing"),
        (bad(heads={"head.weight": nan}), r"head head.weight is .* \(6, 2\), expected .* \(3, 5\)"),
        (bad(A={m: t.half() for m, t in good.factors["A"].items()}), "torch.float16"),
    ],
)
def test_an_update_that_does_not_fit_its_broadcast_is_refused_with_the_reason(
    update: ClientUpdate, reason: str
) -> None:
    with pytest.raises(BadUpdate, match=f"client client-001: .*{reason}"):
        receive(update, broadcast(), SHAPES)


INTEGER, NUMBER = "of its update: input should be a whole number", "of its update: input should be a number"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rank", "1", f"rank {INTEGER}, found '1'"),
        ("rank", True, f"rank {INTEGER}, found True"),
        ("examples", 2.5, f"examples {INTEGER}, found 2.5"),
        ("client", None, "client of its update: input should be a valid string, found None"),
        ("precision", "int4", "precision of its update: input should be 'float32', .* found 'int4'"),
        ("metrics", [1], r"metrics of its update: input should be keys and values, found \[1\]"),
        ("metrics", {"train_loss": "low"}, f"metrics.train_loss {NUMBER}, found 'low'"),
        ("metrics", {"train_loss": 10**400}, f"metrics.train_loss {NUMBER}, found 1000"),
        ("rounds", 1, "rounds of its update: unexpected keyword argument, found 1"),
        ("round", ..., "round of its update: field required, found None"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_its_name(field: str, value: Any, reason: str) -> None:
    tensors, facts = unpack(good.to_bytes())
    facts = {name: each for name, each in (facts | {field: value}).items() if each is not ...}
    with pytest.raises(BadUpdate, match=f"client sender: field {reason}") as refusal:
        ClientUpdate.from_bytes(pack(tensors, facts), "sender")
    assert len(refusal.value.reason.splitlines()) == 1
    assert len(refusal.value.reason) < 200


def test_a_number_that_is_too_long_to_print_does_not_hide_its_refusal() -> None:
    assert show(10**9999) == "a int that is too long to print"


def test_a_factor_that_was_frozen_is_refused() -> None:
    sent = broadcast(PLANS["A drawn and frozen"])
    with pytest.raises(BadUpdate, match="its update has the factors A, B, expected B"):
        receive(replace(update_for(sent), factors=good.factors), sent, SHAPES)


def test_a_tensor_whose_norm_overflows_is_not_taken_for_infinite() -> None:
    huge = {**good.factors["B"], "x": torch.full((6, 2), 3e38)}
    with pytest.raises(BadUpdate, match=r"B of module x has the norm 1.0e\+39, expected at most 1e\+08"):
        receive(bad(B=huge), broadcast(), SHAPES)


def test_a_broadcast_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(FedeltaError, match="differ in adapted modules: only the broadcast has y"):
        broadcast().adapter({"x": (6, 4)})
    with pytest.raises(FedeltaError, match="module y: .* does not fit a 7×5 layer"):
        broadcast().adapter({"x": (6, 4), "y": (7, 5)})
