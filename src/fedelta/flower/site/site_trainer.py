"""The trainer of a site: its own rows, the rank that it can afford, and the server's model.

python -m fedelta.flower.site.site_trainer CONFIG.yaml SOCKET SITE.json
"""

import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedelta.errors import BadBroadcast, FedeltaError, in_one_line, quantity
from fedelta.files import new_folder, write_file
from fedelta.flower.agreement import shared_settings
from fedelta.flower.certificates import SITE_NAME
from fedelta.flower.site.ipc import listen
from fedelta.flower.site.trainer_process import TrainerProcess, log, serve
from fedelta.learning.data import DataSettings
from fedelta.learning.data.sources import load_rows
from fedelta.learning.model.base_model import fingerprint, load_tokenizer
from fedelta.learning.model.token_check import check_tokens
from fedelta.learning.shards import Shard, build_shard
from fedelta.lora.files.adapter_config import CONFIG
from fedelta.lora.files.locate import WEIGHTS
from fedelta.protocol.failures import SiteRefusal
from fedelta.protocol.farewell import Farewell
from fedelta.protocol.messages import Broadcast
from fedelta.protocol.serialization import show
from fedelta.runs.assemble import make_trainer
from fedelta.runs.config import Config, load_config
from fedelta.runs.identity import check_changes, identify_site, input_changes, read_inputs_file


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
        accept_changed_data: take part again in a run with other rows or another base model than before.

    Raises:
        FedeltaError: if the rows or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        data: str,
        rank: int,
        name: str | None,
        identity_file: Path,
        memory: Path,
        accept_changed_data: bool = False,
    ) -> None:
        self.config = config
        self.rank = rank
        self.name = name
        self.finished = False
        self.memory = memory
        self.accept_changed_data = accept_changed_data
        self.settings: DataSettings = config.data.model_copy(update={"source": data, "splits": {}})
        self.tokenizer = config.task.with_template(load_tokenizer(config.model))
        self.shards: dict[str, Shard] = {}
        self._identity_file = identity_file
        # Read the rows now, so that missing rows are reported as soon as the site starts.
        rows = load_rows(self.settings, config.task.columns(self.settings))
        self.inputs = identify_site(config, rows, self.tokenizer)
        log(f"{quantity(rows.num_rows, 'row')} in {data}, rank {rank}")
        if identity_file.exists():
            self._load(**json.loads(identity_file.read_text()))

    def handle_query(self, facts: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Check that this site can take part, and return its capabilities.

        Args:
            facts: not used: a site has one client.
            question: the server's `settings`, `classes` and `run`, and the `client` that it knows this site as.

        Raises:
            FedeltaError: if the site cannot take part.
        """
        self._check_settings(question["settings"])
        name = self._check_name(question["client"])
        self._forget_other_runs(str(question["run"]))
        self._check_inputs()
        if not hasattr(self, "trainer"):
            self._load(name, question["classes"])
            write_file(self._identity_file, json.dumps({"name": name, "classes": question["classes"]}))
            log(f"{name} takes part with {self.shards[name].train.row_count} rows")
        if (name, question["classes"]) != self.loaded:
            line = f"this site is {self.loaded[0]} of a federation with {len(self.loaded[1])} classes"
            raise SiteRefusal("name", line)
        return {
            "clients": [name],
            "version": self.trainer.base.version,
            "base": self.base,
            "rank": self.rank,
            "rows": self.shards[name].train.row_count,
        }

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise if a setting differs from the server's. Only its name is sent, which is the server's own."""
        own = shared_settings(self.config)
        for key, value in settings.items():
            if own.get(key) != value:
                line = f"{key} is {show(own.get(key), 60)} here and {show(value, 60)} at the server"
                raise SiteRefusal("settings", line, str(key))

    def _check_name(self, given: Any) -> str:
        """Return the name of this site: its own, or the one that the server gives."""
        name = self.name or given
        if name is None:
            raise SiteRefusal("name", "this site has no name: neither --name nor the server gives one")
        if not isinstance(name, str) or not SITE_NAME.fullmatch(name):
            raise SiteRefusal("name", f"the server calls this site {show(name, 50)}, expected letters, digits, - and _")
        return name

    def _forget_other_runs(self, run: str) -> None:
        """Delete the stored state and the model if they belong to another run."""
        file = self.memory / "run"
        if not file.exists() or file.read_text() != run:
            shutil.rmtree(self.memory, ignore_errors=True)
            write_file(file, run)
            if hasattr(self, "trainer"):
                # Its base holds the other run's patches, so it has to be loaded again.
                del self.trainer

    def _check_inputs(self) -> None:
        """Compare the rows and the base with those of the last time that this site took part in this run.

        Raises:
            FedeltaError: if they have changed and that is not accepted. The details are only shown here, at the site.
        """
        file = self.memory / "inputs.json"
        before = read_inputs_file(file)
        if changes := input_changes(before, self.inputs):
            try:
                check_changes("the inputs of this site", changes, self.accept_changed_data)
            except FedeltaError as error:
                log(str(error))
                raise FedeltaError(
                    "the rows or the base model of this site have changed since it last took part"
                ) from None
            log(f"taking part with changed inputs: {'; '.join(changes)}")
        if before != self.inputs:
            write_file(file, json.dumps(self.inputs))

    def _load(self, name: str, classes: list[str]) -> None:
        with refusal("rows"):
            shard = build_shard(self.settings, self.config.task, classes, self.tokenizer, name, self.config.seed)
        with refusal("model"):
            self.trainer = make_trainer(self.config, len(classes), self.tokenizer)
        with refusal("rows"):
            own = {"a shuffled training": shard.train, "a shuffled validation": shard.validation}
            check_tokens(self.trainer.model.peft, self.tokenizer, own)
        self.shards = {name: shard}
        self.base = fingerprint(self.trainer.model.peft)
        self.loaded = (name, classes)

    def train(self, facts: Mapping[str, Any], broadcast: Broadcast, blob: bytes) -> tuple[dict[str, Any], bytes]:
        if not hasattr(self, "trainer"):
            raise SiteRefusal("starting", "the server has not yet queried this site")
        if broadcast.rank > self.rank:
            raise BadBroadcast(f"the server asks for rank {broadcast.rank}, this site trains at most {self.rank}")
        start = time.monotonic()
        reply_facts, update = super().train(facts, broadcast, blob)
        if update:
            log(f"round {broadcast.round}: trained in {time.monotonic() - start:.1f} s")
        return reply_facts, update

    def end(self, farewell: Farewell) -> dict[str, Any]:
        """Write the final adapter beside the state of this site, and end this process after the reply."""
        folder = self.memory.with_name("adapter")
        rounds = quantity(farewell.rounds, "round")
        line = f"the run has ended after {rounds}"
        try:
            if farewell.weights:
                write_final_adapter(folder, farewell, self.config.model.name)
                line += f"; its adapter is in {folder}"
        except OSError as error:
            line += f"; its adapter can't be written: {folder}: {error.strerror or error}"
        log(line)
        return super().end(farewell)


def write_final_adapter(folder: Path, farewell: Farewell, base_model: str) -> None:
    """Write the adapter of the server's last message as a PEFT folder. It appears complete or not at all.

    Args:
        folder: folder to write; an earlier one is replaced.
        farewell: the message.
        base_model: name of the base model at this site.
    """
    config = {**farewell.config, "base_model_name_or_path": base_model}
    with new_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(farewell.weights)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def refusal(kind: str) -> Iterator[None]:
    """Turn an error in the input into a refusal of this kind. An error of the device stays one."""
    try:
        yield
    except FedeltaError as error:
        if error.kind != FedeltaError.kind:
            raise
        raise SiteRefusal(kind, str(error)) from error


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config, path = load_config(Path(sys.argv[1])), Path(sys.argv[2])
    site = json.loads(Path(sys.argv[3]).read_text())
    identity_file = Path(sys.argv[3]).with_name("identity.json")
    try:
        trainer = SiteTrainer(
            config,
            site["data"],
            site["rank"],
            site["name"],
            identity_file,
            Path(site["memory"]),
            site["accept"],
        )
    except FedeltaError as error:
        sys.exit(in_one_line(error))
    serve(listen(path), trainer)


if __name__ == "__main__":
    main()
