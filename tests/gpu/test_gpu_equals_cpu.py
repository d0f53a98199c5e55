"""A run in fp32 on the GPU gives the same results as on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from comparisons import exported_products, max_distance, server_tensors
from fedelta.runs.config import Config
from fedelta.runs.export import export_run
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4


@pytest.mark.parametrize("method", ["fedex", "replication"])
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_run_on_the_device_equals_the_run_on_the_cpu(
    kind: str, method: str, device: str, calm: Callable[..., Config], tmp_path: Path
) -> None:
    """Compare losses, factors and heads on the server, the exported adapter, and merged weights."""
    tested, reference = (
        run(calm(kind, where, name, method=method)) for where, name in ((device, "tested"), ("cpu", "reference"))
    )
    for record, expected in zip(tested.records, reference.records, strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=TOLERANCE)
        assert record["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=TOLERANCE)
        assert record["clients"] == expected["clients"]
    assert tested.result["test"]["loss"] == pytest.approx(reference.result["test"]["loss"], rel=TOLERANCE)
    assert max_distance(server_tensors(tested), server_tensors(reference)) < TOLERANCE
    assert max_distance(exported_products(tested), exported_products(reference)) < TOLERANCE
    # Training changed the model by more than the tolerance. Otherwise a device that does nothing would pass.
    assert tested.records[-1]["train_loss"] < (1 - 100 * TOLERANCE) * tested.records[0]["train_loss"]
    assert min(float(product.norm()) for product in exported_products(tested).values()) > 100 * TOLERANCE
    merged = {}
    for finished in (tested, reference):
        folder = tmp_path / f"merged-{finished.config.name}"
        export_run(finished.folder.path, None, folder)
        merged[finished.config.name] = load_file(folder / "model.safetensors")
    assert max_distance(merged["tested"], merged["reference"]) < TOLERANCE
