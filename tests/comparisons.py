"""Distances between the results of two runs."""

from collections.abc import Mapping

from torch import Tensor

from fedelta.federation.checkpoint import load_checkpoint
from fedelta.lora.files.peft_read import open_adapter
from fedelta.runs.runner import Run


def distance(tensor: Tensor, expected: Tensor) -> float:
    """‖tensor − expected‖ / ‖expected‖, in float64 on the CPU."""
    tensor, expected = tensor.detach().cpu().double(), expected.detach().cpu().double()
    return float((tensor - expected).norm() / expected.norm().clamp(min=1e-300))


def server_tensors(finished: Run) -> dict[str, Tensor]:
    """Factors of the global adapter, and heads, from the checkpoint."""
    state = load_checkpoint(finished.folder.checkpoint_file).state
    factors = {
        f"{module}.{name}": getattr(pair, name) for module, pair in state.method.adapter.items() for name in "AB"
    }
    return factors | dict(state.heads)


def exported_products(finished: Run) -> dict[str, Tensor]:
    """s·B·A of each module of the exported adapter. Factors may differ even if their products are equal."""
    adapter = open_adapter(finished.folder.adapter_folder).read()
    return {module: pair.scale * (pair.B.double() @ pair.A.double()) for module, pair in adapter.items()}


def max_distance(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest `distance` between two tensors of the same name."""
    assert tensors.keys() == expected.keys()
    return max(distance(tensor, expected[name]) for name, tensor in tensors.items())
