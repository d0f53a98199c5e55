"""Flower's side of a site: hands each message to the warm trainer beside it, and the answer back."""

import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedelta.flower.site.ipc import ask

RESTART_S = 120.0
"""How long a message waits for a trainer that is being restarted."""

DEATHS = 2
"""How many trainers may die of one message before it is given up."""

app = ClientApp()


def _relay(message: Message, context: Context, kind: str) -> Message:
    node = context.node_config
    # A node of a simulation knows no more of itself than its number; the run says where the trainer is.
    path = str(node.get("trainer") or context.run_config["trainer"])
    facts = {"kind": kind, "client": node.get("client"), "number": node.get("partition-id")}
    request = message.content.config_records.get("message", ConfigRecord())
    blob = request.get("blob", b"")
    absent, deaths = time.monotonic(), 0
    while True:
        try:
            answer, found = ask(path, facts, blob if isinstance(blob, bytes) else b"")
            break
        except (ConnectionRefusedError, FileNotFoundError):
            # Whoever keeps the site is starting it again.
            if time.monotonic() - absent > RESTART_S:
                raise
        except OSError:
            # It died at work. Training again gives the same, which may be another death.
            absent, deaths = time.monotonic(), deaths + 1
            if deaths > DEATHS:
                raise
        time.sleep(0.2)
    record = ConfigRecord({"blob": found, **{key: value for key, value in answer.items() if value is not None}})
    return Message(content=RecordDict({"message": record}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who lives here, what they can do, and which base they hold."""
    return _relay(message, context, "query")


@app.train()
def train(message: Message, context: Context) -> Message:
    """A broadcast in, an update out."""
    return _relay(message, context, "train")
