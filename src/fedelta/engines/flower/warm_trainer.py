"""The warm trainer of a site: model, folded patches and tokens stay loaded between messages.

python -m fedelta.engines.flower.warm_trainer CONFIG.yaml SOCKET
"""

import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedelta.client import Trainer
from fedelta.config import load_config
from fedelta.data import Shard
from fedelta.engines.flower.relay import listen, receive, send
from fedelta.errors import BadUpdate, FedeltaError, in_one_line
from fedelta.messages import Broadcast
from fedelta.runner import prepare

SILENCE_S = 60.0


def answer(trainer: Trainer, shards: dict[str, Shard], facts: dict[str, Any], blob: bytes) -> tuple[dict, bytes]:
    """What a message gets back: facts, and an update if it asked for one."""
    if facts["kind"] == "query":
        return {"clients": facts["clients"] or sorted(shards), "version": trainer.base.version}, b""
    try:
        broadcast = Broadcast.from_bytes(blob)
        if broadcast.client not in facts["clients"] or broadcast.client not in shards:
            return {"refused": f"{broadcast.client} is no client of this site"}, b""
        if broadcast.patch.start > trainer.base.version:
            # A blank trainer: whoever asks again sends all patches.
            return {"behind": trainer.base.version}, b""
        return {}, trainer.answer(blob, shards[broadcast.client])
    except FedeltaError as error:
        return {"refused": error.reason if isinstance(error, BadUpdate) else str(error)}, b""
    except Exception as error:
        # A client may fail in any way; the server is told, and the trainer lives on.
        return {"failed": in_one_line(error)}, b""


def serve(server: socket.socket, trainer: Trainer, shards: dict[str, Shard]) -> None:
    """Answer one message after the other, for ever."""
    while True:
        connection, _ = server.accept()
        # Whoever does not speak, or stops listening, holds nobody else up for long, and ends nothing.
        connection.settimeout(SILENCE_S)
        with connection, suppress(OSError, ValueError, KeyError, TypeError):
            facts, blob = receive(connection)
            send(connection, *answer(trainer, shards, facts, blob))


def main() -> None:
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    trainer, data = prepare(config)
    serve(listen(path), trainer, dict(data.shards))


if __name__ == "__main__":
    main()
