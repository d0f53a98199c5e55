"""Where the time of a run went, and the limit that it is held against."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from fedelta import cli
from fedelta.base_model import ModelSettings, load_base
from fedelta.data import Examples
from fedelta.engines.measure import total_gemm_rate
from fedelta.engines.workers import Workers
from fedelta.model import LoraModel, LoraSettings
from fedelta.training.flops import count_texts, text_cost


@pytest.mark.parametrize("training", [True, False])
def test_the_cost_of_a_text_follows_from_its_length(training: bool, tiny_bert: Path) -> None:
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
    # Six frozen products in the first layer, keys and values in the second: 2·m·n a token, as much for gradients.
    per_token = 2 * (6 * 24 * 24 + 2 * 24 * 40)
    assert (1.5 if training else 1) * per_token < cost.linear < (3 if training else 1.5) * per_token


def test_workers_multiply_together() -> None:
    one, two = (total_gemm_rate(Workers(n), torch.float32, torch.device("cpu")) for n in (1, 2))
    assert one > 0
    assert two > 0


def test_a_profile_is_printed_and_kept(
    tiny_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config(workers=2).dump()))
    monkeypatch.setattr("sys.argv", ["fedelta", "run", str(file), "--profile"])
    monkeypatch.setattr(cli, "out", type(cli.out)(width=160))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "runs" / "tiny" / "profile.json").read_text())
    assert found["workers"] == 2
    assert {"clients", "aggregation", "messages", "evaluation"} == set(found["seconds"])
    assert {"forward", "backward", "batches", "optimiser", "loading", "messages"} <= set(found["seconds_in_workers"])
    inside = sum(found["seconds_in_workers"].values()) / 2
    assert 0 < inside < found["seconds"]["clients"]
    counts = found["counts"]
    assert counts["tokens"] <= counts["padded_tokens"]
    assert counts["squares"] > counts["tokens"] > counts["texts"] > 0
    assert counts["evaluated_tokens"] > 0
    assert found["limit_seconds"]["training"] > 0
    for word in ("forward", "waiting", "of the FLOP limit", "profile.json", "workers: 2"):
        assert word in printed
