"""One server step on handwritten messages."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedelta.errors import BadUpdate, FedeltaError, TooFewUpdates
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
from fedelta.methods import methods
from fedelta.protocol.validation import MAX_NORM
from tiny_server import CLIENTS, SHAPES, make, reply


def step(server: Server, state: ServerState, replies: dict[str, Any]) -> Any:
    return server.step(state, (ClientReply(server.broadcast(state, client), replies[client]) for client in replies))


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("examples", (10 * 1 + 30 * 5) / 40), ("uniform", 3.0), ((0.25, 0.75, 1, 1), 0.25 * 1 + 0.75 * 5)],
)
def test_heads_factors_and_losses_are_averaged_by_the_same_weights(weighting: Any, expected: float) -> None:
    server, state = make(weighting=weighting)
    replies = {
        "a": reply(server, state, "a", 10, 1.0, train_loss=1.0),
        "b": reply(server, state, "b", 30, 5.0, train_loss=5.0),
    }
    after, outcome = step(server, state, replies)
    assert torch.allclose(after.heads["head"], torch.full((3,), expected))
    assert outcome.train_loss == pytest.approx(expected)
    # B starts at zero and has scale 8 / 2 = 4
    assert torch.allclose(after.method.adapter["x"].B, torch.full((5, 2), 4 * expected))
    assert torch.allclose(after.method.adapter["x"].A - state.method.adapter["x"].A, torch.full((2, 4), expected))


def test_only_clients_that_replied_are_recorded_at_the_new_base_version() -> None:
    server, state = make("fedex")
    replies: dict[str, Any] = {c: reply(server, state, c, 10, float(i + 1)) for i, c in enumerate("abc")}
    state, outcome = step(server, state, replies)
    assert (outcome.patch_width, state.log.version) == (4, 1)
    replies = {c: reply(server, state, c, 10, float(i)) for i, c in enumerate("ab")}
    state, outcome = step(server, state, {**replies, "c": TimeoutError("gone"), "d": replace(replies["a"], round=9)})
    assert state.versions == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert outcome.skipped["c"] == "TimeoutError: gone"
    assert "client" in outcome.skipped["d"]
    assert server.broadcast(state, "c").patch.start == 0
    assert server.broadcast(state, "a").patch.start == 1


def test_a_refused_update_stops_the_run_but_a_failed_client_does_not() -> None:
    server, state = make(on_bad_update="refuse")
    good = reply(server, state, "a", 10, 1.0)
    step(server, state, {"a": good, "b": RuntimeError("out of memory")})
    with pytest.raises(BadUpdate, match="client b: damaged"):
        step(server, state, {"a": good, "b": BadUpdate("b", "damaged")})
    with pytest.raises(BadUpdate, match="client b: its update says client a"):
        step(server, state, {"a": good, "b": good})


def test_a_validation_loss_is_requested_once_and_promotes() -> None:
    server, state = make(ranks={"allocation": "loss", "low": 1, "high": 2, "share": 0.25})
    assert all(server.broadcast(state, c).wants_validation for c in CLIENTS)
    replies = {
        c: reply(server, state, c, 10, 1.0, validation_loss=loss) for c, loss in zip("abcd", (3, 1, 2, 4), strict=True)
    }
    after, outcome = step(server, state, replies)
    assert outcome.promoted == ["b"]
    assert after.ranks == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert not any(server.broadcast(after, c).wants_validation for c in CLIENTS)
    # The promoted client's new row has the drawn A and a zero B, so the product stays the same.
    new = server.broadcast(after, "b").adapter(SHAPES)["x"]
    assert torch.equal(new.A[1], state.method.adapter["x"].A[1])
    assert not new.B[:, 1].any()


def test_a_client_that_lowered_its_rank_is_sent_the_new_rank() -> None:
    server, state = make("hetlora", ranks={"high": 4})
    whole = reply(server, state, "a", 10, 1.0)
    lower = {
        "A": {"x": whole.factors["A"]["x"][:3].clone()},
        "B": {"x": whole.factors["B"]["x"][:, :3].clone()},
    }
    after, outcome = step(
        server, state, {"a": replace(whole, rank=3, factors=lower), "b": reply(server, state, "b", 10, 1.0)}
    )
    assert outcome.pruned == ["a"]
    assert after.ranks == {"a": 3, "b": 4, "c": 4, "d": 4}
    assert server.broadcast(after, "a").rank == 3


def test_a_client_of_weight_zero_is_never_sampled() -> None:
    server, state = make(weighting=(1.0, 0.0, 0.0, 1.0), participation=0.5)
    for round_ in range(10):
        now = replace(state, method=replace(state.method, round=round_))
        assert server.sample(now)[0] in ("a", "d")


def test_sampling_is_without_replacement_and_depends_on_the_round() -> None:
    server, state = make(participation=0.5)
    drawn = [tuple(server.sample(replace(state, method=replace(state.method, round=r)))) for r in range(20)]
    assert all(len(set(clients)) == 2 for clients in drawn)
    assert len(set(drawn)) > 3
    assert drawn[0] == tuple(server.sample(state))


def test_a_client_whose_numbers_are_too_large_is_skipped_and_named_and_the_round_continues() -> None:
    server, state = make()
    good = {c: reply(server, state, c, 10, 1.0) for c in "ac"}
    expected, _ = step(server, state, good)
    for value in (3e38, 1e30, 1e8):
        after, outcome = step(server, state, {"b": reply(server, state, "b", 10, value), **good})
        assert outcome.contributors == ["a", "c"]
        assert list(outcome.skipped) == ["b"]
        assert "A of module x has the norm" in outcome.skipped["b"]
        assert torch.equal(after.method.adapter["x"].B, expected.method.adapter["x"].B)


def test_factors_whose_product_is_too_large_are_refused_although_each_is_small_enough() -> None:
    server, state = make()
    bad = replace(
        reply(server, state, "b", 10, 1.0),
        factors={"A": {"x": torch.full((2, 4), 1e6)}, "B": {"x": torch.full((5, 2), 1e6)}},
    )
    _, outcome = step(server, state, {"a": reply(server, state, "a", 10, 1.0), "b": bad})
    assert "B·A of module x may have the norm" in outcome.skipped["b"]


def test_a_run_whose_clients_all_diverge_is_told_apart_from_one_with_bad_clients() -> None:
    server, state = make()
    with pytest.raises(TooFewUpdates) as error:
        step(server, state, {c: reply(server, state, c, 10, 1e30) for c in "ab"})
    assert error.value.diverged


def scaled(server: Server, state: ServerState, client: str, size: float, head: float = 0.0, **metrics: float) -> Any:
    """An update whose A is `size` times what was sent, and whose head is `head`."""
    update = reply(server, state, client, 10, 0.0, **metrics)
    A = {"x": server.broadcast(state, client).adapter(SHAPES)["x"].A * size}
    return replace(update, factors={**update.factors, "A": A}, heads={"head": torch.full((3,), head)})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"size": 1e6}, "the norm of its adapter grew to .* the median of the others is .* (federation.max_growth)"),
        ({"size": 1.0, "head": 1e6}, "the norm of its heads grew to"),
        ({"size": 1.0, "train_loss": 1e20}, "its train_loss is 1.0e+20, the median of the others is 1.0e+00"),
    ],
)
@pytest.mark.parametrize("method", ["replication", "fedex", "hetlora"])
def test_one_client_far_beyond_the_round_is_skipped_whatever_the_order_of_replies(
    bad: Any, reason: str, method: str
) -> None:
    server, state = make(method)
    good = {c: scaled(server, state, c, 1.5, 1.0, train_loss=1.0) for c in "acd"}
    expected, outcome = step(server, state, good)
    assert outcome.train_loss == 1.0
    far = scaled(server, state, "b", **bad)
    for replies in ({"b": far, **good}, {**good, "b": far}):
        after, outcome = step(server, state, replies)
        assert outcome.contributors == ["a", "c", "d"]
        assert all(part in outcome.skipped["b"] for part in reason.split(" .* "))
        assert len(outcome.skipped["b"]) < 250
        assert outcome.train_loss == 1.0
        assert torch.equal(after.method.adapter["x"].A, expected.method.adapter["x"].A)
        assert torch.equal(after.heads["head"], expected.heads["head"])
    strict, state = make(method, on_bad_update="refuse")
    with pytest.raises(BadUpdate, match="client b: "):
        step(strict, state, {"b": far, **good})


def test_clients_that_all_move_far_are_all_used_and_the_limit_is_a_setting() -> None:
    server, state = make()
    far = {c: scaled(server, state, c, size) for c, size in zip("abc", (1e4, 3e4, 5e3), strict=True)}
    assert step(server, state, far)[1].contributors == ["a", "b", "c"]
    server, state = make(max_growth=2.0)
    replies = {c: scaled(server, state, c, size, 0.1) for c, size in zip("abc", (1.9, 1.0, 9.0), strict=True)}
    assert step(server, state, replies)[1].contributors == ["a", "b"]


@pytest.mark.parametrize("name", sorted(methods()))
def test_updates_at_the_largest_norm_give_a_finite_state_under_every_method(name: str) -> None:
    limit = MAX_NORM * 0.99
    for balance in (1.0, limit**0.5, limit):
        server, state = make(name, weighting="examples")
        for round_ in range(2):
            replies = {}
            for i, client in enumerate(CLIENTS):
                sent = server.broadcast(state, client)
                generator = torch.Generator().manual_seed(4 * round_ + i)
                # A frozen A has a norm of its own, at most √2.
                other = limit / (balance if "A" in sent.plan.up else 1.5) / sent.scale
                sizes = {"A": balance, "B": other, "core": other}
                factors = {}
                for factor in sent.plan.up:
                    shape = {"A": (sent.rank, 4), "B": (5, sent.rank), "core": (sent.rank, sent.rank)}[factor]
                    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
                    factors[factor] = {"x": (tensor / tensor.norm() * sizes[factor]).float()}
                update = reply(server, state, client, 10**12 if i else 1, 0.0, train_loss=1e30)
                heads = {"head": torch.full((3,), limit / 2 * (-1) ** i)}
                replies[client] = replace(update, factors=factors, heads=heads)
            try:
                state, outcome = step(server, state, replies)
            except TooFewUpdates:
                # With a frozen factor of this size, all products are too large.
                assert name == "rolora"
                break
            assert len(outcome.contributors) + len(outcome.skipped) == 4
            assert all("norm" in reason for reason in outcome.skipped.values())
            patches = state.log.since(0)
            tensors = [t for pair in state.method.adapter.values() for t in (pair.A, pair.B)]
            tensors += [*state.heads.values(), *state.method.memory.values()]
            tensors += [t for patch in patches.entries.values() for p in patch.values() for t in p.tensors.values()]
            assert all(torch.isfinite(tensor).all() for tensor in tensors)
            numbers = [d for each in outcome.deviation.values() for d in each]
            assert all(map(math.isfinite, [*numbers, *outcome.energy, outcome.train_loss or 0.0]))


def test_a_client_cannot_report_more_examples_than_it_has_rows() -> None:
    server, state = make()
    good = reply(server, state, "a", 10, 1.0)
    replies = [
        ClientReply(server.broadcast(state, "a"), good, rows=10),
        ClientReply(server.broadcast(state, "b"), reply(server, state, "b", 10**12, 1.0), rows=10),
    ]
    _, outcome = server.step(state, replies)
    assert outcome.shares == {"a": 1.0}
    assert outcome.skipped["b"] == (
        "it reports 1000000000000 training examples, expected 1 to 10, the rows that it stated"
    )


def test_the_share_and_the_norms_of_each_client_are_recorded() -> None:
    server, state = make()
    _, outcome = step(server, state, {c: reply(server, state, c, n, 1.0) for c, n in (("a", 30), ("b", 10))})
    assert outcome.shares == {"a": 0.75, "b": 0.25}
    adapter = server.broadcast(state, "a").adapter(SHAPES)["x"]
    factors = torch.cat([(adapter.A + 1).flatten(), 4 * (adapter.B + 1).flatten()])
    assert outcome.norms["a"].adapter == pytest.approx(float(factors.norm()))
    assert outcome.norms["a"].heads == pytest.approx(3**0.5)


def test_too_few_updates_give_the_reasons() -> None:
    server, state = make(min_clients=2)
    with pytest.raises(FedeltaError, match=r"1 usable update, expected at least 2 \(b: RuntimeError: broken\)"):
        step(server, state, {"a": reply(server, state, "a", 1, 1.0), "b": RuntimeError("broken")})
