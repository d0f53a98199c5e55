"""Exported models load in plain PEFT and transformers, and reproduce the scores of the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedelta.errors import FedeltaError
from fedelta.federation.checkpoint import load_checkpoint
from fedelta.lora.adapter import Adapter, LoraPair
from fedelta.lora.files.peft_read import open_adapter
from fedelta.lora.files.vllm import vllm_line
from fedelta.lora.patch_log import PatchedBase
from fedelta.methods import methods
from fedelta.runs.export import cut_adapter, export_run, single_adapter
from fedelta.runs.runner import Run, run
from paths import ROOT

SCRIPT = ROOT / "examples" / "score_with_peft.py"


def test_rows(config: Any, finished: Run) -> list[tuple[str, int]]:
    from fedelta.learning.data.sources import load_splits

    classes = finished.result["classes"]
    split = load_splits(config.data, config.task.columns(config.data))["test"]
    return [(text, classes.index(label)) for text, label in zip(split["text"][:], split["label"][:], strict=True)]


test_rows.__test__ = False  # type: ignore[attr-defined]


def finished_run(name: str, base: Path, tiny_config: Any) -> tuple[Any, Run]:
    ranks = {"allocation": "fixed", "low": 2, "high": 4, "share": 0.5}
    if not methods()[name].mixed_ranks:
        ranks = {"allocation": "uniform", "high": 4}
    config = tiny_config(
        method=name,
        model={"name": str(base)},
        ranks=ranks,
        rounds=6,
        evaluation={"every": 6},
        training={"epochs": 3, "batch_size": 8, "learning_rate": 0.01},
    )
    return config, run(config)


def score(base: Path, adapter: Path, rows: list[tuple[str, int]]) -> float:
    """Return the accuracy of a PEFT folder, computed with plain PEFT one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        correct = [
            int(model(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).logits.argmax()) == label
            for text, label in rows
        ]
    return sum(correct) / len(rows)


@pytest.mark.parametrize("name", methods())
def test_plain_peft_reproduces_the_test_accuracy(name: str, tiny_config: Any, tiny_bert: Path) -> None:
    config, finished = finished_run(name, tiny_bert, tiny_config)
    rows = test_rows(config, finished)
    folder = finished.folder.adapter_folder
    folders = [folder] if not methods()[name].personal else sorted(folder.iterdir())
    assert len(folders) == (4 if methods()[name].personal else 1)
    accuracy = sum(score(tiny_bert, each, rows) for each in folders) / len(folders)
    assert accuracy == pytest.approx(finished.result["test"]["accuracy"], abs=1e-9)
    assert 0.2 < accuracy <= 1


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_gpt2"])
def test_a_script_without_fedelta_scores_adapter_and_merged_model_equally(
    fixture: str, tiny_config: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(fixture)
    config, finished = finished_run("fedex", base, tiny_config)
    merged = tmp_path / "merged"
    export_run(config.folder, None, merged)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in test_rows(config, finished)))
    adapter = str(finished.folder.adapter_folder)
    for arguments in ([str(base), str(rows), "--classes", "3", "--adapter", adapter], [str(merged), str(rows)]):
        printed = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments, "--max-length", "16"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        ).stdout
        texts = len(rows.read_text().splitlines())
        assert printed == f"accuracy {finished.result['test']['accuracy']:.6f} on {texts} texts\n"
    assert "fedelta" not in SCRIPT.read_text().split('"""', 2)[2], "the script must not use fedelta"


