"""Names of the files in the folder of a run. `run_folder.py` says what each holds."""

from pathlib import Path

from fedelta.federation.checkpoint import PREVIOUS


class RunPaths:
    """The files of one run.

    Args:
        path: folder of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def rounds_file(self) -> Path:
        return self.path / "rounds.jsonl"

    @property
    def timings_file(self) -> Path:
        return self.path / "timings.jsonl"

    @property
    def generations_file(self) -> Path:
        return self.path / "generations.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint" / "state.safetensors"

    @property
    def previous_checkpoint_file(self) -> Path:
        return self.checkpoint_file.with_name(PREVIOUS)

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def clients_folder(self) -> Path:
        """Folder with what each client keeps between rounds, if clients run in processes of their own."""
        return self.path / "clients"

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"
