"""Messages in fewer bits: bfloat16, float16, or int8 with a scale for each rank index; and what that left out.

What is left out of an update is added to the client's next one (error feedback: Seide et al. 2014, «1-bit stochastic
gradient descent»; Karimireddy et al., arXiv 1901.09847): over the rounds nothing is lost but the last feedback. That
needs factors that mean the same in the next round; after a refresh, at another rank or under a method that factors
anew the memory starts afresh. Patches of the base and the server's state stay float32.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedelta.errors import FedeltaError

Precision = Literal["float32", "bfloat16", "float16", "int8"]
SCALE = "::scale"
LOSSLESS: Precision = "float32"
WHOLE = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as they are sent.

    Args:
        tensors: by their key in a message, such as `A/module` (r, n) or `head/name`.
        precision: of what is sent.

    Returns:
        The tensors, with scales under the key + `::scale`; and key → dtype of those that were changed.
    """
    sent: dict[str, Tensor] = {}
    changed: dict[str, str] = {}
    target = getattr(torch, precision)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize <= target.itemsize:
            sent[key] = tensor
            continue
        changed[key] = str(tensor.dtype).removeprefix("torch.")
        if precision == "int8":
            sent[key], sent[key + SCALE] = _to_int8(key, tensor)
        elif precision == "float16":
            most = torch.finfo(torch.float16).max
            # What is not finite stays so, to be refused as such.
            sent[key] = torch.where(tensor.isfinite(), tensor.clamp(-most, most), tensor).to(torch.float16)
        else:
            sent[key] = tensor.to(target)
    return sent, changed


def decode(tensors: Mapping[str, Tensor], changed: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `encode` was given, as nearly as was sent.

    Raises:
        FedeltaError: if the two do not fit each other.
    """
    found = dict(tensors)
    for key, name in changed.items():
        if key not in found or not isinstance(name, str) or name not in WHOLE:
            raise FedeltaError(f"message says that {str(key)[:80]!r} was {str(name)[:20]!r}, but holds no such tensor")
        tensor = found[key]
        if tensor.dtype == torch.int8:
            scale = found.pop(key + SCALE, None)
            if scale is None or scale.shape != _shape_of_scale(key, tensor):
                raise FedeltaError(f"message holds int8 for {key[:80]!r}, but not its scales")
            tensor = tensor.float() * scale.float()
        found[key] = tensor.to(WHOLE[name])
    return found


def _across(key: str, tensor: Tensor) -> int | None:
    """The dimension over which a scale is shared: all of a rank index, or all that goes into one output of a head."""
    if tensor.dim() != 2:
        return None
    kind, part = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
    rank_in_columns = kind in ("B", "core") or (kind == "tail" and part == "U")
    return 0 if rank_in_columns else 1


def _shape_of_scale(key: str, tensor: Tensor) -> torch.Size:
    across = _across(key, tensor)
    return torch.Size([1 if across in (None, dim) else size for dim, size in enumerate(tensor.shape)])


def _to_int8(key: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    whole, across, shape = tensor.float(), _across(key, tensor), _shape_of_scale(key, tensor)
    if not whole.numel():
        return whole.to(torch.int8), torch.zeros(shape)
    largest = whole.abs().amax(dim=across, keepdim=True) if across is not None else whole.abs().amax()
    scale = largest.reshape(shape) / 127
    steps = torch.where(scale > 0, whole / scale, torch.zeros(()))
    return steps.round().clamp(-127, 127).nan_to_num().to(torch.int8), scale


def rounded(tensors: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """What arrives of tensors that are sent in this precision."""
    return dict(tensors) if precision == LOSSLESS else decode(*encode(tensors, precision))


class Basis(NamedTuple):
    """What a feedback is of: it means nothing to factors of another seed, rank or scale."""

    seed: int
    rank: int
    scale: float


class ErrorFeedback(NamedTuple):
    """What a client's messages have left out.

    Args:
        round: of the last update.
        basis: of its factors.
        before, after: key → feedback that was added to it, and that it left. A round that is done again begins
            with the former.
    """

    round: int
    basis: Basis
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """What is not tensors, for a file or a message."""
        return {"round": self.round, "basis": list(self.basis)}


def compensate(
    tensors: Mapping[str, Tensor], precision: Precision, round: int, basis: Basis, last: ErrorFeedback | None
) -> tuple[dict[str, Tensor], ErrorFeedback]:
    """An update with what earlier ones have left out, and what it leaves out itself.

    Args:
        tensors: by their key in the message.
        round, basis: of the update.
        last: of this client's last update, None if there is none or it must not count.
    """
    owed: Mapping[str, Tensor] = {}
    if last is not None and last.basis == basis and last.round <= round:
        owed = last.before if last.round == round else last.after
    corrected = {
        key: tensor + owed[key] if key in owed and owed[key].shape == tensor.shape else tensor
        for key, tensor in tensors.items()
    }
    arrived = rounded(corrected, precision)
    left = {key: corrected[key] - arrived[key] for key in corrected}
    return corrected, ErrorFeedback(round, basis, dict(owed), left)
