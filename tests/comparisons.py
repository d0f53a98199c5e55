"""How far two runs are apart."""

from collections.abc import Mapping

from torch import Tensor

from fedelta.federation.checkpoint import load_checkpoint
from fedelta.lora.files.peft_read import open_adapter
from fedelta.runs.runner import Run


def distance(mine: Tensor, other: Tensor) -> float:
    """‖mine − other‖ / ‖other‖, in float64 on the CPU."""
    mine, other = mine.detach().cpu().double(), other.detach().cpu().double()
    return float((mine - other).norm() / other.norm().clamp(min=1e-300))


def server_tensors(finished: Run) -> dict[str, Tensor]:
    """The global adapter's factors and the heads, as the checkpoint holds them."""
    state = load_checkpoint(finished.folder.checkpoint_file).state
    factors = {
        f"{module}.{name}": getattr(pair, name) for module, pair in state.method.adapter.items() for name in "AB"
    }
    return factors | dict(state.heads)


def exported_products(finished: Run) -> dict[str, Tensor]:
    """s·B·A of each module of the exported adapter: its factors may differ where their product does not."""
    adapter = open_adapter(finished.folder.adapter_folder).read()
    return {module: pair.scale * (pair.B.double() @ pair.A.double()) for module, pair in adapter.items()}


def furthest(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest `distance` of tensors of one name."""
    assert mine.keys() == other.keys()
    return max(distance(tensor, other[name]) for name, tensor in mine.items())
