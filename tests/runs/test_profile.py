"""Profiles: FLOPs of a text, time by phase, and the limit of the machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from fedelta.cli import app as cli
from fedelta.cli.profile_table import profile_table
from fedelta.federation.engines.measure import total_gemm_rate
from fedelta.federation.engines.workers import Workers
from fedelta.learning.data import Examples
from fedelta.learning.model.activation_cache import find_activation_cache
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.learning.training.flops import TextCost, count_texts, text_cost
from fedelta.runs.profile import Limit, Profile


@pytest.mark.parametrize("training", [True, False])
def test_text_cost_predicts_counted_flops(training: bool, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model = LoraModel(load_base(ModelSettings(name=str(tiny_bert)), 3, tokenizer, seed=1), LoraSettings())
    cost = text_cost(model, tokenizer, training)
    for length in (12, 29):
        batch = Examples([{"input_ids": [4] * length}] * 2, [0, 1]).batch([0, 1], tokenizer)
        model.peft.train(training)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            loss = model.peft(**batch).loss
            if training:
                loss.backward()
        assert cost.of(count_texts([length, length])) == pytest.approx(counter.get_total_flops(), rel=0.01)
    # Six frozen products in the first layer, keys and values in the second: 2·m·n FLOPs per token, and as many for
    # gradients.
    per_token = 2 * (6 * 24 * 24 + 2 * 24 * 40)
    assert (1.5 if training else 1) * per_token < cost.linear < (3 if training else 1.5) * per_token


def test_predicting_a_token_costs_the_vocabulary_projection(causal: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(causal("llama"))
    base = load_base(ModelSettings(name=str(causal("llama"))), 0, tokenizer, seed=1, kind="completion")
    cost = text_cost(LoraModel(base, LoraSettings()), tokenizer, training=False)
    hidden, inner, words = 24, 40, base.config.vocab_size
    assert cost.linear > 2 * (2 * 3 * hidden * inner + hidden * words)


def test_the_table_shows_time_per_worker_and_waiting_time() -> None:
    counts = {"texts": 10, "tokens": 100, "squares": 1200, "padded_tokens": 125}
    counts |= {f"evaluated_{name}": 1 for name in ("texts", "tokens", "squares")}
    limit = Limit(TextCost(0.0, 1.0, 0.0), TextCost(1.0, 1.0, 1.0), 100.0, 2)
    profile = Profile({"clients": 10.0, "evaluation": 3.0}, {"forward": 12.0, "backward": 4.0}, counts, limit)
    table = profile_table(profile)
    rows = dict(
        zip(table.columns[0].cells, zip(*(column.cells for column in table.columns[1:]), strict=True), strict=True)
    )
    assert rows["  forward"] == ("6.00", "46%", "")
    assert rows["  waiting"] == ("2.00", "15%", "")
    assert rows["clients"] == ("10.00", "77%", "10%")
    assert rows["evaluation"][2] == "1%"
    assert "100 tokens trained, 25% more with padding" in str(table.caption)


@pytest.mark.parametrize("training", [True, False])
def test_cached_layers_cost_nothing(training: bool, tiny_bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    base = load_base(ModelSettings(name=str(tiny_bert)), 3, tokenizer, seed=1)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = LoraModel(base, LoraSettings(target_modules=r".*layer\.1\..*query"))
    full_cost, cached_cost = (
        text_cost(model, tokenizer, training, each) for each in (None, find_activation_cache(model, tokenizer))
    )
    # The first layer has six products, none of them in the backward pass.
    assert full_cost.linear - cached_cost.linear == pytest.approx(2 * (4 * 24 * 24 + 2 * 24 * 40), rel=0.01)


def test_total_gemm_rate_is_positive_with_one_and_two_workers() -> None:
    one, two = (total_gemm_rate(Workers(n), torch.float32, torch.device("cpu")) for n in (1, 2))
    assert one > 0
    assert two > 0


def test_a_profile_is_printed_and_written(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(workers=2).dump()))
    monkeypatch.setattr("sys.argv", ["fedelta", "run", str(file), "--profile"])
    monkeypatch.setattr(cli, "out", type(cli.out)(width=160))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    printed = capsys.readouterr().out
    profile = json.loads((tmp_path / "runs" / "tiny" / "profile.json").read_text())
    assert profile["workers"] == 2
    assert {"clients", "aggregation", "messages", "evaluation"} == set(profile["seconds"])
    assert {"forward", "backward", "batches", "optimizer", "loading", "messages"} <= set(profile["seconds_in_workers"])
    inside = sum(profile["seconds_in_workers"].values()) / 2
    assert 0 < inside < profile["seconds"]["clients"]
    counts = profile["counts"]
    assert counts["tokens"] <= counts["padded_tokens"]
    assert counts["squares"] > counts["tokens"] > counts["texts"] > 0
    assert counts["evaluated_tokens"] > 0
    assert profile["limit_seconds"]["training"] > 0
    for word in ("forward", "waiting", "of the FLOP limit", "profile.json", "workers: 2"):
        assert word in printed
