"""The trainer of a site: its own rows, the rank that it can afford, and the server's model.

python -m fedelta.flower.site.site_trainer CONFIG.yaml SOCKET SITE.json
"""

import json
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedelta.errors import FedeltaError, quantity
from fedelta.files import write_file
from fedelta.flower.agreement import shared_settings
from fedelta.flower.certificates import SITE_NAME
from fedelta.flower.site.ipc import listen
from fedelta.flower.site.trainer_process import TrainerProcess, serve
from fedelta.learning.data import DataSettings
from fedelta.learning.data.sources import load_rows
from fedelta.learning.model.base_model import fingerprint, load_tokenizer
from fedelta.learning.shards import build_shard
from fedelta.protocol.messages import Broadcast
from fedelta.runs.assemble import make_trainer
from fedelta.runs.config import Config, load_config


class SiteTrainer(TrainerProcess):
    """Handles the messages of a site's only client.

    It loads its model at the server's first query, because the query holds the classes.

    Args:
        config: the site's copy of the configuration.
        data: the site's rows: a file or a folder.
        rank: the rank that the site can afford.
        name: name of the site; None if the server knows it by the site's key.
        identity_file: file that stores the name and the classes, for a trainer that is restarted.
        memory: folder for the state that the site keeps between rounds.

    Raises:
        FedeltaError: if the rows or the tokenizer cannot be loaded.
    """

    def __init__(
        self, config: Config, data: str, rank: int, name: str | None, identity_file: Path, memory: Path
    ) -> None:
        self.config = config
        self.rank = rank
        self.name = name
        self.finished = False
        self.memory = memory
        self.settings: DataSettings = config.data.model_copy(update={"source": data, "splits": {}})
        self.tokenizer = load_tokenizer(config.model)
        self._identity_file = identity_file
        # Read the rows now, so that missing rows are reported as soon as the site starts.
        rows = load_rows(self.settings, config.task.columns(self.settings)).num_rows
        log(f"{quantity(rows, 'row')} in {data}, rank {rank}")
        if identity_file.exists():
            self._load(**json.loads(identity_file.read_text()))

    def handle_query(self, facts: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Check that this site can take part, and return its capabilities.

        Args:
            facts: not used: a site has one client.
            question: the server's `settings`, `classes` and `run`, and the `client` that it knows this site as; or
                `finished`, which ends this process.

        Raises:
            FedeltaError: if the site cannot take part.
        """
        try:
            return self._handle_query(question)
        except FedeltaError as error:
            # The server receives the error. Show it at the site too.
            log(f"can't take part: {error}")
            raise

    def _handle_query(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if question.get("finished"):
            self.finished = True
            return {"clients": []}
        settings = shared_settings(self.config)
        for key, value in question["settings"].items():
            if settings.get(key) != value:
                raise FedeltaError(f"{key} is {settings.get(key)!r} here and {value!r} at the server")
        name = self.name or question["client"]
        if name is not None and not SITE_NAME.fullmatch(name):
            raise FedeltaError(f"the server calls this site {name[:50]!r}, expected letters, digits, - and _")
        if name is None:
            raise FedeltaError("this site has no name: neither --name nor the server gives one")
        self._forget_other_runs(str(question["run"]))
        if not hasattr(self, "trainer"):
            self._load(name, question["classes"])
            write_file(self._identity_file, json.dumps({"name": name, "classes": question["classes"]}))
            log(f"{name} takes part with {len(self.shards[name].train)} rows")
        if (name, question["classes"]) != self.loaded:
            raise FedeltaError(f"this site is {self.loaded[0]} of a federation with {len(self.loaded[1])} classes")
        rows = len(self.shards[name].train)
        return {
            "clients": [name],
            "version": self.trainer.base.version,
            "base": self.base,
            "rank": self.rank,
            "rows": rows,
        }

    def _forget_other_runs(self, run: str) -> None:
        """Delete the stored state and the model if they belong to another run."""
        file = self.memory / "run"
        if not file.exists() or file.read_text() != run:
            shutil.rmtree(self.memory, ignore_errors=True)
            write_file(file, run)
            if hasattr(self, "trainer"):
                # Its base holds the other run's patches, so it has to be loaded again.
                del self.trainer

    def _load(self, name: str, classes: list[str]) -> None:
        shard = build_shard(self.settings, self.config.task, classes, self.tokenizer, name, self.config.seed)
        self.trainer = make_trainer(self.config, len(classes), self.tokenizer)
        self.shards = {name: shard}
        self.base = fingerprint(self.trainer.model.peft)
        self.loaded = (name, classes)

    def train(self, facts: Mapping[str, Any], broadcast: Broadcast, blob: bytes) -> tuple[dict[str, Any], bytes]:
        if not hasattr(self, "trainer"):
            raise FedeltaError("the server has not yet queried this site")
        start = time.monotonic()
        reply_facts, update = super().train(facts, broadcast, blob)
        if update:
            log(f"round {broadcast.round}: trained in {time.monotonic() - start:.1f} s")
        return reply_facts, update


def log(line: str) -> None:
    """Print a line, which `fedelta join` shows at the site."""
    print(line, flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    site = json.loads(Path(sys.argv[3]).read_text())
    identity_file = Path(sys.argv[3]).with_name("identity.json")
    try:
        trainer = SiteTrainer(config, site["data"], site["rank"], site["name"], identity_file, Path(site["memory"]))
    except FedeltaError as error:
        sys.exit(str(error))
    serve(listen(path), trainer)


if __name__ == "__main__":
    main()
