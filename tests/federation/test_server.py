"""One server step on handwritten messages."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedelta.errors import BadUpdate, FedeltaError
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
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


def test_updates_whose_mean_overflows_stop_the_run() -> None:
    server, state = make()
    replies = {c: reply(server, state, c, 10, 3e38) for c in "ab"}
    with pytest.raises(FedeltaError, match="round 0: the mean of module x is not finite"):
        step(server, state, replies)


def test_too_few_updates_give_the_reasons() -> None:
    server, state = make(min_clients=2)
    with pytest.raises(FedeltaError, match=r"1 usable update, expected at least 2 \(b: RuntimeError: broken\)"):
        step(server, state, {"a": reply(server, state, "a", 1, 1.0), "b": RuntimeError("broken")})
