"""Only the configuration of a run decides how answers are generated; a model adds its end tokens."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.tasks.generation import Generation, generate
from fedelta.runs.export import export_run
from fedelta.runs.runner import run

SETTINGS = Generation(max_new_tokens=12)
PROMPTS = [[1, 17, 18, 19, 4], [1, 5, 6]]
OWN = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "min_new_tokens": 12,
    "repetition_penalty": 5.0,
    "suppress_tokens": [4, 5, 6, 7],
    "begin_suppress_tokens": [8, 9, 10],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 2,
    "bad_words_ids": [[5]],
    "sequence_bias": [[[6], 10.0]],
    "no_repeat_ngram_size": 1,
    "num_beams": 4,
    "num_return_sequences": 2,
    "penalty_alpha": 0.5,
    "guidance_scale": 2.0,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "return_dict_in_generate": True,
    "cache_implementation": "no-such-cache",
    "eos_token_id": [2, 99999, "x"],
}


def answers(folder: Path) -> list[str]:
    settings = ModelSettings(name=str(folder))
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, 0, tokenizer, 0, "completion")
    return generate(LoraModel(base, LoraSettings(target_modules="all-linear")), tokenizer, PROMPTS, SETTINGS)


def test_no_field_of_a_models_own_generation_configuration_changes_an_answer(copy_of: Any, architecture: Any) -> None:
    plain = answers(architecture("llama"))
    for i, names in enumerate([["min_new_tokens"], ["stop_strings"], ["eos_token_id"], [*OWN]]):
        folder = copy_of("llama", str(i), generation_config={name: OWN[name] for name in names})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert answers(folder) == plain, names
        lines = [str(warning.message) for warning in said if warning.category.__name__ == "ModelWarning"]
        assert len(lines) == (names != ["eos_token_id"]), names
        assert not lines or f"only the end tokens are used, not {sorted(names)[0]}" in lines[0]


@pytest.mark.parametrize("content", ["{", "[1]", "", '{"temperature": }', "\ud800".encode("utf-8", "surrogatepass")])
def test_a_generation_configuration_that_is_not_json_is_said_and_not_used(
    content: str | bytes, copy_of: Any, architecture: Any
) -> None:
    folder = copy_of("llama")
    (folder / "generation_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="it is not used"):
        assert answers(folder) == answers(architecture("llama"))


def test_every_end_token_of_a_model_ends_an_answer(copy_of: Any, architecture: Any) -> None:
    words = answers(architecture("llama"))[0].split()
    tokenizer = load_tokenizer(ModelSettings(name=str(architecture("llama"))))
    end = tokenizer.convert_tokens_to_ids(words[1])
    first = words.index(words[1])
    folder = copy_of("llama", generation_config={"eos_token_id": [2, end]})
    assert answers(folder)[0].split() == words[: first + 1]


def test_the_exported_model_generates_as_it_was_evaluated(copy_of: Any, causal_config: Any, tmp_path: Path) -> None:
    """Fields for generation in config.json, where old models keep them, do not prevent an export either."""
    folder = copy_of("llama", generation_config=OWN, config={"repetition_penalty": 3.0, "max_length": 20})
    config = causal_config(model={"name": str(folder)}, rounds=1, partition={"clients": 2}, training={"steps": 1})
    with pytest.warns(UserWarning, match="only the end tokens are used"):
        run(config)
    export_run(config.folder, None, tmp_path / "merged")
    own = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert not set(own) & {"temperature", "repetition_penalty", "suppress_tokens"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id == [2]
