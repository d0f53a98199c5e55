import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.lowrank import LowRank


def product(m: int, n: int, q: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(m, q, generator=generator, dtype=dtype), torch.randn(q, n, generator=generator, dtype=dtype)
    )


def dense(p: LowRank) -> torch.Tensor:
    return p.U.double() @ p.V.double()


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12))


@given(sizes, sizes)
def test_sum_stacks_factors(one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
    m, n, q = one
    a, b = product(m, n, q), product(m, n, two[2], seed=1)
    total = LowRank.sum([a, b.scaled(-0.5)])
    assert total.width == a.width + b.width
    assert torch.allclose(dense(total), dense(a) - 0.5 * dense(b))


@given(sizes)
def test_norm_is_the_frobenius_norm(size: tuple[int, int, int]) -> None:
    p = product(*size)
    assert p.norm() == pytest.approx(float(torch.linalg.norm(dense(p))), abs=1e-12)


def test_norm_of_a_near_cancellation_keeps_its_digits() -> None:
    p, tiny = product(20, 15, 4), product(20, 15, 2, seed=1).scaled(1e-11)
    assert LowRank.sum([p, tiny, p.scaled(-1)]).norm() == pytest.approx(tiny.norm(), rel=1e-3)


@given(sizes, st.integers(0, 9))
def test_truncation_is_as_good_as_the_dense_svd(size: tuple[int, int, int], rank: int) -> None:
    p = product(*size)
    sigma = torch.linalg.svdvals(dense(p))
    cut = p.truncate(rank)
    assert cut.width <= rank
    assert torch.linalg.norm(dense(p) - dense(cut)) == pytest.approx(float(torch.linalg.norm(sigma[rank:])), abs=1e-9)


@given(sizes)
def test_truncated_factors_are_balanced(size: tuple[int, int, int]) -> None:
    cut = product(*size).truncate(3)
    assert torch.allclose(cut.U.T @ cut.U, cut.V @ cut.V.T, atol=1e-9)


def test_recompression_finds_the_numerical_rank() -> None:
    p = product(30, 20, 3, dtype=torch.float32)
    redundant = LowRank.sum([p, p.scaled(2), p.scaled(-0.5)])
    small = redundant.recompress()
    assert small.width == 3
    assert torch.allclose(dense(small), dense(redundant), atol=1e-5)


def test_recompression_of_zero_has_width_zero() -> None:
    zero = LowRank(torch.zeros(4, 2), torch.zeros(2, 5)).recompress()
    assert zero.width == 0
    assert zero.shape == (4, 5)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_a_dense_matrix_becomes_a_product_of_its_smaller_side(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    p = LowRank.from_dense(matrix)
    assert p.width == min(shape)
    assert torch.equal(p.U @ p.V, matrix)


def test_add_to_changes_the_weight_in_place() -> None:
    weight = torch.randn(6, 5)
    expected = weight.double() + dense(product(6, 5, 2))
    address = weight.data_ptr()
    product(6, 5, 2, dtype=torch.float64).to(torch.float32).add_to(weight)
    assert weight.data_ptr() == address
    assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_add_to_refuses_a_weight_of_fewer_bits() -> None:
    with pytest.raises(ValueError, match="would round them away"):
        product(6, 5, 2).to(torch.float32).add_to(torch.zeros(6, 5, dtype=torch.bfloat16))


def test_add_to_refuses_a_transposed_weight() -> None:
    with pytest.raises(ValueError, match=r"cannot add a \(6, 5\) product to a \(5, 6\) weight"):
        product(6, 5, 2).add_to(torch.zeros(5, 6, dtype=torch.float64))


def test_factors_must_share_an_inner_size() -> None:
    with pytest.raises(ValueError, match="do not share an inner size"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
