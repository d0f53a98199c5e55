"""Damaged and hostile messages: a server and a site take what is right and refuse the rest."""

import copy
import json
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import BadUpdate, FedeltaError, TooFewUpdates
from fedelta.federation.reply import ClientReply
from fedelta.federation.server import Server, ServerState
from fedelta.protocol.messages import Broadcast, ClientUpdate
from fuzzing import check_line, damaged_bytes, fuzz, json_text, numbers, refused, values
from tiny_server import SHAPES, make, reply

SERVER, STATE = make("fedex", min_clients=2)


@st.composite
def changed_message(draw: st.DrawFn, blob: bytes) -> bytes:
    """A message with other bytes, other facts or other tensors."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(blob))
    tensors = safetensors.torch.load(blob)
    length = int.from_bytes(blob[:8], "little")
    facts = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["fedelta"])
    if draw(st.booleans()):
        at = facts
        key = draw(st.sampled_from([*facts, "unknown"]))
        while isinstance(at.get(key), dict) and at[key] and draw(st.booleans()):
            at = at[key]
            key = draw(st.sampled_from([*at, "unknown"]))
        at[key] = draw(values())
    else:
        name = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(["value", "dtype", "shape", "drop", "rename"]))
        tensor = tensors.pop(name)
        if kind == "value":
            tensors[name] = tensor.double().mul(float(draw(numbers()))).to(tensor.dtype)
        elif kind == "dtype":
            kinds = [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64]
            tensors[name] = tensor.to(draw(st.sampled_from(kinds)))
        elif kind == "shape":
            tensors[name] = torch.zeros(draw(st.sampled_from([(0,), (), (5, 0), (1, 4), (100, 4)])))
        elif kind == "rename":
            tensors[draw(st.sampled_from(["A/y", "B", "tail/x/U", "/", "patch/0/x/U", "head/é\x1b"]))] = tensor
    return safetensors.torch.save(tensors, {"fedelta": json_text(facts)})


def one_round(server: Server, state: ServerState, updates: dict[str, Any]) -> tuple[ServerState, Any]:
    return server.step(state, (ClientReply(server.broadcast(state, client), updates[client]) for client in updates))


def honest(server: Server, state: ServerState) -> dict[str, Any]:
    return {c: reply(server, state, c, 10, 0.1 * (i + 1)) for i, c in enumerate("abc")}


def same(left: ServerState, right: ServerState) -> bool:
    pairs = [(left.method.adapter["x"].A, right.method.adapter["x"].A), (left.heads["head"], right.heads["head"])]
    pairs += [(left.method.adapter["x"].B, right.method.adapter["x"].B)]
    return all(torch.equal(a, b) for a, b in pairs)


@fuzz(examples=150)
@given(data=st.data())
def test_a_damaged_update_is_dropped_or_its_client_stays_within_its_share(data: st.DataObject) -> None:
    """Whatever one client of four sends, the others' round is finished and finite, and it is named if it is dropped."""
    blob = reply(SERVER, STATE, "d", 10, 0.4, train_loss=1.0).to_bytes()
    damaged = data.draw(changed_message(blob))
    update = refused("updates", lambda: ClientUpdate.from_bytes(damaged, "d"), BadUpdate)
    others = honest(SERVER, STATE)
    after, result = one_round(SERVER, STATE, {**others, "d": update})
    if "d" in result.skipped:
        check_line(result.skipped["d"])
        assert same(after, one_round(SERVER, STATE, others)[0])
    for tensor in (after.method.adapter["x"].A, after.method.adapter["x"].B, after.heads["head"]):
        assert bool(torch.isfinite(tensor).all())
    assert result.train_loss is None or abs(result.train_loss) <= 1e30


@fuzz(examples=60)
@given(numbers(), numbers(), numbers())
def test_numbers_of_any_size_in_an_update_do_not_end_the_round(value: Any, examples: Any, loss: Any) -> None:
    others = honest(SERVER, STATE)
    update = reply(SERVER, STATE, "d", 10, 0.4)
    tensors = {
        name: {m: torch.full_like(t, float(value), dtype=torch.float64).float() for m, t in part.items()}
        for name, part in update.factors.items()
    }
    try:
        hostile = replace(update, examples=examples, factors=tensors, metrics={"train_loss": loss})
    except Exception:
        return
    after, result = one_round(SERVER, STATE, {**others, "d": hostile})
    for tensor in (after.method.adapter["x"].A, after.method.adapter["x"].B, after.heads["head"]):
        assert bool(torch.isfinite(tensor).all())
    if "d" in result.skipped:
        assert same(after, one_round(SERVER, STATE, others)[0])


@fuzz(examples=150)
@given(data=st.data())
def test_a_damaged_broadcast_is_refused_in_one_line(data: st.DataObject) -> None:
    state, _ = one_round(SERVER, STATE, honest(SERVER, STATE))
    blob = SERVER.broadcast(copy.copy(state), "d").to_bytes()
    damaged = data.draw(changed_message(blob))

    def receive() -> Any:
        return Broadcast.from_bytes(damaged).adapter(SHAPES)

    found = refused("broadcasts", receive, FedeltaError)
    assert not isinstance(found, TooFewUpdates)
