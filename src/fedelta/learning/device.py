"""What training on an accelerator needs beside the arithmetic: the same bits each time, and errors that help."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedelta.errors import FedeltaError


class DeviceError(FedeltaError):
    """The device cannot do what the configuration asks. It concerns every client that trains there."""


def allow_deterministic_products() -> None:
    """Ask cuBLAS for deterministic products; call it before the first product on a GPU.

    torch refuses deterministic products without this variable, which it reads at its first product and never again.
    A GPU of the Hopper generation has a workspace of this size anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Inside, CUDA uses only kernels that give the same bits each time; other devices do so anyway.

    Without this, the backward pass of fused attention adds up in an order that changes from call to call, and a
    resumed run would end with other bits.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # With warn_only, attention would silently use its non-deterministic backward pass.
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory with NaN is a debugging aid that costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def device_errors(doing: str, lower: Sequence[str]) -> Iterator[None]:
    """Turn torch's errors about the device into one line that names what to change.

    Args:
        doing: the activity, such as "client-003 trains".
        lower: settings that need less memory, the most effective first.

    Raises:
        DeviceError: if memory runs out, an operation has no deterministic kernel, or a product on the GPU came before
            fedelta could ask for deterministic ones.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise DeviceError(f"out of memory while {doing}; to need less, {' or '.join(lower)}") from error
        if "does not have a deterministic implementation" in text:
            operation = text.split(" ", 1)[0]
            raise DeviceError(
                f"{operation} has no deterministic kernel on this device; set training.deterministic: false "
                "(a resumed run then ends with slightly different numbers)"
            ) from error
        if "CUBLAS_WORKSPACE_CONFIG" in text:
            raise DeviceError(
                "deterministic products need CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before the first "
                "product on the GPU; set it there, or set training.deterministic: false"
            ) from error
        raise


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
