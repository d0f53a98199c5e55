"""Real deployments for tests: `fedelta serve` and `fedelta join` as processes, each with a part of the tiny data."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedelta.flower.certificates import make_certificates
from fedelta.flower.processes import free_port
from fedelta.learning.data.partition import partition
from fedelta.learning.data.sources import load_splits
from fedelta.runs.config import Config

MIXED = {
    "method": "fedex",
    "partition": {"kind": "iid", "clients": 3},
    "ranks": {"allocation": "fixed", "per_client": [2, 4, 3]},
    "federation": {"participation": 0.67},
}
NAMES = ("client-000", "client-001", "client-002")


class Federation:
    """A server and its sites, each with its own folder.

    Args:
        config: the server's configuration. Each site gets the rows that the partition gives to its client, so that a
            run in one process trains on the same rows.
        folder: a new folder for all files.
        secure: use TLS and keys.
    """

    def __init__(self, config: Config, folder: Path, secure: bool = True) -> None:
        self.config = config
        self.folder = folder
        self.secure = secure
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config.dump()))
        rows = load_splits(config.data, config.task.columns(config.data))["train"]
        names = sorted(set(rows.unique(config.data.label)))
        labels = [names.index(label) for label in rows[config.data.label]]
        parts = partition(rows, labels, config.partition, config.seed).values()
        self.names = [f"client-{i:03d}" for i in range(len(parts))]
        for name, part in zip(self.names, parts, strict=True):
            (folder / name).mkdir()
            rows.select(part).to_csv(str(folder / name / "rows.csv"), index=False)
        if secure:
            make_certificates(folder / "keys", self.names, [])

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self._run(name, "-m", "fedelta.cli", *arguments)

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        cwd = self.folder / name
        cwd.mkdir(exist_ok=True)
        with (cwd / "output").open("ab") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=cwd,
                stdout=output,
                stderr=output,
                env={**os.environ, "COLUMNS": "200"},
            )
        self.processes[name] = child
        return child

    def serve(self, *arguments: str) -> subprocess.Popen[bytes]:
        security = (
            ["--keys", str(self.folder / "keys" / "server"), "--host", "127.0.0.1"]
            if self.secure
            else ["--insecure", "--sites", ",".join(self.names)]
        )
        config = str(self.folder / "config.yaml")
        return self._start("server", "serve", config, *security, "--port", str(self.port), *arguments)

    def join(self, name: str, rank: int, *arguments: str, keys: str | None = None) -> subprocess.Popen[bytes]:
        security = (
            ["--keys", keys or str(self.folder / "keys" / "sites" / name)]
            if self.secure
            else ["--insecure", "--name", name]
        )
        options = ["--server", f"127.0.0.1:{self.port}", "--data", "rows.csv", "--rank", str(rank)]
        return self._start(name, "join", str(self.folder / "config.yaml"), *options, *security, *arguments)

    def join_all(self, ranks: Sequence[int]) -> None:
        """Start all sites, each with its rank."""
        for name, rank in zip(self.names, ranks, strict=True):
            self.join(name, rank)

    def join_badly(self, name: str, rank: int, how: str) -> subprocess.Popen[bytes]:
        """Start a site whose trainer misbehaves: see `bad_site.py`."""
        options = ["--server", f"127.0.0.1:{self.port}", "--data", "rows.csv", "--rank", str(rank)]
        config = str(self.folder / "config.yaml")
        script = str(Path(__file__).with_name("bad_site.py"))
        return self._run(name, script, how, "join", config, *options, "--insecure", "--name", name)

    def output(self, name: str) -> str:
        return (self.folder / name / "output").read_text()

    def wait(self, name: str, timeout: float = 300) -> int:
        """Wait until a process ends, and return its exit code."""
        return self.processes[name].wait(timeout)

    def wait_for_rounds(self, rounds: int, timeout: float = 300) -> None:
        """Wait until this number of rounds is finished."""
        file = self.config.folder / "rounds.jsonl"
        until = time.monotonic() + timeout
        while not (file.exists() and file.read_bytes().count(b"\n") >= rounds):
            assert time.monotonic() < until, self.output("server")
            assert self.processes["server"].poll() is None, self.output("server")
            time.sleep(0.05)

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_: Any) -> None:
        for child in self.processes.values():
            child.send_signal(signal.SIGTERM)
        for child in self.processes.values():
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
