"""Scales, pairs, adapters and their initial draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Adapter, LoraPair, draw_A, initial_adapter, lora_alpha, lora_scale


def pair(m: int = 5, n: int = 4, r: int = 3, scale: float = 2.0) -> LoraPair:
    return LoraPair(torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64), scale)


def test_scale_follows_the_rules_of_lora_and_rslora() -> None:
    assert lora_scale(16, 4) == 4
    assert lora_scale(16, 4, "alpha/sqrt(r)") == 8
    assert lora_scale(16, 4, "alpha") == 16


@given(st.floats(0.1, 64), st.integers(1, 64), st.sampled_from(["alpha/r", "alpha/sqrt(r)", "alpha"]))
def test_lora_alpha_is_the_inverse_of_lora_scale(alpha: float, rank: int, rule: str) -> None:
    assert lora_alpha(lora_scale(alpha, rank, rule), rank, rule) == pytest.approx(alpha)  # type: ignore[arg-type]


def test_rank_zero_is_refused() -> None:
    with pytest.raises(FedeltaError, match="at least 1, found 0"):
        lora_scale(16, 0)


@given(st.floats(0.1, 20), st.floats(0.1, 20))
def test_another_scale_does_not_change_the_product(scale: float, other: float) -> None:
    p = pair(scale=scale)
    q = p.with_scale(other)
    assert q.scale == other
    assert torch.allclose(q.scale * q.B @ q.A, p.scale * p.B @ p.A)


def test_truncation_takes_the_first_rank_indices() -> None:
    p = pair()
    assert torch.equal(p.truncate(2).A, p.A[:2])
    assert torch.equal(p.truncate(2).B, p.B[:, :2])


def test_modules_are_sorted_by_name() -> None:
    assert list(Adapter({"b": pair(), "a": pair()})) == ["a", "b"]


def test_the_initial_product_is_zero_and_A_is_drawn_as_in_peft() -> None:
    adapter = initial_adapter({"x": (50, 4000)}, 8, seed=1)
    assert not adapter["x"].B.any()
    linear = nn.Linear(4000, 8)
    nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
    assert adapter["x"].A.abs().max() <= linear.weight.abs().max() * 1.001
    assert adapter["x"].A.std() == pytest.approx(float(linear.weight.detach().std()), rel=0.02)


def test_the_first_rows_of_a_draw_do_not_depend_on_the_rank() -> None:
    assert torch.equal(draw_A("x", 3, 10, seed=4), draw_A("x", 8, 10, seed=4)[:3])
    assert not torch.equal(draw_A("x", 3, 10, seed=4), draw_A("y", 3, 10, seed=4))


def test_byun_and_lees_parameter_count_at_rank_20() -> None:
    """DistilBERT: six layers, q, k and v of 768×768, rank 20: 552,960."""
    shapes = {f"layer.{i}.{name}": (768, 768) for i in range(6) for name in "qkv"}
    assert initial_adapter(shapes, 20, 0).parameters == 552_960
