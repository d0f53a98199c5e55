"""`FactorPlan`: which factors of an adapter are sent, trained and kept in a round."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fedelta.lora.adapter import Adapter, draw_basis


class FactorPlan(NamedTuple):
    """Which factors of B·A are sent, trained and kept in a round.

    The factors are "A", "B", and "core", the r×r matrix C of B = basis·C.

    Args:
        down: factors that the server sends. A missing A or basis is drawn from the seed; a missing B is zero.
        train: factors that a client trains.
        up: factors that a client sends back.
        keep: factors that a client keeps for its next round and uses if `down` does not include them.
        prune: True if a client may send a lower rank than it received.
    """

    down: frozenset[str] = frozenset("AB")
    train: frozenset[str] = frozenset("AB")
    up: frozenset[str] = frozenset("AB")
    keep: frozenset[str] = frozenset()
    prune: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; the inverse of `from_json`."""
        return {key: value if isinstance(value, bool) else sorted(value) for key, value in self._asdict().items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FactorPlan":
        """Read a plan from JSON values."""
        sets = {key: frozenset(value) for key, value in data.items() if key != "prune"}
        return cls(**sets, prune=bool(data["prune"]))


def core_of(module: str, B: Tensor, seed: int) -> Tensor:
    """Return C (r, r) of B = basis·C (m, r), with the basis drawn from this seed."""
    basis = draw_basis(module, B.shape[0], B.shape[1], seed)
    return (basis.T.double() @ B.double()).to(B.dtype)


def select_factors(adapter: Adapter, names: frozenset[str], seed: int) -> dict[str, dict[str, Tensor]]:
    """Return the named factors of an adapter in the layout of a message: name → module → tensor."""
    factors: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(names)}
    for module, pair in adapter.items():
        for name, by_module in factors.items():
            by_module[module] = {"A": pair.A, "B": pair.B}[name] if name != "core" else core_of(module, pair.B, seed)
    return factors
