"""The last layer computed for the class token only gives the same result as the whole layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.class_token import LAST_LAYER, read_class_token_alone
from fedelta.learning.model.lora_model import LoraModel, LoraSettings

BOTH = ("eager", "sdpa")


def classifier(kind: str, attention: str, **options: Any) -> Any:
    torch.manual_seed(0)
    names = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    if kind == "distilbert":
        names = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}
    if kind == "gpt2":
        names = {"n_embd": 24, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(
        kind, **names, vocab_size=50, num_labels=3, pad_token_id=0, initializer_range=0.3, **options
    )
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def padded_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens, mask = torch.randint(2, 40, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    for row, length in enumerate((7, 4, 1)):
        tokens[row, length:] = 0
        mask[row, length:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("kind", sorted(LAST_LAYER))
@pytest.mark.parametrize("padded", [True, False])
def test_logits_and_gradients_equal_those_of_the_whole_layer(kind: str, attention: str, padded: bool) -> None:
    model = classifier(kind, attention).eval()
    batch = padded_batch()
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(**batch)
        model.zero_grad()
        output.loss.backward()
        return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole_logits, whole_gradients = run()
    assert read_class_token_alone(model)
    logits, gradients = run()
    torch.testing.assert_close(logits, whole_logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == whole_gradients.keys()
    for name, expected in whole_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", sorted(LAST_LAYER))
def test_attention_has_dropout_in_training(kind: str) -> None:
    name = "attention_dropout" if kind == "distilbert" else "attention_probs_dropout_prob"
    no_other = {"dropout": 0.0} if kind == "distilbert" else {"hidden_dropout_prob": 0.0}
    model = classifier(kind, "sdpa", **no_other, **{name: 0.5})
    read_class_token_alone(model)
    layers = model.base_model.get_submodule(LAST_LAYER[kind][0])
    layers[0].eval()
    hidden = torch.randn(1, 7, 24)
    drawn = {tuple(layers[-1](hidden)[0, 0].tolist()) for _ in range(8)}
    assert len(drawn) > 1
    layers[-1].eval()
    assert len({tuple(layers[-1](hidden)[0, 0].tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("model", [classifier("gpt2", "sdpa"), classifier("bert", "sdpa", is_decoder=True)])
def test_unsupported_models_stay_unchanged(model: Any) -> None:
    with torch.no_grad():
        before = model.eval()(**padded_batch()).logits
        assert not read_class_token_alone(model)
        assert torch.equal(model(**padded_batch()).logits, before)


@pytest.mark.parametrize(("alone", "rows"), [(True, 1), (False, 7)])
def test_a_setting_decides_for_a_loaded_base(tiny_bert: Path, alone: bool, rows: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    base = load_base(ModelSettings(name=str(tiny_bert), class_token_alone=alone), 3, tokenizer, seed=1)
    model = LoraModel(base, LoraSettings(target_modules="all-linear"))
    seen = []
    base.bert.encoder.layer[-1].output.dense.register_forward_hook(lambda _m, x, _o: seen.append(x[0].shape[1]))
    model.peft(**padded_batch())
    assert seen == [rows]
