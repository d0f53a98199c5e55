"""A site's trainer: rows of its own, a rank that it can afford, and a model as the server has it.

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

from fedelta.errors import FedeltaError
from fedelta.files import write_file
from fedelta.flower.agreement import comparable
from fedelta.flower.certificates import SITE
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
    """One client, at home. It loads its model when it is first asked, for then it learns the classes.

    Args:
        config: the site's own copy.
        data: its rows: a file or a folder.
        rank: that it can afford.
        name: who it is, None for whom the server says.
        known: file of what the server has said, for a trainer that is started again.
        memory: folder for what the site keeps from one round to the next.
    """

    def __init__(self, config: Config, data: str, rank: int, name: str | None, known: Path, memory: Path) -> None:
        self.config = config
        self.rank = rank
        self.name = name
        self.finished = False
        self.memory = memory
        self.settings: DataSettings = config.data.model_copy(update={"source": data, "splits": {}})
        self.tokenizer = load_tokenizer(config.model)
        self._known = known
        # Read now, so that whoever starts a site learns at once of rows that are not there.
        say(f"{load_rows(self.settings, config.task.columns(self.settings)).num_rows} rows in {data}, rank {rank}")
        if known.exists():
            self._load(**json.loads(known.read_text()))

    def introduce(self, facts: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        try:
            return self._introduce(question)
        except FedeltaError as error:
            # The people of the site read it too.
            say(f"can't take part: {error}")
            raise

    def _introduce(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if question.get("finished"):
            self.finished = True
            return {"clients": []}
        mine = comparable(self.config)
        for key, value in question["settings"].items():
            if mine.get(key) != value:
                raise FedeltaError(f"{key} is {mine.get(key)!r} here and {value!r} at the server")
        name = self.name or question["client"]
        if name is not None and not SITE.fullmatch(name):
            raise FedeltaError(f"the server calls this site {name[:50]!r}, expected letters, digits, - and _")
        if name is None:
            raise FedeltaError("nobody has said which client this is")
        self._forget_other_runs(str(question["run"]))
        if not hasattr(self, "trainer"):
            self._load(name, question["classes"])
            write_file(self._known, json.dumps({"name": name, "classes": question["classes"]}))
            say(f"{name} takes part with {len(self.shards[name].train)} rows")
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
        """What a site keeps is of one run."""
        file = self.memory / "run"
        if not file.exists() or file.read_text() != run:
            shutil.rmtree(self.memory, ignore_errors=True)
            write_file(file, run)
            if hasattr(self, "trainer"):
                # Its base has another run's patches: it is loaded afresh.
                del self.trainer

    def _load(self, name: str, classes: list[str]) -> None:
        shard = build_shard(self.settings, self.config.task, classes, self.tokenizer, name, self.config.seed)
        self.trainer = make_trainer(self.config, len(classes), self.tokenizer)
        self.shards = {name: shard}
        self.base = fingerprint(self.trainer.model.peft)
        self.loaded = (name, classes)

    def train(self, facts: Mapping[str, Any], broadcast: Broadcast, blob: bytes) -> tuple[dict[str, Any], bytes]:
        if not hasattr(self, "trainer"):
            raise FedeltaError("this site has not been asked yet who it is")
        begin = time.monotonic()
        answer = super().train(facts, broadcast, blob)
        if answer[1]:
            say(f"round {broadcast.round}: trained in {time.monotonic() - begin:.1f} s")
        return answer


def say(line: str) -> None:
    """A line for the people of the site."""
    print(line, flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    told = json.loads(Path(sys.argv[3]).read_text())
    known = Path(sys.argv[3]).with_name("known.json")
    try:
        site = SiteTrainer(config, told["data"], told["rank"], told["name"], known, Path(told["memory"]))
    except FedeltaError as error:
        sys.exit(str(error))
    serve(listen(path), site)


if __name__ == "__main__":
    main()
