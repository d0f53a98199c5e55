"""The files next to an adapter: names of classes, tokenizer, and a model card whose example runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedelta.federation.checkpoint import load_checkpoint
from fedelta.runs.card import adapter_card
from fedelta.runs.config import parse_config
from fedelta.runs.export import export_run
from fedelta.runs.runner import run


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the program in the card, in the card's folder."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def test_a_classifier_is_loaded_by_the_example_of_its_card(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(method="fedex", rounds=1, output=str(tmp_path / "one"))
    folder = run(config).folder.adapter_folder
    loaded = run_example(folder, monkeypatch)
    model, tokenizer = loaded["model"], loaded["tokenizer"]
    assert model.config.id2label == {0: "land", 1: "sea", 2: "sky"}
    assert model.config.label2id == {"land": 0, "sea": 1, "sky": 2}
    assert model(**tokenizer("a ship", return_tensors="pt")).logits.shape == (1, 3)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None
    assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text()


def test_a_card_has_front_matter_scores_and_a_configuration_without_paths(tiny_config: Any, tmp_path: Path) -> None:
    finished = run(tiny_config(method="fedex", rounds=1))
    folder = finished.folder.adapter_folder
    card = (folder / "README.md").read_text()
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert yaml.safe_load(front)["base_model"] == Path(finished.config.model.name).name
    assert f"| test | accuracy | {100 * finished.test['accuracy']:.2f} % |" in text
    assert "1 round with 4 clients (rank 2: " in text
    assert "fedex" in text
    assert str(tmp_path) not in card
    assert not re.search(r"client-\d", card)
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    again = parse_config(yaml.safe_load(settings))
    assert again.training == finished.config.training
    assert again.data.source == Path(finished.config.data.source).name


def test_equal_runs_write_equal_folders_and_an_export_has_the_same_files(tiny_config: Any, tmp_path: Path) -> None:
    folders = []
    for name, workers in (("one", 1), ("two", 2)):
        config = tiny_config(method="fedex", rounds=1, name=name, workers=workers, output=str(tmp_path / name))
        folders.append(run(config).folder.path)
    export_run(folders[0], tmp_path / "exported", None)
    places = (folders[0] / "adapter", folders[1] / "adapter", tmp_path / "exported")
    one, two, exported = ({file.name: file.read_bytes() for file in place.iterdir()} for place in places)
    assert one == two == exported
    assert {"README.md", "labels.json", "tokenizer.json", "tokenizer_config.json"} <= set(one)
    export_run(folders[0], tmp_path / "cut", None, rank=1)
    assert "## Scores" not in (tmp_path / "cut" / "README.md").read_text(), "they are those of the whole adapter"


def test_each_client_of_a_personal_method_has_a_card_without_the_tokenizer(tiny_config: Any) -> None:
    folder = run(tiny_config(method="fedsa", rounds=1)).folder.adapter_folder
    for client in folder.iterdir():
        assert "personal adapter of one client" in (client / "README.md").read_text()
        assert (client / "labels.json").exists()
        assert not (client / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("task", "loader"), [("regression", "num_labels=1"), ("completion", "AutoPeftModelForCausalLM")]
)
def test_other_tasks_have_an_example_of_their_own(task: str, loader: str, tiny_config: Any, tmp_path: Path) -> None:
    finished = run(tiny_config(rounds=1))
    state = load_checkpoint(finished.folder.checkpoint_file).state
    config = finished.config.model_copy(update={"task": parse_config({"task": task}).task})
    assert loader in adapter_card(config, state, 4, tmp_path, {})
