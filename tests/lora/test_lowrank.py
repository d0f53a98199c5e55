"""`LowRank`, `Dense`, their SVD and running sums against dense float64 matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.lora.lowrank import Dense, LowRank, Product, add, from_tensors
from fedelta.lora.running_sum import RunningSum


def product(m: int, n: int, q: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(m, q, generator=generator, dtype=dtype), torch.randn(q, n, generator=generator, dtype=dtype)
    )


def dense(p: Product) -> torch.Tensor:
    if isinstance(p, Dense):
        return p.W.double()
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


@pytest.mark.parametrize(("m", "n", "q"), [(40, 30, 6), (30, 40, 6), (8, 9, 20), (7, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_of_a_product_equals_the_svd_of_its_matrix(m: int, n: int, q: int, dtype: torch.dtype) -> None:
    p = product(m, n, q, dtype=dtype)
    svd = p.svd()
    expected = torch.linalg.svdvals(dense(p))[: len(svd.sigma)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert torch.allclose(svd.sigma, expected, rtol=0, atol=tolerance * float(expected[0]))
    restored = dense(svd.cut(0, None, torch.float64))
    assert torch.allclose(restored, dense(p), rtol=0, atol=tolerance * float(expected[0]))


def test_fp32_svd_resolves_small_singular_values_of_nearly_parallel_columns() -> None:
    """A stack of clients that agree: the columns of U differ by 1e-4, and so do the singular values."""
    generator = torch.Generator().manual_seed(1)
    B, A = torch.randn(60, 4, generator=generator), torch.randn(4, 50, generator=generator)
    U = torch.cat([B + 1e-4 * torch.randn(60, 4, generator=generator) for _ in range(3)], dim=1)
    V = torch.cat([A + 1e-4 * torch.randn(4, 50, generator=generator) for _ in range(3)])
    p = LowRank(U, V)
    expected = torch.linalg.svdvals(dense(p))
    assert torch.allclose(p.svd().sigma[:4], expected[:4], rtol=1e-6)
    assert (dense(p.truncate(4)) - dense(p)).norm() < 1.01 * expected[4:].norm() + 1e-7 * expected[0]


def test_a_small_column_with_a_large_row_counts_by_its_product() -> None:
    p = LowRank(torch.diag(torch.tensor([1.0, 1e-9])), torch.diag(torch.tensor([1e-3, 1e9])))
    assert torch.allclose(p.svd().sigma, torch.tensor([1.0, 1e-3], dtype=torch.float64))
    assert p.norm() == pytest.approx(1.0, rel=1e-5)


def test_svd_of_zero_factors_is_zero_and_not_nan() -> None:
    """B = 0, as in the first round."""
    for dtype in (torch.float32, torch.float64):
        svd = LowRank(torch.zeros(5, 2, dtype=dtype), torch.ones(2, 4, dtype=dtype)).svd()
        assert not svd.sigma.any()
        assert svd.rank(dtype) == svd.energy_rank(0.9) == 0
        cut = svd.cut(0, None, dtype)
        assert not dense(cut).any()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_energy_rank_is_the_smallest_number_that_reaches_the_share(energy: float) -> None:
    svd = product(12, 10, 6).svd()
    squares = svd.sigma**2
    q = svd.energy_rank(energy)
    assert squares[:q].sum() >= energy * squares.sum() * (1 - 1e-12)
    assert squares[: q - 1].sum() < energy * squares.sum()


def test_norm_keeps_its_digits_when_terms_cancel() -> None:
    p, q = product(20, 15, 3), product(20, 15, 2)
    small = LowRank.sum([p, p.scaled(-1.0), q.scaled(1e-9)])
    assert small.norm() == pytest.approx(1e-9 * float(dense(q).norm()), rel=1e-5)


def test_a_dense_matrix_has_the_operations_of_a_product() -> None:
    p = product(6, 5, 2)
    d = Dense(dense(p))
    assert (d.shape, d.dtype, d.nbytes) == ((6, 5), torch.float64, 240)
    assert d.norm() == pytest.approx(p.norm())
    assert torch.allclose(dense(d.truncate(1)), dense(p.truncate(1)))
    weight = torch.zeros(6, 5, dtype=torch.float64)
    d.scaled(2).add_to(weight)
    assert torch.allclose(weight, 2 * dense(p))
    assert torch.allclose(dense(from_tensors(d.tensors)), dense(from_tensors(p.tensors)))
    assert Dense(torch.zeros(2, 2)).is_zero()
    assert not d.is_zero()


@pytest.mark.parametrize("terms", [0, 1, 3, 40, 400])
def test_a_running_sum_stays_factors_until_the_matrix_is_smaller(terms: int) -> None:
    total = RunningSum((30, 20), torch.float64, 5)
    expected = torch.zeros(30, 20, dtype=torch.float64)
    shift = torch.randn(30, 5, dtype=torch.float64)
    total_a = torch.zeros(5, 20, dtype=torch.float64)
    columns = torch.tensor([0, 2, 3])
    for i in range(terms):
        p, weight = product(30, 20, 3, seed=i), 1.0 + i
        total.add(p.U, p.V, weight, columns)
        total_a[columns] += weight * p.V
        expected += weight * (p.U - shift[:, columns]) @ p.V
    value = total.value(0.5, shift, total_a, slice(0, 4))
    assert isinstance(value, LowRank) == (terms <= 3)
    assert value.nbytes <= 8 * 30 * 20
    assert torch.allclose(dense(value), 0.5 * expected)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_of_a_dense_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = dense(product(*shape, 5)).to(dtype)
    svd = Dense(matrix).svd()
    expected = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(svd.sigma, expected, rtol=0, atol=2e-7 * float(expected[0]))
    assert svd.rank(dtype) == 5
    assert torch.allclose(dense(Dense(matrix).truncate(2)), dense(product(*shape, 5).truncate(2)), atol=1e-5)
    assert torch.allclose(dense(Dense(matrix).recompress()), matrix.double(), atol=1e-5)


def test_a_sum_of_matrices_of_both_kinds() -> None:
    p, q, d = product(6, 5, 2), product(6, 5, 1, seed=5), Dense(torch.randn(6, 5, dtype=torch.float64))
    expected = dense(p) + dense(q) + d.W
    assert torch.allclose(dense(add([p, q])), dense(p) + dense(q))
    assert torch.allclose(dense(add([p, d, q])), expected)


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
