"""The server of a federation: a SuperLink that only this machine reaches, a door for the sites, and the run itself."""

import socket
import ssl
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.flower.certificates import SITE, make_loopback_certificate, public_key
from fedelta.flower.processes import LOOPBACK, Supervised, Tail, environment
from fedelta.flower.server.engine import check
from fedelta.flower.server.gateway import REFUSED
from fedelta.flower.server.superlink import SuperLink, workplace
from fedelta.runs.config import Config
from fedelta.runs.runner import Run, open_run


def serve(
    config: Config,
    *,
    keys: Path | None,
    sites: list[str],
    host: str,
    port: int,
    patience: float,
    resume: bool,
    observer: Observer,
) -> Run:
    """Wait for all sites, run the configuration with them, and tell them when it has ended.

    Args:
        keys: folder with `server.crt`, `server.key` and `sites/NAME.pub`; None is plain text, on loopback alone.
        sites: names, where there are no keys that say them.
        host, port: where sites reach this server.
        patience: seconds to wait for the sites before the first round.
        resume: go on from the checkpoint in the run's folder.

    Raises:
        FedeltaError: if a file is missing, the port is taken, or the run fails.
    """
    check(config)
    folder = RunFolder(config.folder, config.dump())
    if not resume:
        folder.refuse_existing()
    elif (before := folder.result()) is not None and before["rounds"] >= config.rounds:
        return open_run(config.folder)
    public = _keys_of_sites(keys) if keys else {}
    names = _names_of_sites(public, sites, keys, host)
    _check_port(host, port)
    with ExitStack() as stack:
        scratch, logs = stack.enter_context(workplace(config))
        inner = make_loopback_certificate(scratch / "certificate") if keys else None
        link = stack.enter_context(SuperLink(scratch, logs, inner, port=None if keys else port))
        numbers = {link.register(public[name]): name for name in names} if keys else None
        processes = []
        if keys and inner:
            gateway = [sys.executable, "-m", "fedelta.flower.server.gateway", host, str(port), str(keys)]
            gateway += [link.address, str(inner / "ca.crt")]
            processes.append(stack.enter_context(Supervised("gateway", lambda: gateway, environment(), logs)))
        plan = {"resume": resume, "sites": True, "run": _name_of_run(logs / "run", resume)}
        events = link.submit({**plan, "clients": names, "numbers": numbers, "patience": patience}, observer)

        logs_read = [Tail(each.log) for each in processes]

        def look() -> None:
            for each, tail in zip(processes, logs_read, strict=True):
                each.look(observer)
                for line in tail.lines():
                    if line.startswith(REFUSED):
                        observer.warn(line)

        link.follow(events, look)
    return open_run(config.folder)


def _names_of_sites(public: Mapping[str, Path], sites: Sequence[str], keys: Path | None, host: str) -> list[str]:
    """Names of the sites, in order: those that have keys, or those that were given for a trial on loopback."""
    if keys is None and host not in LOOPBACK:
        raise FedeltaError(f"--insecure is for loopback, found --host {host}")
    for name in (*public, *sites):
        if not SITE.fullmatch(name):
            raise FedeltaError(f"site {name!r}: expected letters, digits, - and _")
    if not (names := sorted(public or sites)):
        raise FedeltaError("serve: no site; say --keys FOLDER, or --insecure with --sites a,b for a trial on loopback")
    return names


def _name_of_run(file: Path, resume: bool) -> str:
    """By which sites tell this run from others: a new one, or that of the run that goes on."""
    if not resume or not file.exists():
        write_file(file, uuid.uuid4().hex)
    return file.read_text()


def _keys_of_sites(keys: Path) -> dict[str, Path]:
    """Name → public key of each site that may take part."""
    for name in ("server.crt", "server.key"):
        if not (keys / name).is_file():
            raise FedeltaError(f"--keys {keys}: no {name} there; `fedelta keys` makes one for a trial")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(keys / "server.crt", keys / "server.key")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise FedeltaError(
            f"--keys {keys}: server.crt and server.key are no certificate and its key ({reason})"
        ) from error
    found = {file.stem: file for file in sorted((keys / "sites").glob("*.pub"))}
    if not found:
        raise FedeltaError(f"--keys {keys}: no sites/NAME.pub there, expected the public key of each site")
    owners: dict[bytes, Path] = {}
    for file in found.values():
        if (other := owners.setdefault(public_key(file), file)) is not file:
            raise FedeltaError(f"{file} and {other} are the same key, expected one for each site")
    return found


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise FedeltaError(f"--host {host} --port {port}: {error.strerror or error}") from error