def test_a_method_without_a_global_model_exports_one_adapter_per_client(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(method="fedsa")
    run(config)
    export_run(config.folder, tmp_path / "adapters", None)
    names = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert names == ["client-000", "client-001", "client-002", "client-003"]
    products = [
        open_adapter(tmp_path / "adapters" / name).read()["bert.encoder.layer.0.attention.self.query"].product()
        for name in names
    ]
    assert all(not torch.allclose(products[0].U @ products[0].V, p.U @ p.V, atol=1e-4) for p in products[1:])
    with pytest.raises(FedeltaError, match="method fedsa has no global model"):
        export_run(config.folder, None, tmp_path / "merged")


@pytest.mark.parametrize("rounds", [1, 25])
def test_the_single_adapter_equals_the_server_weight_with_factored_and_dense_patches(
    rounds: int, tiny_config: Any
) -> None:
    finished = run(tiny_config(method="fedex", rounds=rounds))
    state, *_ = load_checkpoint(finished.folder.checkpoint_file)
    assert (state.log.total is not None) == (rounds == 25), "the two cases must cover both forms of the log"
    base = PatchedBase()
    base.apply(state.log.since(0))
    adapter = single_adapter(state, 2.0)
    for module, pair in state.method.adapter.items():
        expected = base.total[module].double() + pair.B.double() @ pair.A.double()
        exported = adapter[module].scale * adapter[module].B.double() @ adapter[module].A.double()
        assert torch.allclose(exported, expected, atol=1e-6 * float(expected.abs().max()) * 24)


def test_without_patches_the_export_is_the_global_adapter_at_the_client_scale(tiny_config: Any) -> None:
    finished = run(tiny_config(method="replication"))
    config = json.loads((finished.folder.adapter_folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["modules_to_save"] == ["bert.pooler", "classifier"]
    assert finished.result["adapter_rank"] == 4


def test_an_unchanged_module_is_exported_as_one_rank_index_of_zeros(tiny_config: Any) -> None:
    finished = run(tiny_config(method="fedex", rounds=1))
    state, *_ = load_checkpoint(finished.folder.checkpoint_file)
    first = next(iter(state.method.adapter))
    state.method.adapter.pairs[first] = LoraPair(  # type: ignore[index]
        torch.zeros_like(state.method.adapter[first].A), torch.zeros_like(state.method.adapter[first].B)
    )
    for entry in state.log.entries.values():
        entry.pop(first)  # type: ignore[attr-defined]
    pair = single_adapter(state, 1.0)[first]
    assert pair.rank == 1
    assert not (pair.B @ pair.A).any()


def test_the_merged_model_has_label_names(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config()
    run(config)
    export_run(config.folder, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "land", 1: "sea", 2: "sky"}
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_an_existing_output_is_never_overwritten(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config()
    run(config)
    with pytest.raises(FedeltaError, match="already exists"):
        export_run(config.folder, tmp_path, None)
    with pytest.raises(FedeltaError, match="no checkpoint at"):
        export_run(tmp_path / "nowhere", tmp_path / "x", None)
    assert not (tmp_path / "x").exists()


def test_an_adapter_is_cut_to_a_rank_by_eckart_young(causal_config: Any, tmp_path: Path) -> None:
    config = causal_config(rounds=3)
    finished = run(config)
    whole = open_adapter(finished.folder.adapter_folder).read()
    line, vllm = export_run(config.folder, tmp_path / "cut", None, rank=2)
    cut = open_adapter(tmp_path / "cut").read()
    assert cut.rank == 2 < whole.rank
    lost = total = 0.0
    for module, pair in whole.items():
        dense = (pair.scale * pair.B @ pair.A).double()
        U, S, V = torch.linalg.svd(dense)
        best = U[:, :2] * S[:2] @ V[:2]
        product = (cut[module].scale * cut[module].B @ cut[module].A).double()
        torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5 * float(S[0]))
        lost, total = lost + float((dense - best).norm() ** 2), total + float(dense.norm() ** 2)
    assert f"lacks {(lost / total) ** 0.5:.2%} of the update's norm" in line
    assert vllm == f"vLLM      takes it: --enable-lora --lora-modules NAME={tmp_path / 'cut'}"
    with pytest.raises(FedeltaError, match="--rank cuts the adapter of a global model"):
        export_run(config.folder, tmp_path / "x", tmp_path / "y", rank=2)


def test_an_unchanged_module_is_cut_to_one_rank_index() -> None:
    pair = LoraPair(torch.randn(3, 5), torch.zeros(4, 3))
    cut, lost = cut_adapter(Adapter({"unchanged": pair, "changed": LoraPair(torch.randn(3, 5), torch.randn(4, 3))}), 2)
    assert (cut["unchanged"].rank, cut["changed"].rank) == (1, 2)
    assert float((cut["unchanged"].B @ cut["unchanged"].A).abs().max()) == 0
    assert 0 < lost < 1


def test_export_reports_what_vllm_would_refuse(causal_config: Any, tiny_config: Any, tmp_path: Path) -> None:
    _, vllm = export_run(run(tiny_config()).folder.path, tmp_path / "heads", None)
    assert "would refuse it: modules trained whole (bert.pooler, classifier): serve the merged model" in vllm
    config = causal_config("gpt2")
    run(config)
    _, vllm = export_run(config.folder, tmp_path / "gpt2", None)
    assert "would refuse it: LoRA on Conv1D layers" in vllm
    file = tmp_path / "gpt2" / "adapter_config.json"
    plain = json.loads(file.read_text()) | {"fan_in_fan_out": False}
    for rank, words in ((16, "--enable-lora --lora"), (17, "--max-lora-rank 32"), (600, "rank 600 is above 512")):
        file.write_text(json.dumps(plain | {"r": rank}))
        assert words in vllm_line(tmp_path / "gpt2")
