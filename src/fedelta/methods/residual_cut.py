"""Truncation of a round's residual before it is added to the base: to a rank, a share of the energy, or a byte budget.

The server keeps the part that is cut off and adds it to the next round's residual before truncation (error feedback).
The patches plus the kept part therefore always equal the sum of all residuals. Without feedback, the part that is cut
off is lost, as in the paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.lowrank import SVD, Dense, LowRank, Product, add, from_tensors
from fedelta.lora.patch_log import Patch

FEEDBACK = "feedback"
"""Prefix of the names of the kept parts in a method's memory."""


class Cut(NamedTuple):
    """A parsed `residual` option.

    Args:
        kind: `exact`, `rank`, `energy` or `bytes`.
        amount: the number after the equals sign.
    """

    kind: str
    amount: float = 0.0


def parse_cut(text: str) -> Cut:
    """Parse `exact`, `rank=q`, `energy=τ` or `bytes=N`.

    Raises:
        FedeltaError: if the text has another form or the number is out of range.

    Example:
        >>> parse_cut("rank=2")
        Cut(kind='rank', amount=2.0)
    """
    kind, _, amount = text.partition("=")
    try:
        number = float(amount or 0)
    except ValueError:
        number = -1.0
    is_count = 0 <= number < 2**62 and number == int(number)
    valid = {"exact": text == "exact", "rank": is_count, "energy": 0 < number <= 1, "bytes": is_count}
    if not valid.get(kind) or (kind != "exact" and not amount):
        raise FedeltaError(f"residual {text!r}: expected exact, rank=q, energy=τ (0 < τ ≤ 1) or bytes=N")
    return Cut(kind, number)


def cut_residuals(
    residuals: Mapping[str, Product], cut: Cut, memory: Mapping[str, Tensor], feedback: bool = True
) -> tuple[Patch, dict[str, Tensor]]:
    """Truncate the residuals of a round.

    Args:
        residuals: module → residual (m, n) of this round.
        cut: how the residuals are truncated.
        memory: the method's memory; `feedback/<module>/<part>` holds the part that earlier rounds cut off.
        feedback: keep the part that is cut off.

    Returns:
        The patch of this round, and the memory with the part that was cut off.
    """
    new_memory = {key: tensor for key, tensor in memory.items() if not key.startswith(f"{FEEDBACK}/")}
    if cut.kind == "exact":
        return {module: product for module, product in residuals.items() if not product.is_zero()}, new_memory
    totals = {module: _with_feedback(module, residual, memory) for module, residual in residuals.items()}
    # A byte budget needs the spectra of all modules first. Otherwise one SVD at a time is enough.
    svds = {module: total.svd() for module, total in totals.items()} if cut.kind == "bytes" else {}
    ranks = _ranks_for_bytes(totals, svds, int(cut.amount)) if svds else None
    patch: dict[str, Product] = {}
    for module, total in totals.items():
        svd = svds.get(module) or total.svd()
        numerical_rank = svd.rank(total.dtype)
        q = min(ranks[module] if ranks is not None else _rank(svd, cut), numerical_rank)
        if q:
            patch[module] = svd.cut(0, q, total.dtype)
        if feedback and q < numerical_rank:
            for part, tensor in _smaller_form(svd.cut(q, numerical_rank, total.dtype)).tensors.items():
                new_memory[f"{FEEDBACK}/{module}/{part}"] = tensor
    return patch, new_memory


def _with_feedback(module: str, residual: Product, memory: Mapping[str, Tensor]) -> Product:
    """Return the residual plus the part that earlier rounds cut off."""
    parts = {part: memory[key] for part in "UVW" if (key := f"{FEEDBACK}/{module}/{part}") in memory}
    if not parts:
        return residual
    return add([from_tensors(parts), residual])


def _rank(svd: SVD, cut: Cut) -> int:
    return int(cut.amount) if cut.kind == "rank" else svd.energy_rank(cut.amount)


def _ranks_for_bytes(totals: Mapping[str, Product], svds: Mapping[str, SVD], budget: int) -> dict[str, int]:
    """Return module → rank, chosen greedily: the components with the highest energy per byte that fit the budget."""
    candidates = []
    for module, total in totals.items():
        m, n = total.shape
        size = (m + n) * torch.finfo(total.dtype).bits // 8
        candidates += [(float(s) ** 2 / size, size, module) for s in svds[module].sigma]
    ranks = dict.fromkeys(totals, 0)
    full = set()
    for _, size, module in sorted(candidates, reverse=True):
        # The singular values of a module come in descending order, so a module is full once one does not fit.
        if module not in full and size <= budget:
            budget -= size
            ranks[module] += 1
        else:
            full.add(module)
    return ranks


def _smaller_form(product: LowRank) -> Product:
    """Return the product as factors or dense, whichever is smaller."""
    m, n = product.shape
    return Dense(product.U @ product.V) if product.width * (m + n) > m * n else product
