"""Support for accelerators: deterministic kernels, and device errors that name the setting to change."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fedelta.errors import FedeltaError


class DeviceError(FedeltaError):
    """The device can't do what the configuration asks. The error concerns every client that trains there."""

    kind = "device"


def allow_deterministic_products() -> None:
    """Ask cuBLAS for deterministic products. Call this before the first product on a GPU.

    torch refuses deterministic products without this environment variable, and reads it once, at its first product.
    On a GPU of the Hopper generation this workspace size is the default.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Context in which CUDA uses only kernels that give the same bits each time. Other devices always do.

    Without it, the backward pass of fused attention sums in an order that changes from call to call, and a resumed
    run would end with different bits.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # With warn_only, attention would silently use its nondeterministic backward pass.
    torch.use_deterministic_algorithms(True)
    # By default, deterministic mode also fills new memory with NaN: a debugging aid that costs a pass over the memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def device_errors(doing: str, lower: Sequence[str]) -> Iterator[None]:
    """Turn torch's errors about the device into one line that names the setting to change.

    Args:
        doing: the activity, such as "client-003 trains".
        lower: changes of the settings that save memory, the most effective first.

    Raises:
        DeviceError: if memory runs out, an operation has no deterministic kernel, or the GPU computed a product before
            fedelta could ask for deterministic ones.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if is_out_of_memory(error):
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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch ran out of memory. On a CPU it raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
