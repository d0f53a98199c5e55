"""The sites that take part, as a file from the server's process to the ServerApp: node → name."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.files import write_file
from fedelta.flower.server.admission import RELOAD_S, Admission


class SiteList:
    """Registers the admitted sites with Flower, also those that are admitted later, and writes the file.

    Args:
        file: the file.
        admission: the admitted sites.
        register: registers the public key in a file with Flower, and returns the number of its node.

    Raises:
        FedeltaError: if a site cannot be registered.
    """

    def __init__(self, file: Path, admission: Admission, register: Callable[[Path], int]) -> None:
        self.file = file
        self._admission = admission
        self._register = register
        # A site that is removed and admitted again keeps its node.
        self._nodes: dict[bytes, int] = {}
        self._last_look = time.monotonic()
        for site in admission.sites.values():
            self._nodes[site.encoded] = register(site.file)
        self._write()

    def follow(self, observer: Observer) -> None:
        """Look for sites that were admitted or removed, if the last look was `RELOAD_S` seconds ago.

        Args:
            observer: is told about each change.
        """
        if time.monotonic() - self._last_look < RELOAD_S:
            return
        self._last_look = time.monotonic()
        before = dict(self._admission.sites)
        if not self._admission.reload():
            return
        for problem in self._admission.problems:
            observer.warn(problem)
        now = self._admission.sites
        for name in sorted(now.keys() - before.keys()):
            observer.say(f"{name} is admitted, and may join between two rounds")
        for name in sorted(before.keys() - now.keys()):
            observer.say(f"{name} is removed, and refused from now on")
        for site in now.values():
            try:
                if site.encoded not in self._nodes:
                    self._nodes[site.encoded] = self._register(site.file)
            except FedeltaError as error:
                observer.warn(f"{site.name} cannot be admitted: {error}")
        self._write()

    def _write(self) -> None:
        sites = self._admission.sites.values()
        numbers = {self._nodes[site.encoded]: site.name for site in sites if site.encoded in self._nodes}
        write_file(self.file, json.dumps(numbers))


def read_site_list(file: Path) -> Mapping[int, str]:
    """Read the file: node → name of the site."""
    return {int(node): name for node, name in json.loads(file.read_text()).items()}
