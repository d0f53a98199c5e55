"""A site of a federation: a node that reaches the server, and the warm trainer beside it, until the run has ended."""

import base64
import json
import ssl
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from fedelta.errors import FedeltaError
from fedelta.federation.engines.observer import Observer
from fedelta.flower.certificates import public_half
from fedelta.flower.processes import LOOPBACK, Supervised, Tail, environment, last_line
from fedelta.flower.server.gateway import KEY_HEADER, UNKNOWN
from fedelta.flower.site.node_process import node_command, with_starter
from fedelta.runs.config import Config

TRAINER = ("-m", "fedelta.flower.site.site_trainer")
CONNECT_S = 10.0
REFUSAL = "Failed to initialize the connection"
GONE_S = 30.0
HELD_S = 75.0
"""Flower takes a node for lost after twice its heartbeat of 30 s; until then nobody else gets in with its key."""
AGAIN_S = 5.0
LOOK_S = 1.0
"""Seconds between two looks whether the server is up; Flower's nodes wait ever longer."""
FAREWELL_S = 5.0
"""For how long the node has to pass on the trainer's last word."""


def join(
    config: Config,
    *,
    server: str,
    data: str,
    rank: int,
    keys: Path | None,
    name: str | None,
    folder: Path,
    observer: Observer,
) -> None:
    """Take part in a run until the server says that it has ended.

    Args:
        config: this site's copy of the server's; where the model is and what the machine is may differ.
        server: host:port.
        data: the site's rows, a file or folder. It is read here and nowhere else.
        rank: that this site can afford.
        keys: folder with `site.key` and the server's `ca.crt`; None is plain text, on loopback alone.
        name: of this site, where it has no key that the server knows.
        folder: for logs, and for what the site keeps from one round to the next.
        observer: is told what the site does.

    Raises:
        FedeltaError: if the rows or the model are not there, or the server can't be trusted.
    """
    if (keys is None) == (name is None):
        raise FedeltaError("join: say --keys FOLDER, or --insecure with --name NAME for a trial on loopback")
    security = _security(server, keys)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedelta-")))
        told = {"data": data, "rank": rank, "name": name, "memory": str(folder / "kept")}
        path = str(scratch / "trainer" / "socket")
        trainer = stack.enter_context(_trainer(config, told, scratch, path, folder))
        trainer_log = Tail(trainer.log)
        _wait_for_trainer(trainer, path, trainer_log, observer)
        _wait_for_server(server, keys, trainer, observer)
        (scratch / "flwr").mkdir()
        start_node = partial(node_command, server, f'trainer="{path}"', *security)
        processes: list[Supervised] = [trainer]
        surroundings = with_starter(stack, scratch, environment(FLWR_HOME=str(scratch / "flwr")), folder, processes)
        node = stack.enter_context(Supervised("node", start_node, surroundings, folder))
        refusals, gone = Refusals(server, keys or folder), Gone(server, _authority(keys))
        node_log = Tail(node.log)
        while trainer.ended != 0:
            _tell(trainer_log, observer)
            for each in processes:
                each.look(observer)
            if node.ended == 0 or (node.ended is not None and any(REFUSAL in line for line in node_log.lines())):
                # A node that a server does not know ends as if it had been asked to.
                check_known(server, keys)
                refusals.another(observer)
                node.restart()
            else:
                node.look(observer)
            gone.look(observer)
            time.sleep(0.2)
        _tell(trainer_log, observer)
        time.sleep(FAREWELL_S)


