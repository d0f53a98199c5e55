"""Attacks on a real deployment: rounds keep half their pace or more, the gateway stays small, no site is lost."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("flwr.serverapp")

from fedelta.flower.signing import add_sites
from fedelta.runs.config import Config, parse_config
from site_processes import NAMES, Federation

pytestmark = pytest.mark.slow
MEASURE_S = 30.0
MAX_MEMORY_MB = 300
STRANGERS = ("silent", "dribble", "handshakes", "stolen_key")
ROGUES = ("long_header", "many_headers", "large_bodies", "slow_headers", "never_reads", "requests")
ATTACKER = Path(__file__).parents[1] / "attacker.py"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, texts: Path) -> Iterator[Federation]:
    """A federation of three sites that trains until the end of the tests, and a fourth one that is admitted."""
    folder = tmp_path_factory.mktemp("attacks")
    settings: dict[str, Any] = {
        "name": "attacked",
        "output": str(folder / "runs"),
        "rounds": 1_000_000,
        "method": "fedex",
        "model": {"name": str(tiny_bert)},
        "ranks": {"high": 4},
        "data": {"source": str(texts), "max_length": 16},
        "partition": {"kind": "iid", "clients": 3},
        "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.001},
    }
    config = parse_config(settings)
    with Federation(config, folder / "sites") as running:
        running.serve()
        running.join_all((4, 4, 4))
        running.wait_for_rounds(3)
        add_sites(running.folder / "keys", ["rogue"])
        time.sleep(5)
        yield running
        assert running.processes["server"].poll() is None, running.output("server")
        for name in NAMES:
            assert running.processes[name].poll() is None, running.output(name)


def rounds(config: Config) -> int:
    return int((config.folder / "rounds.jsonl").read_bytes().count(b"\n"))


def gateway_of(federation: Federation) -> psutil.Process:
    server = psutil.Process(federation.processes["server"].pid)
    return next(p for p in server.children(recursive=True) if "fedelta.flower.server.gateway" in p.cmdline())


def pace(federation: Federation, seconds: float) -> tuple[float, float]:
    """Return the rounds per second, and the largest memory of the gateway in MB."""
    gateway, most = gateway_of(federation), 0.0
    start, before = time.monotonic(), rounds(federation.config)
    while time.monotonic() - start < seconds:
        most = max(most, gateway.memory_info().rss / 1e6)
        time.sleep(0.2)
    return (rounds(federation.config) - before) / (time.monotonic() - start), most


@pytest.mark.parametrize("kind", [*STRANGERS, *ROGUES])
def test_the_rounds_go_on_under_attack(kind: str, federation: Federation) -> None:
    undisturbed, _ = pace(federation, MEASURE_S)
    first = rounds(federation.config)
    gateway = gateway_of(federation)
    command = [sys.executable, str(ATTACKER), kind, str(federation.port), str(federation.folder / "keys"), "1000"]
    attacker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        # The attacker needs a moment to start.
        time.sleep(5)
        disturbed, memory = pace(federation, MEASURE_S)
        assert attacker.poll() is None
    finally:
        attacker.kill()
        attacker.wait()
    # Other programs of this machine may come and go: the slower of the two paces without the attack counts.
    time.sleep(2)
    undisturbed = min(undisturbed, pace(federation, MEASURE_S)[0])
    records = [json.loads(line) for line in (federation.config.folder / "rounds.jsonl").read_text().splitlines()]
    print(f"{kind}: {undisturbed * 60:.0f} rounds a minute, {disturbed * 60:.0f} under attack, gateway {memory:.0f} MB")
    assert gateway.is_running(), "the gateway was restarted"
    assert memory < MAX_MEMORY_MB
    assert not any(record["skipped"] for record in records[first:])
    assert all(set(record["clients"]) == set(NAMES) for record in records[first:])
    assert disturbed >= undisturbed / 2
