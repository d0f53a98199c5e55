"""Base patches: a versioned log on the server and their running sum on a client.

A method that changes the base (FedEx) never touches W0 on the server. It appends one low-rank patch per round. A
client holds the fp32 sum C_v of all patches up to its version v and trains on W0 + C_v. With a large quantized base,
the client keeps the factors of the patches as long as they are the smaller form.

Server and client compute C_v by the same additions in the same order, so on the same hardware every client at
version v holds exactly the server's bits. A client that missed rounds receives exactly the versions that it has not
seen: the factors of each version, or C_v itself once that is smaller. (Recompressing several versions into one would
be smaller than both only if the rank of their sum were below its width. Trained patches do not have this property,
and recompression would change the bits.) The log drops entries that can no longer serve any client, so it never
exceeds twice the dense size.

Versions are chained by a digest of their content: a client with another history is refused, never patched.
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
"""Module name → matrix (m, n), out×in, that is added to the base weight of the module."""


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
    """Add the patch of one version to the dense fp32 sum in place. A module that is not yet in it starts from zero.

    Args:
        total: module → C (m, n), fp32.
        patch: the patch to add.
    """
    for module, product in patch.items():
        if module not in total:
            total[module] = torch.zeros(product.shape)
        product.add_to(total[module])


@dataclass(frozen=True, eq=False)
class PatchDelta:
    """Difference between two versions of a base: the patch of each version between them, or the sum itself.

    Args:
        start, end: versions before and after.
        digests: version → digest, for every version from `start` to `end`.
        entries: version → patch, for each version in (start, end]; empty if `total` is given.
        total: module → C_end (m, n), fp32; None if `entries` are given.
    """

    start: int
    end: int
    digests: Mapping[int, str]
    entries: Mapping[int, Patch] = field(default_factory=dict)
    total: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PatchLog:
    """The server's log of base patches. It is immutable: `append` returns a new log.

    Args:
        shapes: module → (m, n) of every adapted layer, which gives the size of a dense sum.
        digests: digest of version v at index v; version 0 is the unchanged base.
        entries: version → patch, of the newest versions, without gaps.
        total: module → C (m, n) at the newest version, once older entries have been dropped.

    Example:
        >>> from fedelta.lora.lowrank import LowRank
        >>> log = PatchLog({"q": (6, 4)}).append({"q": LowRank(torch.ones(6, 1), torch.ones(1, 4))})
        >>> log.version
        1
        >>> base = PatchedBase()
        >>> base.apply(log.since(base.version))
        True
        >>> base.version, base.total["q"].shape
        (1, torch.Size([6, 4]))
    """

    shapes: Shapes
    digests: tuple[str, ...] = ("",)
    entries: Mapping[int, Patch] = field(default_factory=dict)
    total: Mapping[str, Tensor] | None = None

    @property
    def version(self) -> int:
        """The newest version."""
        return len(self.digests) - 1

    @property
    def dense_nbytes(self) -> int:
        """Size of C in bytes, in fp32, if every adapted module is patched."""
        return sum(4 * m * n for m, n in self.shapes.values())

    def append(self, patch: Patch) -> "PatchLog":
        """Return the log with one more version. A patch without modules adds no version."""
        if not patch:
            return self
        # Server and client need the same memory layout: BLAS may round a transposed operand differently.
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
        """Return the delta from `version` to the newest version, in the smaller of its two forms.

        Raises:
            FedeltaError: if the version does not exist.
        """
        if not 0 <= version <= self.version:
            raise FedeltaError(f"base version {version} does not exist; the server is at version {self.version}")
        digests = {v: self.digests[v] for v in range(version, self.version + 1)}
        unseen = range(version + 1, self.version + 1)
        entries = {v: self.entries[v] for v in unseen if v in self.entries}
        if self.total is not None and len(unseen) > 0:
            dense = sum(matrix.nbytes for matrix in self.total.values())
            if len(entries) < len(unseen) or sum(map(_nbytes, entries.values())) > dense:
                return PatchDelta(version, self.version, digests, total=self.total)
        return PatchDelta(version, self.version, digests, entries)


class PatchedBase:
    """A client's base: its version, and C at that version.

    Args:
        factor_bytes: size in bytes up to which patches are kept as factors; beyond it they are summed. 0 sums at once.
            The server sums at `PatchLog.dense_nbytes`; with the same limit the form depends only on the version.

    Attributes:
        version: the version of the base; 0 is the unchanged base.
        digest: digest of that version.
        total: module → C (m, n), fp32, the sum of the patches that have been summed.
        entries: patches that have not been summed yet, in order.
    """

    def __init__(self, factor_bytes: int = 0) -> None:
        self.version = 0
        self.digest = ""
        self.total: dict[str, Tensor] = {}
        self.entries: list[Patch] = []
        self._factor_bytes = factor_bytes

    def apply(self, delta: PatchDelta) -> bool:
        """Apply the versions of a delta that this base does not hold yet.

        Returns:
            True if the base changed.

        Raises:
            FedeltaError: if the delta starts after this base's version, ends before it, or belongs to another
                history. The base is then unchanged.
        """
        if not delta.start <= self.version <= delta.end:
            raise FedeltaError(
                f"base version mismatch: this base is at version {self.version}, "
                f"the patch goes from version {delta.start} to {delta.end}"
            )
        if delta.digests.get(self.version) != self.digest:
            raise FedeltaError(f"base version mismatch: version {self.version} of this base belongs to another history")
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
        """Return module → matrix (m, n) that is added to the base weight.

        Args:
            more: one more patch, added on top.
        """
        terms: dict[str, list[Product]] = {module: [Dense(C)] for module, C in self.total.items()}
        for patch in [*self.entries, *([more] if more else [])]:
            for module, product in patch.items():
                terms.setdefault(module, []).append(product)
        return {module: add(terms[module]) for module in sorted(terms)}

    def content_hash(self) -> str:
        """Return the SHA-256 of the patches' bytes. Equal hashes mean equal bases."""
        sha = hashlib.sha256()
        for module, product in self.patches().items():
            sha.update(module.encode())
            for tensor in product.tensors.values():
                sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()
