"""The documents: their links lead somewhere, their source files exist, and they speak plain English."""

import re
from pathlib import Path

import pytest
import yaml

from fedelta.runs.config import parse_config
from paths import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md")])
SOURCE = ROOT / "src" / "fedelta"
DIALECT = re.compile(
    r"so many|goes on\b|(?<!there )(?<!There )\bis no (?!longer)[a-z]|nobody|whoever|of which|\blent\b|\.\./shared"
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not link.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / link).exists(), link


def test_the_map_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = re.findall(r"`([a-z_/]+\.(?:py|toml))`", text)
    assert len(files) > 30
    for name in files:
        places = [SOURCE / name, ROOT / name, *SOURCE.rglob(f"*/{name}")]
        assert any(place.is_file() for place in places), name


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "index.md":
            assert f"({page.name})" in index, page.name


@pytest.mark.parametrize("folder", ["src", "docs"])
def test_prose_has_no_house_dialect(folder: str) -> None:
    for file in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not DIALECT.search(line), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


@pytest.mark.parametrize("document", ["README.md", "docs/running.md"])
def test_configurations_in_the_documents_are_configurations(document: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert parse_config(yaml.safe_load(block)).rounds > 0
