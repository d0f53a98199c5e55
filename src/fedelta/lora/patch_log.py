"""The base patches as a versioned log, on the server, and their running sum, at a client.

A method that changes the base (FedEx) never touches W0 on the server. It appends one low-rank patch per
round; a client holds the sum C_v of all patches up to its version v, in fp32, and trains on W0 + C_v. Beside a
large base of few bits it keeps the patches' factors for as long as they are the smaller form.

Both sides compute C_v by the same additions in the same order, so on one machine every client at version v
holds the server's bits. A client that missed rounds is sent exactly what it has not seen: the factors of
each version, or C_v itself as soon as that is smaller. (Recompressing several versions into one would only
be smaller than both if their sum had a lower rank than its width, which trained patches do not, and it
would cost the bits.) Entries that no client can be served from any more are dropped, so the log never
grows beyond twice the dense size.

Versions are chained by a digest of their content: a client of another history is refused, never patched.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedelta.errors import FedeltaError
from fedelta.lora.adapter import Shapes
from fedelta.lora.lowrank import Dense, Product, add

Patch = Mapping[str, Product]
"""Module name → what is added to its base weight, out×in."""


def _nbytes(patch: Patch) -> int:
    return sum(product.nbytes for product in patch.values())


def _digest(previous: str, patch: Patch) -> str:
    sha = hashlib.sha256(previous.encode())
    for module in sorted(patch):
        sha.update(module.encode())
        for part, factor in patch[module].tensors.items():
            sha.update(f"{part}{tuple(factor.shape)}".encode())
            sha.update(factor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def fold(total: dict[str, Tensor], patch: Patch) -> None:
    """Add one version's patch to the dense fp32 sum, in place; a module not yet in it starts from zero."""
    for module, product in patch.items():
        if module not in total:
            total[module] = torch.zeros(product.shape)
        product.add_to(total[module])


@dataclass(frozen=True, eq=False)
class PatchDelta:
    """What takes a base from one version to another: the factors of each version between, or the sum itself.

    Args:
        start, end: versions before and after.
        digests: digest of every version from `start` to `end`.
        entries: version → patch, for each version in (start, end]; empty when `total` is given.
        total: module → C_end (m, n), fp32; None when `entries` are given.
    """

    start: int
    end: int
    digests: Mapping[int, str]
    entries: Mapping[int, Patch] = field(default_factory=dict)
    total: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PatchLog:
    """The server's log. Immutable: `append` returns the next one.

    Args:
        shapes: module → (m, n) of every adapted layer, for the size of a dense sum.
        digests: digest of version v at index v; version 0 is the empty base.
        entries: version → patch, the newest versions without gaps.
        total: module → C at the newest version, once older entries have been dropped.
    """

    shapes: Shapes
    digests: tuple[str, ...] = ("",)
    entries: Mapping[int, Patch] = field(default_factory=dict)
    total: Mapping[str, Tensor] | None = None

    @property
    def version(self) -> int:
        return len(self.digests) - 1

    @property
    def dense_nbytes(self) -> int:
        """Bytes of C in fp32, had every adapted module a patch."""
        return sum(4 * m * n for m, n in self.shapes.values())

    def append(self, patch: Patch) -> "PatchLog":
        """The log with one more version; a patch without modules changes nothing and makes no version."""
        if not patch:
            return self
        # One memory layout on both sides: BLAS may round a transposed operand differently.
        patch = {module: product.contiguous() for module, product in sorted(patch.items())}
        entries = {**self.entries, self.version + 1: patch}
        total = self.total
        if total is not None:
            total = {module: matrix.clone() for module, matrix in total.items()}
            fold(total, patch)
        elif sum(map(_nbytes, entries.values())) > self.dense_nbytes:
            total = {}
            for version in sorted(entries):
                fold(total, entries[version])
        if total is not None:
            spare = sum(map(_nbytes, entries.values())) - self.dense_nbytes
            for version in sorted(entries):
                if spare <= 0:
                    break
                spare -= _nbytes(entries.pop(version))
        return PatchLog(self.shapes, (*self.digests, _digest(self.digests[-1], patch)), entries, total)

    def since(self, version: int) -> PatchDelta:
        """What a base at this version has not seen, in the smaller of the two forms."""
        if not 0 <= version <= self.version:
            raise FedeltaError(f"base version {version} does not exist; the server is at {self.version}")
        digests = {v: self.digests[v] for v in range(version, self.version + 1)}
        unseen = range(version + 1, self.version + 1)
        entries = {v: self.entries[v] for v in unseen if v in self.entries}
        if self.total is not None and len(unseen) > 0:
            dense = sum(matrix.nbytes for matrix in self.total.values())
            if len(entries) < len(unseen) or sum(map(_nbytes, entries.values())) > dense:
                return PatchDelta(version, self.version, digests, total=self.total)
        return PatchDelta(version, self.version, digests, entries)


class PatchedBase:
    """A client's side: the version it holds and C at that version.

    Args:
        factor_bytes: the patches stay factors up to these bytes, and are summed when they exceed them; 0 sums at once.
            At `PatchLog.dense_nbytes` the server sums as well, so that the form depends on the version alone.

    Attributes:
        total: module → C, fp32, of the patches that have been summed.
        entries: the patches that have not.
    """

    def __init__(self, factor_bytes: int = 0) -> None:
        self.version = 0
        self.digest = ""
        self.total: dict[str, Tensor] = {}
        self.entries: list[Patch] = []
        self._factor_bytes = factor_bytes

    def apply(self, delta: PatchDelta) -> bool:
        """Take in what this base has not seen; versions that it holds already are skipped.

        Returns:
            Whether the base changed.

        Raises:
            FedeltaError: if the delta starts after this base's version, ends before it, or continues another
                history. The base is then unchanged.
        """
        if not delta.start <= self.version <= delta.end:
            raise FedeltaError(
                f"base version mismatch: this base is at version {self.version}, "
                f"the patch goes from version {delta.start} to {delta.end}"
            )
        if delta.digests.get(self.version) != self.digest:
            raise FedeltaError(f"base version mismatch: version {self.version} here is of another history")
        if self.version == delta.end:
            return False
        if delta.total is not None:
            self.total = {module: matrix.clone() for module, matrix in delta.total.items()}
            self.entries = []
        else:
            self.entries += [delta.entries[version] for version in range(self.version + 1, delta.end + 1)]
            if self.total or sum(map(_nbytes, self.entries)) > self._factor_bytes:
                for patch in self.entries:
                    fold(self.total, patch)
                self.entries = []
        self.version, self.digest = delta.end, delta.digests[delta.end]
        return True

    def patches(self, more: Patch | None = None) -> dict[str, Product]:
        """Module → what is added to its base weight; one more patch on top."""
        terms: dict[str, list[Product]] = {module: [Dense(C)] for module, C in self.total.items()}
        for patch in [*self.entries, *([more] if more else [])]:
            for module, product in patch.items():
                terms.setdefault(module, []).append(product)
        return {module: add(terms[module]) for module in sorted(terms)}

    def content_hash(self) -> str:
        """SHA-256 of the patches' bytes: equal hashes are equal bases."""
        sha = hashlib.sha256()
        for module, product in self.patches().items():
            sha.update(module.encode())
            for tensor in product.tensors.values():
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()
