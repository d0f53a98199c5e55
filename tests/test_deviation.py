"""The deviation in the log against dense matrices, with clients padded as each method pads them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.deviation import deviation
from fedelta.methods import make_method, methods
from federation import Federation, contributions, federations, start, train


@pytest.mark.parametrize("name", methods())
@given(data=st.data())
def test_deviation_is_the_relative_frobenius_distance_of_mean_product_and_product_of_means(
    name: str, data: st.DataObject
) -> None:
    method = make_method(name)
    federation = data.draw(federations(method.mixed_ranks))
    state = start(method, federation)
    trained = train(method, state, federation)
    after, _ = method.aggregate(state, trained)
    absent = method.absent(state, after)
    found = deviation(trained, after.adapter, absent)
    for module, pair in after.adapter.items():
        exact = torch.zeros(pair.shape, dtype=torch.float64)
        for p, client in zip(federation.p, trained, strict=True):
            mine = client.adapter[module]
            for j in range(federation.largest):
                nobody = all(r <= j for r in federation.ranks)
                if mine.rank > j:
                    exact += p * mine.scale * torch.outer(mine.B[:, j], mine.A[j])
                elif absent is not None:
                    exact += p * torch.outer(absent[module].B[:, j], absent[module].A[j])
                elif nobody:
                    exact += p * torch.outer(pair.B[:, j], pair.A[j])
        expected = float((exact - pair.B @ pair.A).norm() / exact.norm())
        assert found[module] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_deviation_of_one_client_and_of_a_shared_A_is_zero() -> None:
    alone = Federation([3], [2.0], [1.0], 3, 0)
    method = make_method("fedit")
    state = start(method, alone)
    trained = train(method, state, alone)
    after, _ = method.aggregate(state, trained)
    assert max(deviation(trained, after.adapter, after.adapter).values()) < 1e-12
    several = Federation([3, 3], [2.0, 1.0], [1.0, 3.0], 3, 0)
    ffa = make_method("ffa")
    state = start(ffa, several)
    trained = train(ffa, state, several)
    after, _ = ffa.aggregate(state, trained)
    assert max(deviation(trained, after.adapter, ffa.absent(state, after)).values()) < 1e-12


def test_deviation_is_zero_where_nothing_was_trained() -> None:
    federation = Federation([2, 2], [1.0, 1.0], [1.0, 1.0], 2, 0)
    method = make_method("fedit")
    state = method.start({"x": (4, 3)}, 2, 0)
    unchanged = contributions(federation, [state.adapter, state.adapter])
    assert deviation(unchanged, state.adapter, None) == {"x": 0.0}
