"""A finished run: its files read back, checked, and offered as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

from fedelta.errors import FedeltaError, quantity
from fedelta.federation.records import GeneratedAnswer, Result, RoundRecord
from fedelta.federation.run_folder import RunFolder
from fedelta.runs.config import Config, load_config
from fedelta.runs.export import export_run
from fedelta.runs.profile import Profile


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run.

    Args:
        config: configuration of the run.
        folder: folder with the files of the run.
        records: lines of `rounds.jsonl`. `rounds` has them as a table.
        result: scores and sizes of the final model (`result.json`).
        profile: where the time was spent, or None if it was not measured.
    """

    config: Config
    folder: RunFolder
    records: list[RoundRecord]
    result: Result
    profile: Profile | None = None

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.test.items())
        rounds = quantity(len(self.records), "round")
        return f"Run({self.config.name}: {self.config.method.name}, {rounds}, test {scores}, {self.folder.path})"

    @property
    def test(self) -> Mapping[str, float]:
        """Scores of the final model on the test split."""
        return self.result["test"]

    @property
    def adapter(self) -> Path:
        """PEFT folder of the final adapter."""
        return self.folder.adapter_folder

    @property
    def rounds(self) -> "pandas.DataFrame":
        """Table with one row per round: training loss, validation scores, bytes, deviation and number of clients."""
        import pandas

        return pandas.DataFrame([_row(record) for record in self.records]).set_index("round")

    @property
    def generations(self) -> "pandas.DataFrame":
        """Table with one row per generated answer: round, split, row, prompt, answer, references. It may be empty."""
        import pandas

        table = pandas.DataFrame(self.folder.generations.records())
        return table[[key for key in GeneratedAnswer.__annotations__ if key in table]]

    def export(
        self, *, adapter: Path | str | None = None, merged: Path | str | None = None, rank: int | None = None
    ) -> list[str]:
        """Write the final model as a PEFT adapter, a merged model, or both. See `fedelta.export`."""
        return export_run(self.folder.path, adapter, merged, rank)


def _row(record: RoundRecord) -> dict[str, float | int | None]:
    """Return one row of `Run.rounds`. Rounds are counted from 1."""
    scores = {f"validation_{name}": value for name, value in (record["validation"] or {}).items()}
    return {
        "round": record["round"] + 1,
        "clients": len(record["clients"]),
        "skipped": len(record["skipped"]),
        "train_loss": record["train_loss"],
        **scores,
        "bytes_down": record["bytes_down"]["total"],
        "bytes_up": record["bytes_up"]["total"],
        "deviation": record["deviation_mean"],
        "lost": record.get("lost_mean"),
        "patch_width": record["patch_width"],
    }


def open_run(folder: Path | str) -> Run:
    """Open a finished run.

    Args:
        folder: folder of the run, with its `config.yaml`.

    Raises:
        FedeltaError: if there is no run, it has not finished, or one of its files is damaged or was changed.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    run_folder = RunFolder(folder, config.dump())
    result = run_folder.result()
    if result is None:
        raise FedeltaError(f"{folder}: this run has not finished; continue it with --resume")
    return Run(config, run_folder, run_folder.check_finished(result), result)
