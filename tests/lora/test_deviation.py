"""The deviation that runs log, against dense matrices."""

import pytest
import torch
from hypothesis import given

from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.contribution import Contribution
from fedelta.lora.deviation import deviation
from fedelta.lora.rank_moments import RankMoments
from fedelta.methods import make_method
from federations import Federation, federations, start, state_of, train, updates


def measure(previous: Adapter, contributions: list[Contribution]) -> dict[str, float]:
    deviations = deviation(RankMoments(previous, contributions, "total"))
    return {module: each.relative for module, each in deviations.items()}


@given(federation=federations())
def test_deviation_is_the_relative_frobenius_distance_of_mean_product_and_product_of_means(
    federation: Federation,
) -> None:
    """Clients are padded with the contributors' means, as in replication."""
    method = make_method("replication")
    state = start(method, federation)
    trained = updates(train(method, state, federation))
    after, _ = method.step(state, trained)
    deviations = deviation(RankMoments(state.adapter, trained, "total"))
    for module, pair in after.adapter.items():
        exact = torch.zeros(pair.shape, dtype=torch.float64)
        for p, client in zip(federation.p, trained, strict=True):
            own = client.adapter[module]
            B, A = pair.B.clone(), pair.A.clone()
            B[:, : own.rank], A[: own.rank] = own.scale * own.B, own.A
            exact += p * B @ A
        off = float((exact - pair.B @ pair.A).norm())
        assert deviations[module].relative == pytest.approx(off / float(exact.norm()), rel=1e-6, abs=1e-9)
        assert deviations[module].scaled == pytest.approx(off / exact.numel() ** 0.5, rel=1e-6, abs=1e-9)


def test_deviation_of_one_client_and_of_a_shared_A_is_zero() -> None:
    for name, federation in (
        ("fedit", Federation([3], [2.0], [1.0], 3, 0)),
        ("ffa", Federation([3, 3], [2.0, 1.0], [1.0, 3.0], 3, 0)),
    ):
        method = make_method(name)
        state = start(method, federation)
        assert max(measure(state.adapter, updates(train(method, state, federation))).values()) < 1e-12


def test_a_deviation_far_below_fp32_rounding_is_still_measured() -> None:
    federation = Federation([3, 3], [1.0, 1.0], [1.0, 1.0], 3, 0)
    method = make_method("fedit")
    state = state_of(method, 3)
    deviations = measure(state.adapter, updates(train(method, state, federation, size=1e-6)))
    assert all(1e-16 < value < 1e-10 for value in deviations.values())


def test_deviation_is_zero_where_nothing_was_trained() -> None:
    state = make_method("fedit").start({"x": (4, 3)}, 2, 0)
    unchanged = [Contribution(name, 1.0, state.adapter.map(lambda p: LoraPair(p.A, p.B))) for name in "ab"]
    assert measure(state.adapter, unchanged) == {"x": 0.0}
