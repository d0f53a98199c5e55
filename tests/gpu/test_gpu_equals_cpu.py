"""In fp32 a run on the GPU ends where the same run on the CPU does."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from comparisons import exported_products, furthest, server_tensors
from fedelta.runs.config import Config
from fedelta.runs.export import export_run
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu

CLOSE = 1e-4


@pytest.mark.parametrize("method", ["fedex", "replication"])
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_a_run_on_the_device_ends_where_it_ends_on_the_cpu(
    kind: str, method: str, device: str, calm: Callable[..., Config], tmp_path: Path
) -> None:
    """Losses of training and evaluation, factors and heads on the server, the exported adapter, merged weights."""
    here, reference = (
        run(calm(kind, where, name, method=method)) for where, name in ((device, "here"), ("cpu", "reference"))
    )
    for mine, other in zip(here.records, reference.records, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=CLOSE)
        assert mine["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=CLOSE)
        assert mine["clients"] == other["clients"]
    assert here.result["test"]["loss"] == pytest.approx(reference.result["test"]["loss"], rel=CLOSE)
    assert furthest(server_tensors(here), server_tensors(reference)) < CLOSE
    assert furthest(exported_products(here), exported_products(reference)) < CLOSE
    # By more than the tolerance has it trained, or all of this would hold of a device that does nothing.
    assert here.records[-1]["train_loss"] < (1 - 100 * CLOSE) * here.records[0]["train_loss"]
    assert min(float(product.norm()) for product in exported_products(here).values()) > 100 * CLOSE
    merged = {}
    for finished in (here, reference):
        folder = tmp_path / f"merged-{finished.config.name}"
        export_run(finished.folder.path, None, folder)
        merged[finished.config.name] = load_file(folder / "model.safetensors")
    assert furthest(merged["here"], merged["reference"]) < CLOSE
