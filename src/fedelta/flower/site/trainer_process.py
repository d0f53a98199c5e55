"""A trainer in a process of its own, which keeps the model, its patches and the tokens in memory between messages.

python -m fedelta.flower.site.trainer_process CONFIG.yaml SOCKET MEMORY      serves all clients of a partition
"""

import json
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError, in_one_line
from fedelta.federation.client import Trainer
from fedelta.files import write_file
from fedelta.flower.site.ipc import listen, receive, send
from fedelta.learning.model.base_model import fingerprint
from fedelta.learning.shards import Shard
from fedelta.protocol.failures import FAILURE, failure_facts
from fedelta.protocol.farewell import Farewell
from fedelta.protocol.messages import Broadcast
from fedelta.runs.assemble import prepare
from fedelta.runs.config import load_config

PREVIOUS = ".previous"
"""Ending of the file that holds what a client had kept one update earlier."""
SILENCE_S = 60.0
"""Seconds after which a connection that neither sends nor reads is closed."""


class TrainerProcess:
    """Handles the messages of one or more clients that share a model.

    Args:
        trainer: their model.
        shards: client → its rows.
        memory: folder for the state that clients keep between rounds.

    Attributes:
        finished: whether the run has ended, so that the process can end too.
    """

    def __init__(self, trainer: Trainer, shards: Mapping[str, Shard], memory: Path) -> None:
        self.trainer = trainer
        self.shards = dict(shards)
        self.memory = memory
        self.base = fingerprint(trainer.model.peft)
        self.finished = False

    _last_failure = ""

    def handle(self, facts: Mapping[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Handle a message, and return the reply. Any exception becomes a reply with the kind of failure.

        The text of the exception is logged here. The server does not receive it.

        Args:
            facts: `kind`, which is `query` or `train`; and, if known, the name of the `client` that the node serves, or
                its `number` in the order of names.
            blob: the query as JSON, the broadcast, or, with the kind `query`, the message that ends the run.

        Returns:
            The JSON part of the reply; and the update, which is empty for a query and after an exception.
        """
        try:
            if facts["kind"] == "query" and blob and not blob.startswith(b"{"):
                return self.end(Farewell.from_bytes(blob)), b""
            if facts["kind"] == "query":
                return self.handle_query(facts, json.loads(blob or b"{}")), b""
            return self.train(facts, Broadcast.from_bytes(blob), blob)
        except Exception as error:
            failure = failure_facts(error)
            doing = "can't take part" if facts.get("kind") == "query" else "did not train"
            line = f"{doing}: {in_one_line(error)} (the server is told only: {failure[FAILURE]})"
            # A server asks a site that is not ready once a second.
            if line != self._last_failure:
                log(line)
            self._last_failure = line
            return failure, b""

    def handle_query(self, facts: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return the clients that the node serves, and the version and fingerprint of the base model."""
        return {"clients": self._clients_of(facts), "version": self.trainer.base.version, "base": self.base}

    def end(self, farewell: Farewell) -> dict[str, Any]:  # noqa: ARG002
        """End this process after the reply: the run has ended. Return its clients."""
        self.finished = True
        return {"clients": sorted(self.shards)}

    def train(self, facts: Mapping[str, Any], broadcast: Broadcast, blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Train as a broadcast asks, and return the update.

        Args:
            facts: as in `handle`.
            broadcast: the decoded broadcast.
            blob: the broadcast as it was received.

        Raises:
            FedeltaError: if the broadcast is for a client of another site, or does not fit the model.
        """
        if broadcast.client not in self._clients_of(facts):
            raise FedeltaError(f"{broadcast.client} is not a client of this site")
        if broadcast.patch.start > self.trainer.base.version:
            # This trainer was restarted and lacks patches. The server then sends all of them.
            return {"behind": self.trainer.base.version}, b""
        client = broadcast.client
        file = self.memory / f"{client}.safetensors"
        self._recall(client, file, broadcast.round)
        update = self.trainer.reply(blob, self.shards[client])
        if client_state := self.trainer.kept_bytes(client):
            # Store the error feedback before the update is sent, so that it cannot be lost.
            write_file(file, client_state, previous=file.with_suffix(PREVIOUS))
        return {}, update

    def _recall(self, client: str, file: Path, round: int) -> None:
        """Load what a client has kept, as it was before a round, unless this process holds it.

        A server that has lost its newest checkpoint repeats a round that the client may have left behind already.

        Raises:
            FedeltaError: if the file is damaged, and so is the one before it.
        """
        held = self.trainer.error_feedback.get(client)
        if held is not None and held.round <= round:
            return
        damaged = False
        for candidate in (file, file.with_suffix(PREVIOUS)):
            if not candidate.exists():
                continue
            try:
                self.trainer.take_kept(client, candidate.read_bytes())
            except FedeltaError:
                damaged = True
                continue
            held = self.trainer.error_feedback.get(client)
            if held is None or held.round <= round:
                return
        if damaged:
            raise FedeltaError(f"what {client} has kept from earlier rounds is damaged on its disk")

    def _clients_of(self, facts: Mapping[str, Any]) -> list[str]:
        """Return the names of the clients that the node with these `facts` serves."""
        names = sorted(self.shards)
        if facts.get("client") is not None:
            names = [name for name in names if name == facts["client"]]
        elif facts.get("number") is not None:
            names = names[facts["number"] : facts["number"] + 1]
        return names


def log(line: str) -> None:
    """Print a line, which `fedelta join` shows at the site."""
    print(line, flush=True)


def serve(server: socket.socket, trainer: TrainerProcess) -> None:
    """Handle one message after another, until the run has ended."""
    while not trainer.finished:
        connection, _ = server.accept()
        # A peer that is silent or stops reading delays the others for `SILENCE_S` at most, and does not end the loop.
        connection.settimeout(SILENCE_S)
        with connection, suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            facts, blob = receive(connection)
            send(connection, *trainer.handle(facts, blob))


def main() -> None:
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        trainer, data = prepare(config)
    except FedeltaError as error:
        sys.exit(in_one_line(error))
    serve(listen(path), TrainerProcess(trainer, data.shards, Path(sys.argv[3])))


if __name__ == "__main__":
    main()
