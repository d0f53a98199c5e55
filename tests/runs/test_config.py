"""Configurations: reading, overrides, and one-line errors."""

from pathlib import Path

import pytest
import yaml

from fedelta.errors import FedeltaError
from fedelta.runs.config import load_config, parse_config


def test_the_built_in_example_needs_no_file() -> None:
    config = load_config(None)
    assert config.data.source == "pydoc"
    assert config.model.name == "minilm"
    assert config.ranks.mixed


def test_overrides_change_nested_keys() -> None:
    config = load_config(None, ["rounds=2", "training.learning_rate=1e-4", "ranks.per_client=[1, 2]", "method=fedex"])
    assert (config.rounds, config.training.learning_rate) == (2, 1e-4)
    assert config.ranks.per_client == (1, 2)
    assert config.method.name == "fedex"


def test_a_dumped_configuration_reads_back_equal() -> None:
    config = load_config(None)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.dump()))) == config


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.learning_rte=1", "unknown key 'training.learning_rte'; did you mean 'learning_rate'"),
        ("tranining.steps=1", "unknown key 'tranining'; did you mean 'training'"),
        ("rounds=0", "rounds: input should be greater than or equal to 1, found 0"),
        ("ranks.low=0", "ranks.low: input should be greater than or equal to 1, found 0"),
        ("ranks.per_client=[4,0]", "every rank in per_client is at least 1, found 0"),
        ("ranks.low=32", "low rank 32 is above high rank 16"),
        ("partition.kind=radial", "partition.kind: input should be 'iid', 'dirichlet'"),
        ("partition.by=null", "needs the column to keep together"),
        ("training.learning_rate=.nan", "training.learning_rate: input should be a finite number"),
        ("method=fedx", "unknown method 'fedx'; did you mean 'fedex'"),
        ("method.tau=1", "method replication has no option 'tau'"),
        ("name=../escape", "name: string should match pattern"),
        ("lora.target_modules=(a", r"lora.target_modules: '\(a' is not a valid pattern: missing \)"),
        ("rounds", "override 'rounds': expected key=value"),
        ("rounds=[", "override 'rounds=\\['"),
    ],
)
def test_invalid_keys_and_values_raise_one_line_with_the_key(override: str, reason: str) -> None:
    with pytest.raises(FedeltaError, match=reason) as raised:
        load_config(None, ["method=replication", override] if override.startswith("method.") else [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- a\n- b\n", "holds a list, expected keys"), ("a: [1", "line 1, column 6"), ("a: b: c", "x.yaml")],
)
def test_broken_files_raise_one_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(FedeltaError, match=reason) as raised:
        load_config(tmp_path / "x.yaml")
    assert "\n" not in str(raised.value)
