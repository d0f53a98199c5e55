"""The ClientApp that Flower runs at a site: it forwards each message to the site's trainer, and returns the reply."""

import time
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedelta.flower.site.ipc import ask

TRAINER_RESTART_S = 120.0
"""Maximum seconds that a message waits for a trainer that is being restarted."""

MAX_TRAINER_DEATHS = 2
"""Number of trainers that may die while they process one message, before the message fails."""

app = ClientApp()


def _forward_to_trainer(message: Message, context: Context, kind: str) -> Message:
    """Forward a message to the trainer, and return its reply.

    Args:
        message: a query or a broadcast.
        context: Flower's context, which holds the path of the trainer's socket.
        kind: `query` or `train`.
    """
    try:
        reply_facts, reply_blob = _ask_trainer(message, context, kind)
    except Exception as error:
        # Flower would send the error's text to the server. It is printed to the node's log instead.
        print(f"no reply from the trainer: {type(error).__name__}: {error}", flush=True)
        reply_facts, reply_blob = {"failure": "program"}, b""
    present = {key: value for key, value in reply_facts.items() if value is not None}
    record = ConfigRecord({"blob": reply_blob, **present})
    return Message(content=RecordDict({"message": record}), reply_to=message)


def _ask_trainer(message: Message, context: Context, kind: str) -> tuple[dict[str, Any], bytes]:
    """Send a message to the trainer, and return the facts and the blob of its reply.

    Raises:
        OSError: if there is no trainer, or the message ended several of them.
    """
    node = context.node_config
    # A simulated node knows only its own number, so the run's configuration names the trainer.
    path = str(node.get("trainer") or context.run_config["trainer"])
    facts = {"kind": kind, "client": node.get("client"), "number": node.get("partition-id")}
    request = message.content.config_records.get("message", ConfigRecord())
    blob = request.get("blob", b"")
    absent_since, deaths = time.monotonic(), 0
    while True:
        try:
            return ask(path, facts, blob if isinstance(blob, bytes) else b"")
        except (ConnectionRefusedError, FileNotFoundError):
            # The site's supervisor is restarting it.
            if time.monotonic() - absent_since > TRAINER_RESTART_S:
                raise
        except OSError:
            # It died while it processed the message. Training again gives the same update, or kills it again.
            absent_since, deaths = time.monotonic(), deaths + 1
            if deaths > MAX_TRAINER_DEATHS:
                raise
        time.sleep(0.2)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Return the clients of this site, their capabilities, and the version of their base model."""
    return _forward_to_trainer(message, context, "query")


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the update that a broadcast asks for."""
    return _forward_to_trainer(message, context, "train")
