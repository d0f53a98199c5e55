"""Which layers get LoRA in a mixture of experts, and what is said about the others."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from architectures import CLASSIFIERS, DECODERS
from causal import TASK
from fedelta.errors import FedeltaError
from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.training.loss import row_losses
from fedelta.runs.assemble import prepare
from fedelta.runs.export import export_run
from fedelta.runs.runner import run


def model_of(folder: Path, targets: Any) -> LoraModel:
    settings = ModelSettings(name=str(folder))
    base = load_base(settings, 0, load_tokenizer(settings), 0, "completion")
    return LoraModel(base, LoraSettings(target_modules=targets))


@pytest.mark.parametrize(("name", "share"), [("mixtral", 83), ("qwen3-moe", 54)])
def test_all_linear_says_which_share_of_a_mixture_of_experts_it_leaves_out(
    name: str, share: int, architecture: Any
) -> None:
    said = (
        rf"the routed experts \(model\.layers\.0\.mlp\.experts\.gate_up_proj, …\), {share}% of all weights, get no LoRA"
    )
    with pytest.warns(UserWarning, match=said):
        model = model_of(architecture(name), "all-linear")
    assert {layer.rpartition(".")[2] for layer in model.shapes} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = sum(p.numel() for n, p in model.peft.named_parameters() if "experts" in n)
    total = sum(p.numel() for n, p in model.peft.named_parameters() if "lora_" not in n)
    assert round(100 * experts / total) == share
    with pytest.warns(UserWarning, match=said):
        assert model_of(architecture(name), r".*\.(q|v)_proj").shapes.keys() < model.shapes.keys()


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj", "gate_proj", "up_proj", "down_proj"),
        ("q_proj", "w1"),
        ("down_proj",),
        ("gate",),
        r".*experts.*",
        r".*_proj",
    ],
)
def test_names_of_routed_experts_are_refused(name: str, targets: Any, architecture: Any) -> None:
    with pytest.raises(FedeltaError, match=r"lora\.target_modules: \S+ names routed experts, one parameter per layer"):
        model_of(architecture(name), targets)


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


SLOW = [
    pytest.param(name, kind, marks=pytest.mark.slow)
    for name in (*DECODERS, *CLASSIFIERS)
    for kind in ("completion", "classification")
    if not (kind == "completion" and name in CLASSIFIERS)
]


@pytest.mark.filterwarnings("ignore:lora.target_modules")
@pytest.mark.parametrize(
    ("name", "kind"), [("gemma3", "completion"), ("mixtral", "completion"), ("bart", "classification"), *SLOW]
)
def test_a_run_its_adapter_in_plain_peft_and_its_merged_model_agree(
    name: str, kind: str, architecture: Any, tiny_config: Any, causal_config: Any, tmp_path: Path
) -> None:
    folder = architecture(name)
    changes: dict[str, Any] = {
        "model": {"name": str(folder)},
        "rounds": 1,
        "method": "fedex",
        "lora": {"alpha": 8, "target_modules": "all-linear"},
        "partition": {"clients": 2},
        "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.01},
    }
    changes |= {"task": TASK | {"generate": {"max_new_tokens": 4, "limit": 4}}} if kind == "completion" else {}
    make = causal_config if kind == "completion" else tiny_config
    config = make(**changes)
    finished = run(config)
    export_run(config.folder, tmp_path / "adapter", tmp_path / "merged")
    completes = kind == "completion"
    auto, options = (AutoModelForCausalLM, {}) if completes else (AutoModelForSequenceClassification, {"num_labels": 3})
    tokens = torch.randint(3, 26, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 2  # Where the head of an encoder with a decoder reads.
    plain = peft.PeftModel.from_pretrained(auto.from_pretrained(folder, **options), str(tmp_path / "adapter"))
    merged = auto.from_pretrained(tmp_path / "merged")
    base = auto.from_pretrained(folder, **options)
    torch.testing.assert_close(logits(plain, tokens), logits(merged, tokens), rtol=1e-4, atol=1e-5)
    if completes:
        assert (logits(plain, tokens) - logits(base, tokens)).abs().max() > 1e-4, "the model has learned"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id is not None
    # Each test text alone, in plain transformers, has the loss that the run computed in padded batches.
    _, data = prepare(config)
    rows = [data.test.batch([row], load_tokenizer(config.model)) for row in range(len(data.test))]
    losses = [row_losses(logits(merged, batch["input_ids"]), batch["labels"]) for batch in rows]
    loss = sum(float(loss.sum()) for loss, _ in losses) / sum(float(weight.sum()) for _, weight in losses)
    assert loss == pytest.approx(finished.result["test"]["loss"], rel=1e-5)
