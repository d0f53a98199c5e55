"""A site that comes back to a run with other rows, or with damaged files, says so at the site and is not taken."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedelta.errors import FedeltaError
from fedelta.flower.agreement import shared_settings
from fedelta.flower.site.site_trainer import SiteTrainer


@pytest.fixture
def site(tiny_config: Any, texts: Path, tmp_path: Path) -> Callable[..., SiteTrainer]:
    """A function that starts the trainer of a site."""
    rows = shutil.copy(texts, tmp_path / "rows.csv")

    def start(**options: Any) -> SiteTrainer:
        return SiteTrainer(
            tiny_config(), str(rows), 2, "north", tmp_path / "identity.json", tmp_path / "kept", **options
        )

    return start


def question(site: SiteTrainer, run: str = "1") -> dict[str, Any]:
    return {"settings": shared_settings(site.config), "classes": ["land", "sea", "sky"], "run": run, "client": "north"}


def test_a_site_with_other_rows_is_refused_in_the_same_run_only(
    site: Callable[..., SiteTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = site()
    assert first.handle_query({}, question(first))["clients"] == ["north"]
    again = site()
    assert again.handle_query({}, question(again))["clients"] == ["north"]
    rows = tmp_path / "rows.csv"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:201]))
    changed = site()
    capsys.readouterr()
    with pytest.raises(FedeltaError, match="^the rows or the base model of this site have changed since") as raised:
        changed.handle_query({}, question(changed))
    # The numbers are shown at the site, and not sent to the server.
    assert "200" not in str(raised.value)
    assert "training rows changed: 200 rows, were 240" in capsys.readouterr().out
    assert changed.handle_query({}, question(changed, run="2"))["clients"] == ["north"]
    first.handle_query({}, question(first))
    accepting = site(accept_changed_data=True)
    assert accepting.handle_query({}, question(accepting))["clients"] == ["north"]


def test_what_a_client_keeps_is_checked_when_it_is_read(site: Callable[..., SiteTrainer], tmp_path: Path) -> None:
    trainer = site()
    trainer.handle_query({}, question(trainer))
    file = tmp_path / "kept" / "north.safetensors"
    file.write_bytes(b"\x00" * 100)
    with pytest.raises(FedeltaError, match="what north has kept from earlier rounds is damaged"):
        trainer._recall("north", file, 0)
