"""Server and clients agree on the patched base bit for bit, and a base of another history is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.lora.lowrank import LowRank
from fedelta.lora.patch_log import PatchedBase, PatchLog

SHAPES = {"a": (12, 9), "b": (7, 7)}


def patch(seed: int, width: int, modules: str = "ab") -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        m: LowRank(
            torch.randn(SHAPES[m][0], width, generator=generator), torch.randn(width, SHAPES[m][1], generator=generator)
        )
        for m in modules
    }


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=12), st.booleans())
def test_a_base_that_missed_rounds_gets_the_servers_bits(rounds: list[tuple[int, int]], factors: bool) -> None:
    """One of three clients takes part in each round. Widths vary, so that both forms of a delta occur."""
    log = PatchLog(SHAPES)
    limit = log.dense_nbytes if factors else 0
    clients = [PatchedBase(limit) for _ in range(3)]
    oracle = {m: torch.zeros(shape, dtype=torch.float64) for m, shape in SHAPES.items()}
    always = PatchedBase(limit)
    for i, (client, width) in enumerate(rounds):
        log = log.append(patch(i, width))
        for m, p in patch(i, width).items():
            oracle[m] += p.U.double() @ p.V.double()
        always.apply(log.since(always.version))
        clients[client].apply(log.since(clients[client].version))
        assert clients[client].content_hash() == always.content_hash()
    assert bool(always.entries) == (factors and log.total is None), "factors are kept until the server sums as well"
    for m, product in always.patches().items():
        C = torch.zeros(SHAPES[m])
        product.add_to(C)
        assert torch.allclose(C.double(), oracle[m], atol=1e-4)
    tail = {"a": patch(99, 2)["a"]}
    C = torch.zeros(SHAPES["a"])
    always.patches(tail)["a"].add_to(C)
    assert torch.allclose(C.double(), oracle["a"] + tail["a"].U.double() @ tail["a"].V.double(), atol=1e-4)


def test_the_smaller_form_is_sent_and_the_log_stays_bounded() -> None:
    log = PatchLog(SHAPES)
    for i in range(30):
        log = log.append(patch(i, 2))
        stored = sum(p.nbytes for entry in log.entries.values() for p in entry.values())
        assert stored <= log.dense_nbytes
    one, all_ = log.since(29), log.since(0)
    assert one.total is None
    assert list(one.entries) == [30]
    assert all_.total is not None
    assert not all_.entries


def test_a_client_that_already_has_a_version_skips_it() -> None:
    log = PatchLog(SHAPES).append(patch(0, 1)).append(patch(1, 1))
    base = PatchedBase()
    base.apply(log.since(0))
    before = base.content_hash()
    assert not base.apply(log.since(0))
    log = log.append(patch(2, 1))
    assert base.apply(log.since(1))
    assert base.content_hash() != before


def test_a_gap_is_refused_and_the_base_does_not_change() -> None:
    log = PatchLog(SHAPES).append(patch(0, 1)).append(patch(1, 1))
    base = PatchedBase()
    with pytest.raises(FedeltaError, match="this base is at version 0, the patch goes from version 1 to 2"):
        base.apply(log.since(1))
    assert base.total == {}


def test_another_history_of_the_same_length_is_refused() -> None:
    base = PatchedBase()
    base.apply(PatchLog(SHAPES).append(patch(5, 1)).since(0))
    other = PatchLog(SHAPES).append(patch(6, 1)).append(patch(7, 1))
    with pytest.raises(FedeltaError, match="another history"):
        base.apply(other.since(1))


def test_a_round_without_a_patch_adds_no_version() -> None:
    log = PatchLog(SHAPES)
    assert log.append({}).version == 0


def test_a_version_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FedeltaError, match="base version 3 does not exist; the server is at version 0"):
        PatchLog(SHAPES).since(3)
