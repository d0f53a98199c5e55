"""What an aggregation has done: in each module, and as a whole."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModuleReport:
    """The result for one module.

    Args:
        module: name of the module; expert e of a stack is `module[e]`.
        ranks: smallest and largest rank among the folders; 0 if a folder does not adapt the module.
        rank: rank of the resulting adapter.
        patch_width: width of the resulting base patch; 0 without one.
        deviation: ‖ΔW − B̄Ā‖_F / ‖ΔW‖_F, with ΔW the exact mean Σ p_i s_i B_i A_i and B̄, Ā the plain averages, missing
            rank indices counted as zeros. None for a sum, and where it does not fit into fp32.
        cut: relative error ‖ΔW − result‖_F / ‖ΔW‖_F of the cut to the requested rank; 0 without one.
        distance: ‖result − ΔW‖_F / ‖ΔW‖_F of the adapter with its patch from the exact mean ΔW. None where measuring it
            would take longer than the aggregation, and for a sum.
        norm: ‖s·B·A‖_F of the resulting adapter, without its patch.
        bytes: bytes of this module in the output.
    """

    module: str
    ranks: tuple[int, int]
    rank: int
    patch_width: int
    deviation: float | None
    cut: float
    distance: float | None
    norm: float
    bytes: int


@dataclass(frozen=True)
class Aggregation:
    """The result of `aggregate_folders`.

    Args:
        output: the folder that was written.
        method: name of the method; None for the exact mean or sum.
        clients: (folder, factor) in the order of the folders: p_i, or w_i of a sum.
        modules: one report per module, sorted by name.
        patch: whether the folder holds a base patch next to the adapter.
        as_sum: whether the result is the sum Σ w_i ΔW_i.
        base_model: base model that the output names.
        notes: what was repaired, taken as equal or is missing in an input, a line each.
    """

    output: Path
    method: str | None
    clients: list[tuple[str, float]]
    modules: list[ModuleReport]
    patch: bool
    as_sum: bool = False
    base_model: str | None = None
    notes: tuple[str, ...] = ()
