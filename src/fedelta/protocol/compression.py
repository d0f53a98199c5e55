"""Compression of messages to bfloat16, float16, or int8 with one scale per rank index, with error feedback.

The rounding error of an update is added to the client's next update (error feedback: Seide et al. 2014, "1-bit
stochastic gradient descent"; Karimireddy et al., arXiv 1901.09847). Over the rounds, only the error of the last update
is lost. Error feedback needs factors that keep their meaning from round to round. After a refresh, at another rank, or
under a method that recomputes its factors, the feedback starts from zero. Patches of the base and the server's state
stay float32.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedelta.errors import FedeltaError

Precision = Literal["float32", "bfloat16", "float16", "int8"]
SCALE = "::scale"
"""Suffix of the key under which the int8 scales of a tensor are sent."""
LOSSLESS: Precision = "float32"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that a tensor may have before it is encoded."""


class Encoded(NamedTuple):
    """Tensors in the form in which a message holds them.

    Args:
        tensors: key → encoded tensor; int8 scales are under the key + `::scale`.
        dtypes: key → name of the original dtype, for each tensor whose dtype was changed.
    """

    tensors: dict[str, Tensor]
    dtypes: dict[str, str]


def encode(tensors: Mapping[str, Tensor], precision: Precision) -> Encoded:
    """Encode tensors for a message.

    Args:
        tensors: key in the message, such as `A/module` or `head/name`, → tensor.
        precision: precision of the encoded tensors. A tensor that is not larger than that stays as it is.
    """
    sent: dict[str, Tensor] = {}
    dtypes: dict[str, str] = {}
    target = getattr(torch, precision)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize <= target.itemsize:
            sent[key] = tensor
            continue
        dtypes[key] = str(tensor.dtype).removeprefix("torch.")
        if precision == "int8":
            sent[key], sent[key + SCALE] = _to_int8(key, tensor)
        elif precision == "float16":
            largest = torch.finfo(torch.float16).max
            # NaN and infinity are kept, so that the server refuses them.
            sent[key] = torch.where(tensor.isfinite(), tensor.clamp(-largest, largest), tensor).to(torch.float16)
        else:
            sent[key] = tensor.to(target)
    return Encoded(sent, dtypes)


def decode(tensors: Mapping[str, Tensor], dtypes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Decode the tensors of a message: the inverse of `encode`, up to rounding.

    Args:
        tensors: key → encoded tensor.
        dtypes: key → name of the original dtype. It comes from the message and is not validated yet.

    Raises:
        FedeltaError: if the dtypes do not fit the tensors.
    """
    decoded = dict(tensors)
    for key, name in dtypes.items():
        if key not in decoded or not isinstance(name, str) or name not in DTYPES:
            raise FedeltaError(
                f"the message declares {str(key)[:80]!r} as {str(name)[:20]!r}, but it has no such tensor or dtype; "
                f"expected one of its tensors and one of {', '.join(DTYPES)}"
            )
        tensor = decoded[key]
        if tensor.dtype == torch.int8:
            scale, expected = decoded.pop(key + SCALE, None), tuple(_shape_of_scale(key, tensor))
            if scale is None or scale.shape != expected:
                shape = None if scale is None else tuple(scale.shape)
                raise FedeltaError(
                    f"the message has int8 scales of shape {shape} for {key[:80]!r}, expected {expected}"
                )
            tensor = tensor.float() * scale.float()
        decoded[key] = tensor.to(DTYPES[name])
    return decoded


def _across(key: str, tensor: Tensor) -> int | None:
    """Return the dimension that shares a scale: all elements of one rank index, or of one output of a head.

    None means that the whole tensor shares one scale.
    """
    if tensor.dim() != 2:
        return None
    kind, part = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
    rank_in_columns = kind in ("B", "core") or (kind == "tail" and part == "U")
    return 0 if rank_in_columns else 1


def _shape_of_scale(key: str, tensor: Tensor) -> torch.Size:
    """Return the shape of the int8 scales of a tensor, which broadcasts against the tensor."""
    across = _across(key, tensor)
    return torch.Size([1 if across in (None, dim) else size for dim, size in enumerate(tensor.shape)])


def _to_int8(key: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor as int8 steps in [−127, 127], and its scales."""
    values, across, shape = tensor.float(), _across(key, tensor), _shape_of_scale(key, tensor)
    if not values.numel():
        return values.to(torch.int8), torch.zeros(shape)
    largest = values.abs().amax(dim=across, keepdim=True) if across is not None else values.abs().amax()
    scale = largest.reshape(shape) / 127
    steps = torch.where(scale > 0, values / scale, torch.zeros(()))
    return steps.round().clamp(-127, 127).nan_to_num().to(torch.int8), scale


def rounded(tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Return the tensors as the receiver decodes them if they are sent in this precision."""
    return dict(tensors) if precision == LOSSLESS else decode(*encode(tensors, precision))


class Basis(NamedTuple):
    """Seed, rank and scale of the factors that an error feedback belongs to. It is meaningless for any others."""

    seed: int
    rank: int
    scale: float


class ErrorFeedback(NamedTuple):
    """Rounding errors of a client's messages.

    Args:
        round: round of the client's last update.
        basis: basis of the factors in that update.
        before: key → feedback that was added to that update. A repeated round starts from it.
        after: key → rounding error of that update, the feedback of the next one.
    """

    round: int
    basis: Basis
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """The fields that are not tensors, as JSON values for a file or a message."""
        return {"round": self.round, "basis": list(self.basis)}


def compensate(
    tensors: Mapping[str, Tensor], precision: Precision, round: int, basis: Basis, last: ErrorFeedback | None
) -> tuple[Encoded, ErrorFeedback]:
    """Add the rounding error of the last update to this one and encode the sum.

    Args:
        tensors: key in the message → tensor of the update.
        precision: precision of the message.
        round, basis: round of the update and basis of its factors.
        last: error feedback of this client's last update; None if there is none or if it must not be used.

    Returns:
        The encoded sum, to be passed to `ClientUpdate.to_bytes`, and the error feedback that this update leaves.
    """
    # A repeated round starts from the feedback that it started from before. Feedback of a later round belongs to
    # another run.
    feedback: Mapping[str, Tensor] = {}
    if last is not None and last.basis == basis and last.round <= round:
        feedback = last.before if last.round == round else last.after
    corrected = {
        key: tensor + feedback[key] if key in feedback and feedback[key].shape == tensor.shape else tensor
        for key, tensor in tensors.items()
    }
    encoded = encode(corrected, precision)
    received = decode(*encoded)
    errors = {key: corrected[key] - received[key] for key in corrected}
    return encoded, ErrorFeedback(round, basis, dict(feedback), errors)
