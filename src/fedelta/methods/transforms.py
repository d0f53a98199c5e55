"""Options of every method, as small transforms around its own equation.

A server step is a chain:

    weigh → fold → aggregate → scale the patch → server optimizer → refresh

`aggregate` is the method's equation. Each transform after it takes the state as broadcast, the state and the patch so
far, and returns the next state and patch. A transform that is switched off is not in the chain.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from fedelta.errors import FedeltaError
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import add
from fedelta.methods.server_optimizer import ServerOptimizer, optimize
from fedelta.methods.state import MethodState, Patch

Transform = Callable[[MethodState, MethodState, Patch], tuple[MethodState, Patch]]
"""(state as broadcast, next state so far, patch so far) → (next state, patch)."""


def weigh_by_norm(contributions: Iterable[Contribution]) -> Iterator[Contribution]:
    """Weigh each client by ‖s_i B_i A_i‖_F of its whole adapter (HetLoRA, 2401.06432).

    Raises:
        FedeltaError: naming the client, if its norm is not finite.
    """
    for c in contributions:
        squares = c.adapter.norm_squared
        if not math.isfinite(squares):
            raise FedeltaError(
                f"client {c.client}: the norm of its update is not finite; it is too large to be weighed"
            )
        # A client of weight zero keeps that weight, however much it trained.
        yield replace(c, weight=squares**0.5 if c.weight else 0.0)


def scale_patch(step: float) -> Transform:
    """Multiply the patch of the base by η (`residual_step`)."""

    def scale(before: MethodState, after: MethodState, patch: Patch) -> tuple[MethodState, Patch]:  # noqa: ARG001
        return after, {module: product.scaled(step) for module, product in patch.items()}

    return scale


def move_by_optimizer(kind: ServerOptimizer, rate: float, momentum: float) -> Transform:
    """Treat the change of the factors as a gradient (FedOpt, 2003.00295)."""

    def move(before: MethodState, after: MethodState, patch: Patch) -> tuple[MethodState, Patch]:
        adapter, memory = optimize(before.adapter, after.adapter, after.memory, kind, rate, momentum)
        return replace(after, adapter=adapter, memory=memory), patch

    return move


def refresh(every: int, restart: Callable[[MethodState], MethodState]) -> Transform:
    """Every so many rounds, move the global product into the base and restart the adapter.

    Args:
        every: number of rounds between two refreshes.
        restart: gives a state whose adapter is as at the start.
    """

    def merge(before: MethodState, after: MethodState, patch: Patch) -> tuple[MethodState, Patch]:
        if (before.round + 1) % every != 0:
            return after, patch
        patch = dict(patch)
        for module, product in after.adapter.products().items():
            if not product.is_zero():
                patch[module] = add([patch[module], product]) if module in patch else product
        return restart(after), patch

    return merge
