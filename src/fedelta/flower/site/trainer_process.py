"""A warm trainer: model, folded patches and tokens stay loaded between messages.

python -m fedelta.flower.site.trainer_process CONFIG.yaml SOCKET MEMORY      serves all clients of a partition
"""

import json
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError
from fedelta.federation.client import Trainer
from fedelta.federation.engines.rounds import explain
from fedelta.files import write_file
from fedelta.flower.site.ipc import listen, receive, send
from fedelta.learning.model.base_model import fingerprint
from fedelta.learning.shards import Shard
from fedelta.protocol.messages import Broadcast
from fedelta.runs.assemble import prepare
from fedelta.runs.config import load_config

SILENCE_S = 60.0


class TrainerProcess:
    """The clients that a trainer serves.

    Args:
        trainer: their model.
        shards: client → its rows.
        memory: folder for what clients keep from one round to the next.
    """

    def __init__(self, trainer: Trainer, shards: Mapping[str, Shard], memory: Path) -> None:
        self.trainer = trainer
        self.shards = dict(shards)
        self.memory = memory
        self.base = fingerprint(trainer.model.peft)
        self.finished = False

    def answer(self, facts: Mapping[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """What a message gets back: facts, and an update if it asked for one.

        Args:
            facts: `kind`, `query` or `train`; which `client` asks, or its `number` in the order of names, if known.
            blob: a question as JSON, or a broadcast.
        """
        try:
            if facts["kind"] == "query":
                return self.introduce(facts, json.loads(blob or b"{}")), b""
            return self.train(facts, Broadcast.from_bytes(blob), blob)
        except Exception as error:
            return explain(error), b""

    def introduce(self, facts: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Who is here."""
        return {"clients": self._here(facts), "version": self.trainer.base.version, "base": self.base}

    def train(self, facts: Mapping[str, Any], broadcast: Broadcast, blob: bytes) -> tuple[dict[str, Any], bytes]:
        """The update that a broadcast asks for.

        Raises:
            FedeltaError: if it is for somebody else, or does not fit the model.
        """
        if broadcast.client not in self._here(facts):
            raise FedeltaError(f"{broadcast.client} is no client of this site")
        if broadcast.patch.start > self.trainer.base.version:
            # A blank trainer: whoever asks again sends all patches.
            return {"behind": self.trainer.base.version}, b""
        client = broadcast.client
        file = self.memory / f"{client}.safetensors"
        if client not in self.trainer.error_feedback and file.exists():
            self.trainer.take_kept(client, file.read_bytes())
        answer = self.trainer.reply(blob, self.shards[client])
        if kept := self.trainer.kept_bytes(client):
            # Before the answer goes: what it has left out is never forgotten.
            write_file(file, kept)
        return {}, answer

    def _here(self, facts: Mapping[str, Any]) -> list[str]:
        names = sorted(self.shards)
        if facts.get("client") is not None:
            names = [name for name in names if name == facts["client"]]
        elif facts.get("number") is not None:
            names = names[facts["number"] : facts["number"] + 1]
        return names


def serve(server: socket.socket, clients: TrainerProcess) -> None:
    """Answer one message after the other, until the clients have finished."""
    while not clients.finished:
        connection, _ = server.accept()
        # Whoever does not speak, or stops listening, holds nobody else up for long, and ends nothing.
        connection.settimeout(SILENCE_S)
        with connection, suppress(OSError, ValueError, KeyError, TypeError):
            facts, blob = receive(connection)
            send(connection, *clients.answer(facts, blob))


def main() -> None:
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        trainer, data = prepare(config)
    except FedeltaError as error:
        sys.exit(str(error))
    serve(listen(path), TrainerProcess(trainer, data.shards, Path(sys.argv[3])))


if __name__ == "__main__":
    main()
