"""Factors of very different size: their products have a mean, and fp32 keeps its digits."""

from functools import partial
from pathlib import Path

import pytest
import torch

from adapter_folders import classifier, distance_from_sum, rewrite, save
from fedelta.aggregate.step import aggregate_folders
from fedelta.errors import FedeltaError
from fedelta.methods import make_method


def regauged(folder: Path, factor: float, rows: slice = slice(None)) -> Path:
    """Multiply rows of A by a factor and divide the columns of B by it."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {key: tensor.clone() for key, tensor in tensors.items()}
        for key, tensor in result.items():
            if "lora_A" in key:
                tensor[rows] *= factor
            elif "lora_B" in key:
                tensor[:, rows] /= factor
        return result

    return rewrite(folder, change)


@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["all rows", "one row"])
@pytest.mark.parametrize("factor", [1e-30, 1e-6, 100.0, 1e5, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_the_mean_does_not_depend_on_how_a_product_is_split(
    factor: float, rows: slice, first: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i, r=2 + i, target_modules=["query"]) for i in range(3)]
    regauged(paths[0 if first else 2], factor, rows)
    done = aggregate_folders(paths, tmp_path / "out", weights=[1, 2, 1])
    base = partial(classifier, tiny_bert)
    assert distance_from_sum(base, paths, [1 / 4, 1 / 2, 1 / 4], tmp_path / "out") < 1.5e-6
    assert all(report.deviation is None for report in done.modules)


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora", "replication"])
def test_a_method_refuses_factors_of_very_different_size(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i, target_modules=["query"]) for i in range(2)]
    regauged(paths[1], 2.0)
    aggregate_folders(paths, tmp_path / "fine", method=make_method(name))
    regauged(paths[1], 1e9)
    with pytest.raises(FedeltaError, match=r"1: module .*query: rows of A differ by a factor of 2\^3.* the exact mean"):
        aggregate_folders(paths, tmp_path / "out", method=make_method(name))
    assert not (tmp_path / "out").exists()
