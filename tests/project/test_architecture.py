"""Limits that `lint-imports` cannot check: sizes of files and functions, and file names without a meaning."""

import ast
from pathlib import Path

import pytest

import fedelta

PACKAGE = Path(fedelta.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_names_have_a_meaning(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert len(file.read_text().splitlines()) <= 300
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name
    assert file.stem not in ("utils", "helpers", "common", "misc", "core")


def test_the_package_has_at_most_6_modules_and_10_subpackages() -> None:
    # Python asks for the name __main__ to run a package, and nothing imports it.
    modules = [file for file in PACKAGE.glob("*.py") if file.name != "__main__.py"]
    packages = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()]
    assert len(modules) <= 6
    assert len(packages) <= 10
