"""Tokenizer, model, generation and export agree on the padding token."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from causal import build_tokenizer
from fedelta.errors import FedeltaError
from fedelta.learning.data.examples import Examples
from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer
from fedelta.learning.model.padding import longest_text, with_padding
from fedelta.learning.model.token_check import check_tokens
from fedelta.runs.export import export_run
from fedelta.runs.runner import run

TEXTS = [
    "<s> the color of ship",
    "<s> red",
    "<s> the <pad> color <pad>",
    "<s> a small old barn is brown . </s>",
    "blue </s> <pad>",
]


def classifier(folder: Path) -> tuple[Any, Any]:
    settings = ModelSettings(name=str(folder))
    tokenizer = load_tokenizer(settings)
    return load_base(settings, 3, tokenizer, 0).eval(), tokenizer


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    features = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    batch = Examples(features, [0] * len(texts)).batch(range(len(texts)), tokenizer)
    batch.pop("labels")
    return model(**batch).logits


PADDING = [0, 2, 5, None, 999, -1]


@pytest.mark.parametrize("configured", PADDING)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "opt"])
def test_the_logits_of_a_text_are_the_same_alone_and_in_any_batch(
    name: str, configured: int | None, copy_of: Any
) -> None:
    model, tokenizer = classifier(copy_of(name, config={"pad_token_id": configured}))
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, tokenizer, TEXTS), alone, rtol=1e-5, atol=1e-5)
    # The head reads the last token that is not padding.
    bare = torch.cat([logits(model, tokenizer, [text.replace(" <pad>", "")]) for text in (TEXTS[1], TEXTS[4])])
    torch.testing.assert_close(alone[[1, 4]], bare, rtol=1e-5, atol=1e-5)


def test_a_nested_configuration_learns_the_padding_token(copy_of: Any) -> None:
    folder = copy_of("gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pad_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = classifier(folder)
    assert model.config.get_text_config().pad_token_id == 0
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, tokenizer, TEXTS), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"pad_token": None, "eos_token": "</s>"}, "</s>"),
        ({"pad_token": None, "eos_token": None, "unk_token": "<unk>"}, "<unk>"),
        ({"pad_token": None, "eos_token": None, "unk_token": None, "bos_token": "<s>"}, "<s>"),
    ],
)
def test_a_tokenizer_pads_with_a_token_that_the_model_has(tokens: dict, expected: str, architecture: Any) -> None:
    from transformers import AutoConfig

    tokenizer = build_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    config = AutoConfig.from_pretrained(architecture("llama"))
    config.pad_token_id = None
    assert with_padding(tokenizer, config).pad_token == expected


def test_a_padding_token_beyond_the_embedding_is_replaced_and_said(copy_of: Any) -> None:
    """As after `add_special_tokens({"pad_token": "[PAD]"})` without resizing the model."""
    folder = copy_of("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="padding token has number 26, but the model has 26 tokens; </s> fills"):
        model, tokenizer = classifier(folder)
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS[:2]])
    torch.testing.assert_close(logits(model, tokenizer, TEXTS[:2]), alone)


def test_texts_in_a_batch_have_a_mask_whatever_the_tokenizer_returns(copy_of: Any) -> None:
    folder = copy_of("bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.save_pretrained(folder)
    model, tokenizer = classifier(folder)
    alone = torch.cat([logits(model, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(model, tokenizer, TEXTS), alone, rtol=1e-5, atol=1e-5)


def test_a_model_that_counts_positions_from_its_padding_keeps_it(copy_of: Any) -> None:
    model, tokenizer = classifier(copy_of("roberta"))
    assert (model.config.pad_token_id, tokenizer.pad_token_id) == (1, 0)
    texts = [text for text in TEXTS if "<pad>" not in text]
    alone = torch.cat([logits(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(logits(model, tokenizer, texts), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "longest"), [("roberta", 62), ("bert", 64), ("bart", 64), ("opt", 64), ("gpt2", 64), ("gemma3", 64)]
)
def test_the_longest_text_is_what_the_positions_of_the_model_allow(name: str, longest: int, architecture: Any) -> None:
    model, tokenizer = classifier(architecture(name))
    tokenizer.model_max_length = 10**30
    assert longest_text(model, tokenizer) == longest
    tokens = torch.full((1, longest), 6)
    tokens[:, -1] = 2  # BART's head reads here.
    assert model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.isfinite().all()


def test_the_exported_models_of_a_decoder_with_another_padding_token_agree(
    copy_of: Any, tiny_config: Any, tmp_path: Path
) -> None:
    folder = copy_of("llama", config={"pad_token_id": 5})
    config = tiny_config(model={"name": str(folder)}, rounds=1, lora={"alpha": 8, "target_modules": "all-linear"})
    finished = run(config)
    export_run(config.folder, None, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    plain = peft.PeftModel.from_pretrained(plain, str(finished.folder.adapter_folder)).eval()
    together = logits(merged, tokenizer, TEXTS)
    alone = torch.cat([logits(merged, tokenizer, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, logits(plain, tokenizer, TEXTS), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_only_if_a_text_uses_them(architecture: Any) -> None:
    settings = ModelSettings(name=str(architecture("llama")))
    tokenizer = load_tokenizer(settings)
    model = load_base(settings, 0, tokenizer, 0, "completion")
    tokenizer.add_tokens(["<extra>"])
    used = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("red", "red <extra>")]
    check_tokens(model, tokenizer, {"train": Examples(used[:1], [0])})
    found = r"train text 2 holds token 26 \('<extra>'\), but the model has 26 tokens and its tokenizer 27"
    with pytest.raises(FedeltaError, match=found):
        check_tokens(model, tokenizer, {"train": Examples(used, [0, 0])})
