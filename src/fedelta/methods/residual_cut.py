"""How much of a round's residual goes into the base: all of it, a rank, a share of the energy, a number of bytes.

What is cut off is kept on the server and added to the next round's residual before that is cut (error feedback), so
that nothing is lost for good: the sum of all patches and of what is kept is the sum of all residuals. Without feedback
it is lost, as in the paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.lowrank import SVD, Dense, LowRank, Product, add, from_tensors
from fedelta.methods.state import Patch

FEEDBACK = "feedback"


class Cut(NamedTuple):
    """A parsed `residual` option: its kind, and the number after the equals sign."""

    kind: str
    amount: float = 0.0


def parse_cut(text: str) -> Cut:
    """`exact`, `rank=q`, `energy=τ` or `bytes=N`.

    Raises:
        FedeltaError: for anything else.
    """
    kind, _, amount = text.partition("=")
    try:
        number = float(amount or 0)
    except ValueError:
        number = -1.0
    whole = 0 <= number < 2**62 and number == int(number)
    good = {"exact": text == "exact", "rank": whole, "energy": 0 < number <= 1, "bytes": whole}
    if not good.get(kind) or (kind != "exact" and not amount):
        raise FedeltaError(f"residual {text!r}: expected exact, rank=q, energy=τ (0 < τ ≤ 1) or bytes=N")
    return Cut(kind, number)


def cut_residuals(
    residuals: Mapping[str, Product], cut: Cut, memory: Mapping[str, Tensor], feedback: bool = True
) -> tuple[Patch, dict]:
    """The patch of this round, and the memory with what was cut off.

    Args:
        residuals: module → this round's residual.
        cut: how much of it is sent.
        memory: of the method; `feedback/<module>/<part>` holds what earlier rounds cut off.
        feedback: whether that is kept.
    """
    kept = {key: tensor for key, tensor in memory.items() if not key.startswith(f"{FEEDBACK}/")}
    if cut.kind == "exact":
        return {module: product for module, product in residuals.items() if not product.is_zero()}, kept
    wholes = {module: _with_feedback(module, residual, memory) for module, residual in residuals.items()}
    # One SVD at a time where each module is cut by itself; a byte budget needs the spectra of all of them first.
    svds = {module: whole.svd() for module, whole in wholes.items()} if cut.kind == "bytes" else {}
    ranks = _ranks_for_bytes(wholes, svds, int(cut.amount)) if svds else None
    patch: Patch = {}
    for module, whole in wholes.items():
        svd = svds.get(module) or whole.svd()
        numerical = svd.rank(whole.dtype)
        wanted = ranks[module] if ranks is not None else _rank(svd, cut)
        q = min(wanted, numerical)
        if q:
            patch[module] = svd.cut(0, q, whole.dtype)
        if feedback and q < numerical:
            for part, tensor in _smaller(svd.cut(q, numerical, whole.dtype)).tensors.items():
                kept[f"{FEEDBACK}/{module}/{part}"] = tensor
    return patch, kept


def _with_feedback(module: str, residual: Product, memory: Mapping[str, Tensor]) -> Product:
    parts = {part: memory[key] for part in "UVW" if (key := f"{FEEDBACK}/{module}/{part}") in memory}
    if not parts:
        return residual
    return add([from_tensors(parts), residual])


def _rank(svd: SVD, cut: Cut) -> int:
    return int(cut.amount) if cut.kind == "rank" else svd.energy_rank(cut.amount)


def _ranks_for_bytes(wholes: Mapping[str, Product], svds: Mapping[str, SVD], budget: int) -> dict[str, int]:
    """The ranks of all modules that keep the most energy within a budget: the most energy a byte first."""
    candidates = []
    for module, whole in wholes.items():
        m, n = whole.shape
        size = (m + n) * torch.finfo(whole.dtype).bits // 8
        candidates += [(float(s) ** 2 / size, size, module) for s in svds[module].sigma]
    ranks = dict.fromkeys(wholes, 0)
    full = set()
    for _, size, module in sorted(candidates, reverse=True):
        # Singular values of a module come in order, so a module whose next one does not fit is done.
        if module not in full and size <= budget:
            budget -= size
            ranks[module] += 1
        else:
            full.add(module)
    return ranks


def _smaller(product: LowRank) -> Product:
    m, n = product.shape
    return Dense(product.U @ product.V) if product.width * (m + n) > m * n else product
