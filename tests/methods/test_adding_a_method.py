"""The example of docs/adding-a-method.md, written unchanged into a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedelta
from paths import ROOT

GUIDE = ROOT / "docs" / "adding-a-method.md"


def code_of_the_guide() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    return str(code)


def suite(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copytree(Path(fedelta.__file__).parent, folder / "fedelta", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fedelta" / "methods" / "norm_preserving.py").write_text(code)
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


PROPERTIES = (
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/properties/test_properties.py",
    "-k",
    "norm-preserving",
)


def test_the_guides_method_passes_the_property_suite(tmp_path: Path) -> None:
    code = code_of_the_guide()
    assert 30 <= len(code.splitlines()) <= 50
    done = suite(tmp_path, code, *PROPERTIES)
    assert done.returncode == 0, done.stdout[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    count = int(passed[1]) if passed else done.stdout.splitlines()[0].count(".")
    assert count >= 10, "every property, from the registry alone"


@pytest.mark.parametrize(
    ("false", "test"),
    [
        ('exact="equal ranks"', "test_new_weight_is_old_plus_weighted_changes"),
        ('gauge_invariant="equal ranks"', "test_a_change_of_gauge_at_a_client_changes_nothing"),
        ("linear=True", "test_a_linear_methods_factors_are_weighted_sums"),
    ],
)
def test_a_false_statement_fails_it(false: str, test: str, tmp_path: Path) -> None:
    code = code_of_the_guide().replace('Properties(no_op_invariant="always")', f"Properties({false})")
    assert false in code
    done = suite(tmp_path, code, *PROPERTIES[:-1], f"norm-preserving and {test}")
    assert done.returncode == 1
    assert f"FAILED tests/properties/test_properties.py::{test}" in done.stdout


def test_the_command_line_knows_it(tmp_path: Path) -> None:
    done = suite(tmp_path, code_of_the_guide(), "-m", "fedelta.cli", "methods")
    assert "norm-preserving: replication, with B scaled" in done.stdout
    assert "options: limit" in done.stdout
