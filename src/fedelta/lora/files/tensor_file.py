"""Writing of safetensors files one tensor at a time, so that a large file does not have to fit into memory.

The safetensors library writes all tensors of a file at once, but the format does not require it: an 8-byte length, a
JSON header that may end in spaces, then the bytes of the tensors. Space for the header is reserved at the start and
filled at the end.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fedelta.errors import FedeltaError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY = 200
"""Bytes reserved for a header entry besides the name: more than dtype, shape and two offsets need."""


class TensorFile:
    """Context manager that writes a file. It is complete and on disk once the block ends without an error.

    Args:
        path: path of the file; an existing file is replaced.
        names: names of all tensors that will be written, in any order.
        metadata: metadata of the file.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: dict[str, str] | None = None) -> None:
        self._path = path
        self._names = set(names)
        self._header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        self._room = 8 * (-(-sum(len(json.dumps(name)) + ENTRY for name in self._names) // 8) + 16)
        self._offset = 0
        self._file = path.open("wb", buffering=0)
        self._file.seek(8 + self._room)
        # One thread writes while the caller computes. At most two tensors are pending, to bound memory.
        self._writer = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor. It must not change until the file is closed."""
        flat = tensor.detach().contiguous()
        self._names.remove(name)
        self._header[name] = {
            "dtype": _label(name, flat.dtype),
            "shape": list(flat.shape),
            "data_offsets": [self._offset, self._offset + flat.nbytes],
        }
        self._offset += flat.nbytes
        if flat.nbytes:
            data = memoryview(flat.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._pending.append(self._writer.submit(self._append, data))
        while len(self._pending) > 2:
            self._pending.pop(0).result()

    def read(self, name: str) -> Tensor:
        """Read a written tensor from the closed file, as a copy that does not keep pages of the file in memory."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        with self._path.open("rb", buffering=0) as file:
            file.seek(8 + self._room + begin)
            data = bytearray(end - begin)
            file.readinto(data)
        dtype = next(dtype for dtype, label in _DTYPES.items() if label == entry["dtype"])
        return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])

    def forget_unwritten(self) -> None:
        """Drop the names that have not been written, if their number was not known in advance."""
        self._names = set()

    def _append(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for pending in self._pending:
                pending.result()
            self._writer.shutdown()
            if error is None:
                assert not self._names, f"not written: {sorted(self._names)[:3]}"
                text = json.dumps(self._header).encode()
                self._file.seek(0)
                self._append(memoryview(self._room.to_bytes(8, "little") + text.ljust(self._room)))
                os.fsync(self._file.fileno())
        finally:
            self._writer.shutdown()
            self._file.close()


def _label(name: str, dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        raise FedeltaError(f"tensor {name} is {dtype}, which can't be written, expected one of {list(_DTYPES)}")
    return _DTYPES[dtype]
