"""The options of every method, as small transforms around its equation.

A server step is a chain:

    weight → fold → aggregate → scale the patch → server optimizer → refresh

`aggregate` is the method's equation. Each transform after it takes the state as broadcast, the next state and the
patch, and returns a changed next state and patch. A transform that is switched off is not in the chain.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from fedelta.errors import FedeltaError
from fedelta.lora.contribution import Contribution
from fedelta.lora.lowrank import add
from fedelta.lora.patch_log import Patch
from fedelta.methods.server_optimizer import ServerOptimizer, optimize
from fedelta.methods.state import MethodState

Transform = Callable[[MethodState, MethodState, Patch], tuple[MethodState, Patch]]
"""(state as broadcast, next state, patch) → (next state, patch)."""


def weight_by_norm(contributions: Iterable[Contribution]) -> Iterator[Contribution]:
    """Weight each client by ‖s_i B_i A_i‖_F of its whole adapter (HetLoRA, 2401.06432).

    Raises:
        FedeltaError: naming the client, if its norm is not finite.
    """
    for c in contributions:
        squares = c.adapter.norm_squared
        if not math.isfinite(squares):
            raise FedeltaError(
                f"client {c.client}: the squared norm of its update is {squares}, expected a finite number"
            )
        # A client with weight zero keeps that weight.
        yield replace(c, weight=squares**0.5 if c.weight else 0.0)


def scale_patch(step: float) -> Transform:
    """Multiply the patch of the base by η (`residual_step`)."""

    def scale(before: MethodState, after: MethodState, patch: Patch) -> tuple[MethodState, Patch]:  # noqa: ARG001
        return after, {module: product.scaled(step) for module, product in patch.items()}

    return scale


def move_by_optimizer(kind: ServerOptimizer, rate: float, momentum: float) -> Transform:
    """Use the change of the factors as the gradient of a server optimizer (FedOpt, 2003.00295).

    Args:
        kind: `fedavgm` or `fedadam`.
        rate: η.
        momentum: β₁.
    """

    def move(before: MethodState, after: MethodState, patch: Patch) -> tuple[MethodState, Patch]:
        adapter, memory = optimize(before.adapter, after.adapter, after.memory, kind, rate, momentum)
        return replace(after, adapter=adapter, memory=memory), patch

    return move


def refresh(every: int, restart: Callable[[MethodState], MethodState]) -> Transform:
    """Move the global product into the base and restart the adapter.

    Args:
        every: number of rounds from one refresh to the next.
        restart: function that returns the state with a fresh adapter.
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
