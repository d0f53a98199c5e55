"""The sites that a server admits: a folder of public keys, which may change while the server runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from fedelta.errors import FedeltaError
from fedelta.flower.authority import encode_public_key
from fedelta.flower.certificates import SITE_NAME, load_public_key

RELOAD_S = 2.0
"""Seconds between two looks at the folder."""


class AdmittedSite(NamedTuple):
    """A site whose public key is in the folder.

    Args:
        name: name of the site.
        file: file of its public key.
        key: its public key, for verifying signatures.
        encoded: its public key, in the encoding that Flower's nodes send.
    """

    name: str
    file: Path
    key: ec.EllipticCurvePublicKey
    encoded: bytes


class Admission:
    """The admitted sites, by the files NAME.pub in a folder.

    Args:
        folder: the folder, which is read now.

    Attributes:
        sites: name → site.
        problems: why a file of the folder does not admit a site. A site whose file is damaged later keeps its key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sites: Mapping[str, AdmittedSite] = {}
        self.problems: list[str] = []
        self._by_key: dict[bytes, AdmittedSite] = {}
        self._stamps: dict[str, tuple[int, int]] | None = None
        self.reload()

    def with_key(self, encoded: bytes) -> AdmittedSite | None:
        """Return the site with this public key, or None if no admitted site has it."""
        return self._by_key.get(encoded)

    def reload(self) -> bool:
        """Read the folder again if a file has changed, and return whether one has."""
        stamps = self._read_stamps()
        if stamps is None or stamps == self._stamps:
            return False
        self._stamps = stamps
        self.problems = []
        sites: dict[str, AdmittedSite] = {}
        by_key: dict[bytes, AdmittedSite] = {}
        for name in sorted(stamps):
            try:
                site = self._read(name)
            except (FedeltaError, OSError) as error:
                self.problems.append(str(error))
                # The file may be only half written. If the site was known, it stays known.
                if name not in self.sites:
                    continue
                site = self.sites[name]
            if (other := by_key.setdefault(site.encoded, site)) is not site:
                self.problems.append(f"{site.file} and {other.file} are the same key, expected one for each site")
                continue
            sites[name] = site
        self.sites, self._by_key = sites, by_key
        return True

    def _read_stamps(self) -> dict[str, tuple[int, int]] | None:
        """Return name → size and time of the file, or None if the folder cannot be read at the moment."""
        try:
            files = [(file.stem, file.stat()) for file in self.folder.glob("*.pub")]
        except OSError:
            return None
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in files}

    def _read(self, name: str) -> AdmittedSite:
        file = self.folder / f"{name}.pub"
        if not SITE_NAME.fullmatch(name):
            raise FedeltaError(f"{file}: site {name!r}: expected letters, digits, - and _")
        key = load_public_key(file)
        return AdmittedSite(name, file, key, encode_public_key(key))
