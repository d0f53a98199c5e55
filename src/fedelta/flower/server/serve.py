"""The server of a federation: a SuperLink on loopback, a gateway for the sites, and the run itself."""

import socket
import ssl
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.federation.run_folder import RunFolder
from fedelta.files import write_file
from fedelta.flower.authority import check_validity, read_certificate
from fedelta.flower.certificates import check_site_name, make_loopback_certificate
from fedelta.flower.processes import LOOPBACK, Supervised, Tail, child_environment
from fedelta.flower.server.admission import Admission
from fedelta.flower.server.connections import server_context
from fedelta.flower.server.engine import check_config
from fedelta.flower.server.refusals import REFUSED
from fedelta.flower.server.site_list import SiteList
from fedelta.flower.server.superlink import SuperLink, run_workspace
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
    accept_changed_data: bool = False,
) -> Run:
    """Wait for all sites, run the configuration with them, and tell them when the run has ended.

    Args:
        config: the run.
        keys: folder with `server.crt`, `server.key`, `ca.crt` and `sites/NAME.pub`; None for plain text, which is only
            allowed on loopback.
        sites: names of the sites, if there are no keys.
        host, port: the address on which the server listens.
        patience: seconds to wait for the sites before the first round.
        resume: resume from the checkpoint in the run's folder.
        observer: receives the progress.
        accept_changed_data: as for `fedelta.runs.runner.run`, about the server's own rows and its base model.

    Returns:
        The finished run.

    Raises:
        FedeltaError: if a file is missing, the port is taken, or the run fails.
    """
    check_config(config)
    folder = RunFolder(config.folder, config.dump())
    if not resume:
        folder.refuse_existing()
    elif (result := folder.result()) is not None and result["rounds"] >= config.rounds:
        return open_run(config.folder)
    admission = read_admission(keys) if keys else None
    names = sorted(admission.sites) if admission else _site_names(sites, host)
    _check_port(host, port)
    with ExitStack() as stack:
        scratch, logs = stack.enter_context(run_workspace(config))
        certificate = make_loopback_certificate(scratch / "certificate") if keys else None
        link = stack.enter_context(SuperLink(scratch, logs, certificate, port=None if keys else port))
        site_list = SiteList(scratch / "sites.json", admission, link.register) if admission else None
        supervised = []
        if keys and certificate:
            command = _gateway_command(host, port, keys, link.address, certificate / "ca.crt")
            supervised.append(stack.enter_context(Supervised("gateway", lambda: command, child_environment(), logs)))
        plan: dict[str, Any] = {
            "resume": resume,
            "accept_changed_data": accept_changed_data,
            "patience": patience,
            "sites": True,
        }
        plan |= {"run": _run_identifier(logs / "run", resume), "clients": names}
        plan["numbers"] = str(site_list.file) if site_list else None
        events = link.submit(plan, observer)
        link.follow(events, _make_check(supervised, site_list, observer))
    return open_run(config.folder)


def _make_check(supervised: Sequence[Supervised], site_list: SiteList | None, observer: Observer) -> Callable[[], None]:
    """Return a function that restarts processes that have ended, and reports who is refused, admitted or removed."""
    tails = [Tail(process.log) for process in supervised]

    def check() -> None:
        if site_list is not None:
            site_list.follow(observer)
        for process, tail in zip(supervised, tails, strict=True):
            process.restart_if_ended(observer)
            for line in tail.new_lines():
                if line.startswith(REFUSED):
                    observer.warn(line)

    return check


def _gateway_command(host: str, port: int, keys: Path, superlink: str, authority: Path) -> list[str]:
    module = "fedelta.flower.server.gateway"
    return [sys.executable, "-m", module, host, str(port), str(keys), superlink, str(authority)]


def _site_names(sites: Sequence[str], host: str) -> list[str]:
    """Return the sorted names of the sites in a trial without keys.

    Raises:
        FedeltaError: if there are none, a name is not valid, or the server is not on loopback.
    """
    if host not in LOOPBACK:
        raise FedeltaError(f"--insecure is for loopback, found --host {host}")
    for name in sites:
        check_site_name(name)
    if not sites:
        raise FedeltaError("serve: no site; pass --keys FOLDER, or --insecure with --sites a,b for a trial on loopback")
    return sorted(sites)


def _run_identifier(file: Path, resume: bool) -> str:
    """Return the identifier by which sites recognize this run: a new one, or the stored one if the run resumes."""
    if not resume or not file.exists():
        write_file(file, uuid.uuid4().hex)
    return file.read_text()


def read_admission(keys: Path) -> Admission:
    """Check the server's certificate, and return the sites that it admits.

    Raises:
        FedeltaError: if a file is missing, damaged or expired, or two sites have the same key.
    """
    for name in ("server.crt", "server.key"):
        if not (keys / name).is_file():
            raise FedeltaError(f"--keys {keys}: no {name} there; `fedelta keys` makes one for a trial")
    if not (keys / "ca.crt").is_file():
        raise FedeltaError(f"--keys {keys}: no ca.crt there, the authority that signs the certificates of sites")
    for name in ("server.crt", "ca.crt"):
        check_validity(keys / name, read_certificate(keys / name))
    try:
        server_context(keys)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise FedeltaError(
            f"--keys {keys}: server.crt and server.key are not a certificate and its key ({reason})"
        ) from error
    admission = Admission(keys / "sites")
    if admission.problems:
        raise FedeltaError(admission.problems[0])
    if not admission.sites:
        raise FedeltaError(f"--keys {keys}: no sites/NAME.pub there, expected the public key of each site")
    return admission


def _check_port(host: str, port: int) -> None:
    """Raise a FedeltaError if the port is taken or the host is not an address of this machine."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise FedeltaError(f"--host {host} --port {port}: {error.strerror or error}") from error
