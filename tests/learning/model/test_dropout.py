"""Fast dropout has the properties of dropout."""

import pytest
import torch
from torch import nn

from fedelta.learning.model.dropout import Dropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_drops_and_scales_elements_like_dropout(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    out = Dropout(p)(x)
    assert out.dtype == dtype
    retained = out != 0
    # Five standard deviations of a binomial.
    assert abs(float(retained.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    # The probability is rounded to a multiple of 2⁻¹⁶.
    assert torch.allclose(out[retained], torch.full_like(out[retained], 1 / (1 - p)), rtol=2e-4)
    assert float(out.detach().double().mean()) == pytest.approx(1, abs=0.02)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    # There is no pattern by position, neither among the four elements of a draw nor among neighbors.
    for begin in range(4):
        assert abs(float(retained.flatten()[begin::4].float().mean()) - (1 - p)) < 0.005
    both = retained.flatten()[:-1] & retained.flatten()[1:]
    assert abs(float(both.float().mean()) - (1 - p) ** 2) < 0.005


def test_it_depends_on_the_seed_and_evaluation_drops_nothing() -> None:
    x, layer = torch.randn(7, 3), Dropout(0.4)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    assert not torch.equal(layer(x), outputs[0])
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert not bool(Dropout(1.0)(x).any())
    assert Dropout(0.5)(torch.empty(0, 4)).shape == (0, 4)


def test_all_plain_dropout_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.3)), nn.Dropout2d(0.3)).eval()
    use_fast_dropout(model)
    assert type(model[1][0]) is Dropout
    assert model[1][0].p == 0.3
    assert not model[1][0].training
    assert type(model[2]) is nn.Dropout2d
