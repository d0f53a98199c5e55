"""Federated runs of causal language models, from training to export."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import Adapter, LoraPair, lora_scale
from fedelta.lora.files.peft_read import open_adapter
from fedelta.lora.patch_log import PatchedBase
from fedelta.methods import methods
from fedelta.runs.assemble import prepare
from fedelta.runs.export import export_run
from fedelta.runs.runner import Run, run


def distance(tensor: Tensor, truth: Tensor) -> float:
    return float((tensor - truth).norm() / truth.norm())


def tokens_of(folder: Path) -> Tensor:
    size = len(AutoTokenizer.from_pretrained(folder))
    return torch.randint(3, size, (6, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_float64(finished: Run, base: Path, tokens: Tensor) -> Tensor:
    """Logits of W0 + Σ patches + B·A in float64, summed densely from the server's state, whose B includes s."""
    state = load_checkpoint(finished.folder.checkpoint_file).state
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    patches = PatchedBase()
    patches.apply(state.log.since(0))
    for module, pair in state.method.adapter.items():
        assert pair.scale == 1
        delta = pair.B.double() @ pair.A.double()
        if module in patches.total:
            delta = delta + patches.total[module].double()
        layer = model.get_submodule(module)
        layer.weight += delta.T if type(layer).__name__ == "Conv1D" else delta
    return model(input_ids=tokens).logits


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits.double()


def test_lora_on_a_weight_that_two_modules_share_is_refused(causal: Any) -> None:
    """The patch of a tied output layer would also change the embedding."""
    for architecture in ("llama", "mistral"):  # The first has tied weights, the second does not.
        base = AutoModelForCausalLM.from_pretrained(causal(architecture))
        if base.config.tie_word_embeddings:
            with pytest.raises(FedeltaError, match=r"module lm_head: its weight is also model\.embed_tokens\.weight"):
                LoraModel(base, LoraSettings(target_modules=("lm_head", "q_proj")))
        else:
            model = LoraModel(base, LoraSettings(target_modules=("lm_head", "q_proj")))
            assert "lm_head" in model.shapes


