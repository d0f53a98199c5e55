"""The program of the README uses a result without fedelta, and answers as fedelta does."""

import re
from typing import Any

import pytest

import fedelta
from fedelta.runs.runner import run
from paths import ROOT


def test_the_program_of_the_readme_answers_as_fedelta_does(
    tiny_config: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config(name="tickets", method="fedex"))
    section = (ROOT / "README.md").read_text().split("## New texts\n")[1]
    (program, *_) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    texts = ["a ship in the tide", "the bright moon", "old barn and field"]
    expected = fedelta.predict("runs/tickets", texts)
    found = [names["classify"](text)[0] for text in texts]
    assert [each["label"] for each in found] == list(expected["prediction"])
    assert [each["score"] for each in found] == pytest.approx(list(expected["probability"]), abs=1e-6)
