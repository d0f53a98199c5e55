"""Configurations of any content: read as they are written, or refused by key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import fedelta.runs.config as config_module
from fedelta.errors import FedeltaError
from fedelta.runs.config import Config, load_config, parse_config
from fuzzing import damaged_bytes, fuzz, outcome, refused, texts, values

DEMO = (Path(config_module.__file__).parent / "demo.yaml").read_bytes()


def keys(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


KEYS = sorted({*keys(Config().dump()), "task.kind", "task.prompt", "method.residual", "partition.by", "nothing.here"})


def check(loaded: Any) -> None:
    """A configuration that was read means the same after it is written and read again."""
    if isinstance(loaded, Config):
        written = json.loads(json.dumps(loaded.dump(), allow_nan=False))
        assert parse_config(yaml.safe_load(yaml.safe_dump(written))).dump() == loaded.dump()


@fuzz(examples=150)
@given(key=st.sampled_from(KEYS) | texts(), value=values())
def test_a_key_of_any_value_is_kept_or_refused(key: str, value: Any) -> None:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    check(refused("configurations", lambda: load_config(None, [f"{key}={text}"]), FedeltaError))


@fuzz(examples=80)
@given(content=damaged_bytes(DEMO))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(content)
    check(refused("configurations", lambda: load_config(file), FedeltaError))


@fuzz(examples=15)
@given(key=st.sampled_from(KEYS), value=st.sampled_from(["nonsense", "-1", "[1, 2", "{a: 1}", ".nan", "", "é\x1b[31m"]))
def test_the_command_line_refuses_in_one_line(tmp_path_factory: pytest.TempPathFactory, key: str, value: str) -> None:
    folder = tmp_path_factory.mktemp("runs")
    loaded = refused("configurations", lambda: load_config(None, [f"{key}={value}"]), FedeltaError)
    if isinstance(loaded, FedeltaError):
        output = folder / "out"
        assert outcome("configurations", "run", f"{key}={value}", f"output={output}", output=output)