def _trainer(config: Config, told: Mapping[str, Any], scratch: Path, path: str, logs: Path) -> Supervised:
    """The site's trainer as a process that is restarted if it dies.

    Args:
        told: what `SiteTrainer` is made of, beside the configuration.
        path: of the socket that it listens on.
    """
    (scratch / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    (scratch / "site.json").write_text(json.dumps(told))
    command = [sys.executable, *TRAINER, str(scratch / "config.yaml"), path, str(scratch / "site.json")]
    return Supervised("trainer", lambda: command, environment(), logs, done=0)


def _wait_for_trainer(trainer: Supervised, path: str, log: Tail, observer: Observer) -> None:
    """Wait until the trainer listens.

    Raises:
        FedeltaError: with its last line, if it ends before.
    """
    while not Path(path).exists():
        _tell(log, observer)
        if trainer.ended is not None:
            raise FedeltaError(last_line(trainer.log))
        time.sleep(0.1)


def _authority(keys: Path | None) -> Path | None:
    """The certificate that the server's is checked against; None in plain text."""
    return keys / "ca.crt" if keys else None


def _wait_for_server(server: str, keys: Path | None, trainer: Supervised, observer: Observer) -> None:
    """Wait until the server listens and knows this site.

    Raises:
        FedeltaError: if it is not the server that the site trusts, or does not know the site.
    """
    observer.say(f"waiting for the server at {server}")
    while not reachable(server, _authority(keys)):
        trainer.look(observer)
        time.sleep(LOOK_S)
    check_known(server, keys)


def _tell(log: Tail, observer: Observer) -> None:
    """Pass on the lines that the trainer has written since the last look."""
    for line in log.lines():
        observer.say(line)


class Gone:
    """Notices that a server is not there any more, and that it is again; a site waits for it in the meantime."""

    def __init__(self, server: str, authority: Path | None) -> None:
        self._server = server
        self._authority = authority
        self._looked = time.monotonic()
        self._gone = False

    def look(self, observer: Observer) -> None:
        """Now and then, see whether it is there."""
        if time.monotonic() - self._looked < GONE_S:
            return
        self._looked = time.monotonic()
        try:
            here = reachable(self._server, self._authority)
        except FedeltaError:
            # It was once whom we trust; what is there now is not it.
            here = False
        if here == self._gone:
            self._gone = not here
            what = "is back" if here else "is gone; waiting for it to come back (Ctrl-C ends this)"
            observer.say(f"the server at {self._server} {what}")


class Refusals:
    """How long a server has not let this site in.

    It knows the key, but may think that a node with it, which was cut off, is still there.
    """

    def __init__(self, server: str, keys: Path) -> None:
        self._line = (
            f"server {server} does not let in the key {keys / 'site.key'}, which it knows: "
            "is another node using it, and do both clocks agree to a few seconds?"
        )
        self._times: list[float] = []

    def another(self, observer: Observer) -> None:
        """It has refused this site once more.

        Raises:
            FedeltaError: if it has for so long that no node's place can still be held.
        """
        now = time.monotonic()
        self._times = [then for then in self._times if now - then < 2 * HELD_S] + [now]
        if now - self._times[0] > HELD_S:
            raise FedeltaError(self._line)
        if len(self._times) == 1:
            observer.say(f"not let in, trying again for {HELD_S:.0f} s; a site that was cut off is held that long")
        time.sleep(AGAIN_S)


def _security(server: str, keys: Path | None) -> list[str]:
    """Options of the node."""
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise FedeltaError(f"--server {server}: expected HOST:PORT")
    if keys is None:
        if host not in LOOPBACK:
            raise FedeltaError(f"--insecure is for loopback, found --server {server}")
        return ["--insecure"]
    for file in ("site.key", "ca.crt"):
        if not (keys / file).is_file():
            raise FedeltaError(f"--keys {keys}: no {file} there")
    public_half(keys / "site.key")
    return ["--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / "site.key")]


def check_known(server: str, keys: Path | None) -> None:
    """Whether the server, which is up, knows this site's key.

    Raises:
        FedeltaError: if it says that it does not.
    """
    if keys is None:
        return
    key = base64.b64encode(public_half(keys / "site.key")).decode()
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    try:
        # Without a signature nobody gets further than this; that it is a key's that they know they say.
        answer = httpx.post(
            f"https://{server}/v1/fleet/pull-messages",
            headers={KEY_HEADER: key},
            verify=context,
            timeout=CONNECT_S,
            trust_env=server.rpartition(":")[0] not in LOOPBACK,
        )
    except httpx.HTTPError:
        return
    if answer.text == UNKNOWN:
        raise FedeltaError(
            f"server {server} does not know the key {keys / 'site.key'}: "
            "its public half has to be in the server's folder, as sites/NAME.pub"
        )


def reachable(server: str, authority: Path | None, twice: bool = False) -> bool:
    """Whether the server is up and is whom we trust.

    Args:
        authority: certificate that vouches for the server's; None for plain text.
        twice: whether it has answered strangely before.

    Raises:
        FedeltaError: if something else is there.
    """
    host, _, port = server.rpartition(":")
    scheme = "http" if authority is None else "https"
    try:
        context = ssl.create_default_context(cafile=str(authority)) if authority else False
    except ssl.SSLError as error:
        raise FedeltaError(f"{authority} is no certificate ({error.reason})") from error
    try:
        # What it answers does not matter: that it speaks as we do does.
        httpx.get(f"{scheme}://{host}:{port}/", verify=context, timeout=CONNECT_S, trust_env=host not in LOOPBACK)
    except httpx.ConnectError as error:
        cause = error
        while cause is not None and not isinstance(cause, ssl.SSLError):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        if isinstance(cause, ssl.SSLCertVerificationError):
            line = f"server {server} is not whom {authority} vouches for: {cause.verify_message}"
            raise FedeltaError(line) from error
        if isinstance(cause, ssl.SSLError):
            raise FedeltaError(f"server {server} does not speak TLS ({cause.reason})") from error
        return False
    except httpx.RemoteProtocolError as error:
        if not twice:
            # It may have been about to end.
            time.sleep(LOOK_S)
            return reachable(server, authority, twice=True)
        raise FedeltaError(f"server {server} does not speak plain HTTP; does it want TLS? Say --keys FOLDER") from error
    except httpx.HTTPError:
        return False
    return True
