"""A server and sites with rows of their own: the same numbers, behind TLS and keys, and whatever may go wrong."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr.serverapp")

from fedelta.runner import open_run, run
from sites import MIXED, NAMES, Federation


@pytest.mark.slow
def test_sites_with_keys_give_the_bytes_of_one_process(tiny_config: Any, tmp_path: Path) -> None:
    alone = run(tiny_config(name="alone", rounds=4, **MIXED))
    config = tiny_config(name="apart", rounds=4, **MIXED)
    with Federation(config, tmp_path / "sites") as federation:
        federation.serve()
        for name, rank in zip(NAMES, (2, 4, 3), strict=True):
            federation.join(name, rank)
        assert federation.wait("server") == 0, federation.output("server")
        for name in NAMES:
            assert federation.wait(name, 60) == 0, federation.output(name)
            assert "trained in" in federation.output(name)
    apart = open_run(config.folder)
    assert apart.folder.rounds_file.read_bytes() == alone.folder.rounds_file.read_bytes()
    ours, theirs = (each.folder.adapter_folder / "adapter_model.safetensors" for each in (apart, alone))
    assert ours.read_bytes() == theirs.read_bytes()