def test_an_embedding_of_a_bf16_base_can_be_trained_in_full(causal_config: Any, causal: Any) -> None:
    finished = run(
        causal_config(
            "mistral",
            model={"name": str(causal("mistral")), "dtype": "bfloat16"},
            lora={"alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        )
    )
    before = AutoModelForCausalLM.from_pretrained(causal("mistral")).get_input_embeddings().weight.detach()
    plain = AutoModelForCausalLM.from_pretrained(causal("mistral"))
    plain = peft.PeftModel.from_pretrained(plain, str(finished.folder.adapter_folder))
    assert distance(plain.get_input_embeddings().weight.detach(), before) > 1e-3, "the embedding has changed"


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gpt2", "bfloat16")],
)
def test_server_model_adapter_and_merged_model_agree(
    architecture: str, dtype: str, causal: Any, causal_config: Any, tmp_path: Path
) -> None:
    """Twenty rounds with five clients of ranks 2 and 4."""
    base = causal(architecture)
    config = causal_config(
        architecture,
        rounds=20,
        evaluation={"every": 20},
        partition={"clients": 5},
        ranks={"allocation": "fixed", "low": 2, "high": 4, "share": 0.4},
        model={"name": str(base), "dtype": dtype},
    )
    finished = run(config)
    tokens = tokens_of(base)
    truth = in_float64(finished, base, tokens)
    kind = getattr(torch, dtype)
    untrained = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), tokens)
    assert distance(untrained, truth) > 0.3, "the model has learned"
    # The rounding error of the type itself, on the unchanged base.
    rounding = distance(logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=kind), tokens), untrained)
    assert rounding < (1e-5 if dtype == "float32" else 5e-2)

    state = load_checkpoint(finished.folder.checkpoint_file).state
    trainer, _ = prepare(config)
    adapter = state.method.adapter
    trainer.model.load(adapter.with_scale(lora_scale(8, adapter.rank, "alpha/r")), {})
    without = distance(logits_of(trainer.model.peft, tokens), truth)
    trainer.catch_up(state.log.since(0))
    export_run(config.folder, None, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=kind)
    logits_by_form = {
        "server": logits_of(trainer.model.peft, tokens),
        "adapter": logits_of(peft.PeftModel.from_pretrained(plain, finished.folder.adapter_folder), tokens),
        "merged": logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=kind), tokens),
    }
    for form, logits in logits_by_form.items():
        assert distance(logits, truth) < 3 * rounding < without, form


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_every_architecture_trains_and_exports(
    architecture: str, causal: Any, causal_config: Any, tmp_path: Path
) -> None:
    """LoRA on all linear layers, then both exports, loaded by plain PEFT and transformers."""
    base = causal(architecture)
    config = causal_config(architecture)
    finished = run(config)
    assert finished.records[-1]["validation"]["loss"] < finished.records[0]["train_loss"]
    written = open_adapter(finished.folder.adapter_folder)
    assert written.config["task_type"] == "CAUSAL_LM"
    assert not written.config["modules_to_save"]
    assert not any("lm_head" in module for module in written.read())
    export_run(config.folder, None, tmp_path / "merged")
    tokens = tokens_of(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapter = logits_of(peft.PeftModel.from_pretrained(plain, finished.folder.adapter_folder), tokens)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
    torch.testing.assert_close(adapter, merged, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(adapter, in_float64(finished, base, tokens), rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"


@pytest.mark.parametrize("name", methods())
def test_every_method_trains_a_language_model(name: str, causal_config: Any) -> None:
    ranks = {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5}
    if not methods()[name].mixed_ranks:
        ranks = {"allocation": "uniform", "high": 4}
    finished = run(causal_config(method=name, ranks=ranks, rounds=3))
    assert finished.result["test"]["loss"] < 0.95 * finished.records[0]["train_loss"]


@pytest.mark.parametrize(("bits", "large"), [("8bit", False), ("4bit", True)])
def test_a_quantized_base_never_changes_and_has_a_separate_patch(
    bits: str, large: bool, causal: Any, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch of a large base stays in factors."""
    if large:
        monkeypatch.setattr("fedelta.learning.model.base_patch.MAX_DENSE_BYTES", 0)
    base = causal("llama-64")
    config = causal_config(model={"name": str(base), "dtype": "bfloat16", "quantization": bits}, rounds=4)
    finished = run(config)
    assert finished.records[-1]["validation"]["loss"] < 0.8 * finished.records[0]["train_loss"]
    assert finished.records[-1]["version"] == 4
    assert finished.result["base_parameters"] == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    state = load_checkpoint(finished.folder.checkpoint_file).state
    trainer, _ = prepare(config)
    layers = {name: layer.get_base_layer() for name, layer in trainer.model.layers.items()}
    assert all(not layer.weight.is_floating_point() for layer in layers.values())
    adapter = state.method.adapter
    trainer.model.load(adapter.with_scale(lora_scale(8, adapter.rank, "alpha/r")), {})
    tokens = tokens_of(base)
    without = logits_of(trainer.model.peft, tokens)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    trainer.catch_up(state.log.since(0))
    assert (len(trainer.base.entries), bool(trainer.base.total)) == ((4, False) if large else (0, True))
    server = logits_of(trainer.model.peft, tokens)
    assert all(torch.equal(before[name], layer.weight) for name, layer in layers.items())
    lines = export_run(config.folder, None, config.folder / "merged")
    assert lines == [
        f"merged    {config.folder / 'merged'}: into the base in full precision; the run used {bits} weights"
    ]
    # A new quantized base with the exported adapter, which includes the patch.
    plain, _ = prepare(config.model_copy(update={"method": config.method.model_copy(update={"name": "fedit"})}))
    exported = open_adapter(finished.folder.adapter_folder).read()
    plain.model.load(exported, {})
    error = distance(logits_of(plain.model.peft, tokens), server)
    assert error < 0.05 < distance(without, server)


def test_a_four_bit_base_gives_the_same_gradients_after_an_evaluation(causal: Any, causal_config: Any) -> None:
    config = causal_config(model={"name": str(causal("llama-64")), "dtype": "bfloat16", "quantization": "4bit"})
    trainer, _ = prepare(config)
    model, tokens = trainer.model, tokens_of(Path(config.model.name))
    shapes = model.shapes.items()
    model.load(Adapter({name: LoraPair(torch.randn(2, n), torch.randn(m, 2), 0.1) for name, (m, n) in shapes}), {})
    gradients = []
    for _ in range(2):
        model.peft.train()
        loss = model.peft(input_ids=tokens, labels=tokens).loss
        gradients.append(torch.autograd.grad(loss, model.parameters))
        logits_of(model.peft, tokens)
    for before, after in zip(*gradients, strict=True):
        assert float(before.norm()) > 0
        assert distance(after, before) < 0.05


def test_checkpointing_does_not_change_training(
    causal: Any, causal_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are recomputed in the backward pass, and the adapter is the same."""
    results = []
    passes: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: Tensor) -> Tensor:
        passes[-1] += self.training
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for checkpointing in (False, True):
        config = causal_config(
            name=f"run-{checkpointing}",
            model={"name": str(causal("llama")), "gradient_checkpointing": checkpointing},
        )
        passes.append(0)
        results.append(run(config))
    one, other = (open_adapter(each.folder.adapter_folder).read() for each in results)
    for module, pair in one.items():
        torch.testing.assert_close(other[module].B @ other[module].A, pair.B @ pair.A, rtol=1e-3, atol=1e-5)
    assert passes[1] == 2 * passes[0] > 0
