"""A site of a federation: a node that reaches the server, and the warm trainer beside it, until the run has ended."""

import json
import socket
import ssl
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import yaml

from fedelta.config import Config
from fedelta.engines.flower.deployment import node_command
from fedelta.engines.flower.processes import Kept, environment, last_line
from fedelta.engines.observer import Observer
from fedelta.errors import FedeltaError

CONNECT_S = 10.0
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
        folder: for logs.
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
        (scratch / "config.yaml").write_text(yaml.safe_dump(config.dump()))
        (scratch / "site.json").write_text(json.dumps({"data": data, "rank": rank, "name": name}))
        path = str(scratch / "trainer" / "socket")
        command = [sys.executable, "-m", "fedelta.engines.flower.site"]
        command += [str(scratch / "config.yaml"), path, str(scratch / "site.json")]
        trainer = stack.enter_context(Kept("trainer", command, environment(), folder))
        said = _Said(trainer.log, observer)
        while not Path(path).exists():
            said.catch_up()
            if trainer.ended is not None:
                raise FedeltaError(last_line(trainer.log))
            time.sleep(0.1)
        home = scratch / "flwr"
        home.mkdir()
        command = node_command(server, f'trainer="{path}"', *security)
        node = stack.enter_context(Kept("node", command, environment(FLWR_HOME=str(home)), folder))
        observer.say(f"waiting for the server at {server}")
        while trainer.ended != 0:
            said.catch_up()
            trainer.look(observer)
            node.look(observer)
            time.sleep(0.2)
        said.catch_up()
        time.sleep(FAREWELL_S)


class _Said:
    """Passes on what a log holds beyond what it held in the beginning."""

    def __init__(self, log: Path, observer: Observer) -> None:
        self._log = log
        self._observer = observer
        self._read = 0

    def catch_up(self) -> None:
        with self._log.open("rb") as stream:
            stream.seek(self._read)
            found = stream.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._observer.say(line)


def _security(server: str, keys: Path | None) -> list[str]:
    """Options of the node, after a look at whether the server is whom we trust."""
    host, colon, port = server.rpartition(":")
    if not colon or not port.isdigit():
        raise FedeltaError(f"--server {server}: expected HOST:PORT")
    if keys is None:
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            raise FedeltaError(f"--insecure is for loopback, found --server {server}")
        return ["--insecure"]
    for file in ("site.key", "ca.crt"):
        if not (keys / file).is_file():
            raise FedeltaError(f"--keys {keys}: no {file} there")
    try:
        context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    except ssl.SSLError as error:
        raise FedeltaError(f"--keys {keys}: ca.crt is no certificate ({error.reason})") from error
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        raise FedeltaError(
            f"server {server} is not whom {keys / 'ca.crt'} vouches for: {error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise FedeltaError(f"server {server} does not speak TLS: {error.reason}") from error
    except OSError:
        # It may not be up yet; the node asks again and again.
        pass
    return ["--root-certificates", str(keys / "ca.crt"), "--auth-supernode-private-key", str(keys / "site.key")]
