"""`fedelta aggregate` on real PEFT folders: the exact mean in a forward pass of plain PEFT, methods, mistakes."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fedelta.aggregate import step as aggregate_module
from fedelta.aggregate.step import aggregate_folders
from fedelta.cli import app as cli
from fedelta.errors import FedeltaError
from fedelta.lora.files.peft_read import open_adapter
from fedelta.methods import make_method, methods

# The package has the command under the name of its module.
cli_aggregate = sys.modules["fedelta.cli.aggregate"]
LAYERS = ["query", "intermediate.dense"]


def base(folder: Path) -> Any:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def save(folder: Path, model: Path, seed: int, conv1d: bool = False, **options: Any) -> Path:
    """Save an adapter with random weights and a random head, using PEFT."""
    targets = ["c_attn", "c_fc"] if conv1d else LAYERS
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": conv1d, **options}
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        base(model), peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **settings)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


CASES: dict[str, list[dict[str, Any]]] = {
    "equal": [{}, {}, {}],
    "mixed ranks and α": [{"r": 1, "lora_alpha": 5}, {"r": 4}, {"r": 2, "lora_alpha": 1}],
    "rsLoRA": [{"use_rslora": True, "r": 4}, {"r": 4}],
    "patterns": [
        {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"intermediate.dense": 3}},
        {"rank_pattern": {"intermediate.dense": 5}},
    ],
    "one folder": [{"r": 2}],
    "Conv1D": [{"conv1d": True}, {"conv1d": True, "r": 2}],
}


@pytest.fixture
def folders(tiny_bert: Path, tmp_path: Path) -> list[Path]:
    return [save(tmp_path / f"site-{i}", tiny_bert, i, r=r) for i, r in enumerate((2, 4, 3))]


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a PEFT model with its adapter merged in, as the plain model has them."""
    return {name: p.detach().double() for name, p in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_base_plus_result_is_the_weighted_mean_of_base_plus_adapters(
    case: str, tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """Compare merged weights, heads, and the logits of a forward pass in plain PEFT."""
    model = tiny_gpt2 if case == "Conv1D" else tiny_bert
    paths = [save(tmp_path / str(i), model, i, **options) for i, options in enumerate(CASES[case])]
    weights = [1.0, 4.0, 2.5][: len(paths)]
    aggregate_folders(paths, tmp_path / "out", weights=weights)
    mean: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, tensor in merged_weights(peft.PeftModel.from_pretrained(base(model), str(path))).items():
            mean[name] = mean.get(name, 0) + weight / sum(weights) * tensor
    result = peft.PeftModel.from_pretrained(base(model), str(tmp_path / "out"))
    tokens = torch.arange(4, 16).reshape(2, 6)
    expected = base(model).double()
    expected.load_state_dict(mean)
    with torch.no_grad():
        logits = result.eval()(tokens).logits
        assert torch.allclose(logits.double(), expected.eval()(tokens).logits, atol=1e-5)
    for name, tensor in merged_weights(result).items():
        assert torch.allclose(tensor, mean[name], atol=1e-5), name


def dense_mean(paths: list[Path], weights: list[float] | None = None) -> dict[str, Tensor]:
    weights = weights or [1.0] * len(paths)
    total: dict[str, Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for module, pair in open_adapter(path).read().items():
            product = pair.scale * pair.B.double() @ pair.A.double()
            total[module] = total.get(module, 0) + weight / sum(weights) * product
    return total


def dense_result(out: Path) -> dict[str, Tensor]:
    """The dense sum of adapter and base patch."""
    result = {m: pair.scale * pair.B.double() @ pair.A.double() for m, pair in open_adapter(out).read().items()}
    if (out / "base_patch.safetensors").exists():
        patch = safetensors.torch.load_file(out / "base_patch.safetensors")
        for module in result:
            if f"{module}.U" in patch:
                result[module] = result[module] + patch[f"{module}.U"].double() @ patch[f"{module}.V"].double()
    return result


def test_the_result_has_the_numerical_rank(tiny_bert: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "one", tiny_bert, 0)
    two = save(tmp_path / "two", tiny_bert, 1)
    done = aggregate_folders([one, two, one], tmp_path / "out")
    assert {report.rank for report in done.modules} == {6}, "the third folder adds no direction"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)


def test_a_requested_rank_gives_the_best_approximation_and_reports_its_error(
    folders: list[Path], tmp_path: Path
) -> None:
    done = aggregate_folders(folders, tmp_path / "out", rank=2)
    result, exact = dense_result(tmp_path / "out"), dense_mean(folders)
    for report in done.modules:
        sigma = torch.linalg.svdvals(exact[report.module])
        assert report.rank == 2
        assert report.cut == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-4)
        off = (result[report.module] - exact[report.module]).norm() / exact[report.module].norm()
        assert float(off) == pytest.approx(report.cut, rel=1e-4)


def test_deviation_is_that_of_averaging_zero_padded_factors(folders: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 2.0, 5.0]
    done = aggregate_folders(folders, tmp_path / "out", weights=weights)
    exact = dense_mean(folders, weights)
    for report in done.modules:
        B, A = 0, 0
        for path, weight in zip(folders, weights, strict=True):
            pair = open_adapter(path).read()[report.module]
            B = B + weight / 8 * torch.nn.functional.pad(pair.scale * pair.B.double(), (0, 4 - pair.rank))
            A = A + weight / 8 * torch.nn.functional.pad(pair.A.double(), (0, 0, 0, 4 - pair.rank))
        expected = float((exact[report.module] - B @ A).norm() / exact[report.module].norm())
        assert report.deviation == pytest.approx(expected, rel=1e-5)
        assert report.ranks == (2, 4)


@pytest.mark.parametrize("name", methods())
def test_every_method_runs_one_server_step_or_says_why_it_cannot(name: str, tiny_bert: Path, tmp_path: Path) -> None:
    method = make_method(name)
    ranks = (2, 4, 3) if method.mixed_ranks else (3, 3, 3)
    paths = [save(tmp_path / f"{i}", tiny_bert, i, r=r) for i, r in enumerate(ranks)]
    if method.offline:
        with pytest.raises(FedeltaError, match=f"method {name} can't run on folders: "):
            aggregate_folders(paths, tmp_path / "out", method=method)
        return
    if not method.factors(0).train >= {"A", "B"}:
        with pytest.raises(
            FedeltaError, match=f"A of module .* differs from that of .*; method {name} expects clients"
        ):
            aggregate_folders(paths, tmp_path / "out", method=method)
        share_A(paths)
    done = aggregate_folders(
        paths, tmp_path / "out", method=method, weights=None if method.norm_weighting else [1, 2, 3]
    )
    assert done.method == name
    peft.PeftModel.from_pretrained(base(tiny_bert), str(tmp_path / "out"))
    exact = dense_mean(paths, [1, 2, 3])
    result = dense_result(tmp_path / "out")
    holds = method.holds().exact
    if holds == "always" or (holds == "equal ranks" and len(set(ranks)) == 1):
        for module, matrix in exact.items():
            assert torch.allclose(result[module], matrix, atol=1e-5), module


def share_A(paths: list[Path]) -> None:
    """Give every folder the rows of A of the largest folder."""
    files = [path / "adapter_model.safetensors" for path in paths]
    all_tensors = [safetensors.torch.load_file(file) for file in files]
    largest = max(all_tensors, key=lambda tensors: sum(t.numel() for t in tensors.values()))
    for file, tensors in zip(files, all_tensors, strict=True):
        for key in tensors:
            if "lora_A" in key:
                tensors[key] = largest[key][: len(tensors[key])].clone()
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def test_a_frozen_factor_is_compared_module_by_module(tiny_bert: Path, tmp_path: Path) -> None:
    """The rank patterns cross: neither folder is the largest in every module."""
    paths = [
        save(tmp_path / "0", tiny_bert, 0, r=2, rank_pattern={"query": 4}),
        save(tmp_path / "1", tiny_bert, 1, r=3, rank_pattern={"intermediate.dense": 4}),
    ]
    files = [path / "adapter_model.safetensors" for path in paths]
    one, two = (safetensors.torch.load_file(file) for file in files)
    for key in (key for key in one if "lora_A" in key):
        small, large = sorted((one, two), key=lambda tensors: len(tensors[key]))
        small[key] = large[key][: len(small[key])].clone()
    for file, tensors in zip(files, (one, two), strict=True):
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    aggregate_folders(paths, tmp_path / "out", method=make_method("ffa"))
    result = dense_result(tmp_path / "out")
    assert all(torch.allclose(result[m], matrix, atol=1e-5) for m, matrix in dense_mean(paths).items())


def test_a_shared_B_is_compared_after_scaling(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / str(i), tiny_bert, i, lora_alpha=alpha) for i, alpha in enumerate((6, 12))]
    files = [path / "adapter_model.safetensors" for path in paths]
    one, two = (safetensors.torch.load_file(file) for file in files)
    for key in (key for key in one if "lora_B" in key):
        two[key] = one[key].clone()
    safetensors.torch.save_file(two, files[1], metadata={"format": "pt"})
    method = make_method("rolora", first="A")
    with pytest.raises(FedeltaError, match="B of module .* differs"):
        aggregate_folders(paths, tmp_path / "out", method=method)
    for key in (key for key in one if "lora_B" in key):
        two[key] = one[key] / 2
    safetensors.torch.save_file(two, files[1], metadata={"format": "pt"})
    aggregate_folders(paths, tmp_path / "out", method=method)
    result = dense_result(tmp_path / "out")
    assert all(torch.allclose(result[m], matrix, atol=1e-5) for m, matrix in dense_mean(paths).items())


def test_base_models_are_compared_with_the_first_folder_that_names_one(folders: list[Path], tmp_path: Path) -> None:
    edit_config(folders[0], base_model_name_or_path=None)
    edit_config(folders[2], base_model_name_or_path="other")
    with pytest.raises(FedeltaError, match=r"site-2: base model 'other', but .*site-1 has"):
        aggregate_folders(folders, tmp_path / "out")


def test_integer_heads_are_rounded(folders: list[Path], tmp_path: Path) -> None:
    for path in folders:
        file = path / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        tensors["base_model.model.counts"] = torch.tensor([7, 100], dtype=torch.int8)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    aggregate_folders(folders, tmp_path / "out")
    assert open_adapter(tmp_path / "out").read_heads()["counts"].tolist() == [7, 100]


def test_fedex_writes_a_patch_and_single_folds_it_in(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}", tiny_bert, i) for i in range(3)]
    exact = dense_mean(paths)
    two = aggregate_folders(paths, tmp_path / "two", method=make_method("fedex"))
    one = aggregate_folders(paths, tmp_path / "one", method=make_method("fedex"), single=True)
    assert (two.patch, one.patch) == (True, False)
    assert {(r.rank, r.patch_width) for r in two.modules} == {(3, 6)}
    assert {(r.rank, r.patch_width) for r in one.modules} == {(9, 0)}
    for out in ("one", "two"):
        result = dense_result(tmp_path / out)
        assert all(torch.allclose(result[m], matrix, atol=1e-5) for m, matrix in exact.items())
    cut = aggregate_folders(paths, tmp_path / "cut", method=make_method("fedex"), rank=2)
    assert {r.rank for r in cut.modules} == {2}
    assert not cut.patch


@pytest.mark.parametrize("name", ["fedex", "florist", "replication", None])
def test_groups_of_modules_do_not_change_the_result(
    name: str | None, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = None if name is None else make_method(name)
    aggregate_folders(folders, tmp_path / "whole", method=method)
    monkeypatch.setattr(aggregate_module, "GROUP_BYTES", 1)
    calls: list[tuple[int, int]] = []
    aggregate_folders(folders, tmp_path / "parts", method=method, progress=lambda *done: calls.append(done))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()


@pytest.mark.parametrize("method", [None, "fedex"])
def test_parallel_groups_give_the_same_bytes(
    method: str | None, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregate_module, "GROUP_BYTES", 2)
    made = make_method(method) if method else None
    aggregate_folders(folders, tmp_path / "one", method=made)
    torch.set_num_threads(2)
    try:
        counts: list[int] = []
        aggregate_folders(folders, tmp_path / "two", method=made, progress=lambda done, _: counts.append(done))
        assert counts == [1, 2, 3, 4]
        assert torch.get_num_threads() == 2
        for file in sorted((tmp_path / "one").iterdir()):
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        corrupt(folders[-1], float("nan"))
        with pytest.raises(FedeltaError, match="NaN or infinite"):
            aggregate_folders(folders, tmp_path / "three", method=made)
        assert not (tmp_path / "three").exists()
    finally:
        torch.set_num_threads(1)


def test_many_folders_use_a_dense_sum(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}", tiny_bert, i, r=4) for i in range(9)]
    for name in (None, "fedex", "flora", "flexlora"):
        out = tmp_path / f"out-{name}"
        done = aggregate_folders(paths, out, method=name and make_method(name))
        assert done.modules[0].deviation > 0.1
        if name != "flexlora":
            result = dense_result(out)
            for module, matrix in dense_mean(paths).items():
                assert torch.allclose(result[module], matrix, atol=1e-5)


def test_heads_are_averaged_by_the_same_weights_and_keep_their_dtype(tiny_bert: Path, tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}", tiny_bert, i, modules_to_save=["bert.pooler"]) for i in range(2)]
    aggregate_folders(paths, tmp_path / "out", weights=[1, 3])
    heads = [open_adapter(path).read_heads() for path in (*paths, tmp_path / "out")]
    assert len(heads[2]) == 4
    for name, tensor in heads[2].items():
        assert torch.allclose(tensor, 0.25 * heads[0][name] + 0.75 * heads[1][name], atol=1e-6)


def half(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    tensors = {key: tensor.bfloat16() for key, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def test_bf16_adapters_are_averaged_in_fp32(folders: list[Path], tmp_path: Path) -> None:
    for path in folders:
        half(path)
    aggregate_folders(folders, tmp_path / "out")
    result = dense_result(tmp_path / "out")
    assert all(torch.allclose(result[m], matrix, atol=1e-5) for m, matrix in dense_mean(folders).items())


def test_hetlora_weighs_folders_by_the_norm_of_the_whole_adapter(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregate_module, "GROUP_BYTES", 1)
    done = aggregate_folders(folders, tmp_path / "out", method=make_method("hetlora"))
    norms = [sum(float(m.norm() ** 2) for m in dense_mean([path]).values()) ** 0.5 for path in folders]
    assert [p for _, p in done.clients] == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)
    pairs = [open_adapter(path).read() for path in folders]
    result = open_adapter(tmp_path / "out").read()
    for module, pair in result.items():
        B, A = 0, 0
        for adapter, norm in zip(pairs, norms, strict=True):
            own = adapter[module]
            B = B + norm / sum(norms) * torch.nn.functional.pad(own.scale * own.B, (0, 4 - own.rank))
            A = A + norm / sum(norms) * torch.nn.functional.pad(own.A, (0, 0, 0, 4 - own.rank))
        assert torch.allclose(pair.scale * pair.B @ pair.A, B @ A, atol=1e-5)


def test_a_folder_of_the_hubs_cache_is_read(folders: list[Path], tmp_path: Path) -> None:
    cached = []
    for i, path in enumerate(folders):
        cached_model = tmp_path / f"models--owner--{i}"
        (cached_model / "snapshots").mkdir(parents=True)
        path.rename(cached_model / "snapshots" / "abc123")
        if i:
            (cached_model / "refs").mkdir()
            (cached_model / "refs" / "main").write_text("abc123\n")
            (cached_model / "snapshots" / "newer").mkdir()
        cached.append(cached_model)
    assert len(aggregate_folders(cached, tmp_path / "out").modules) == 4


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fedelta", "aggregate", *map(str, arguments)])
        patch.setattr(cli, "out", type(cli.out)(width=160))
        patch.setattr(cli, "err", type(cli.err)(stderr=True, width=160))
        patch.setattr(cli_aggregate, "out", cli.out)
        patch.setattr(cli_aggregate, "err", cli.err)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_the_command_prints_a_table_and_the_path(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, *folders, "-o", tmp_path / "out", "--weights", "1,2,3")
    assert code == 0
    for text in (
        "rank in",
        "rank out",
        "deviation",
        "MB",
        "layer.0.attention.self.query",
        "2–4",
        "exact weighted mean of 3",
    ):
        assert text in out
    assert str(tmp_path / "out") in out
    code, out, _ = run(
        capsys, *folders, "-o", tmp_path / "cut", "--method", "fedex", "--option", "target=start-relative", "--rank", 3
    )
    assert code == 0
    assert "error of the cut" in out
    assert "the cut costs a relative error of" in out


def test_json_has_every_module(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *folders, "-o", tmp_path / "out", "--method", "HLoRA", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["method"] == "flexlora"
    assert [client["weight"] for client in data["clients"]] == [1 / 3] * 3
    assert len(data["modules"]) == 4
    assert set(data["modules"][0]) == {
        "module",
        "ranks",
        "rank",
        "patch_width",
        "deviation",
        "cut",
        "distance",
        "norm",
        "bytes",
    }


def test_an_alias_names_its_method(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = run(capsys, *folders, "-o", tmp_path / "out", "--method", "RBLA")
    assert "the rule of RBLA, arXiv 2408.08699 is called replication in fedelta" in err
    assert "one step of replication" in out


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def corrupt(path: Path, value: float) -> None:
    file = path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    last = sorted(key for key in tensors if "lora_B" in key)[-1]
    tensors[last][0, 0] = value
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def to_pickle(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


MISTAKES: dict[str, tuple[Any, list[str], str]] = {
    "another base model": (
        lambda p: edit_config(p, base_model_name_or_path="other/model"),
        [],
        "base model 'other/model'",
    ),
    "DoRA": (lambda p: edit_config(p, use_dora=True), [], "use_dora is not supported"),
    "lora_bias": (lambda p: edit_config(p, lora_bias=True), [], "lora_bias is not supported"),
    "not LoRA": (lambda p: edit_config(p, peft_type="IA3"), [], "a IA3 adapter, expected LORA"),
    "fan_in_fan_out": (lambda p: edit_config(p, fan_in_fan_out=True), [], "fan_in_fan_out True"),
    "missing weights": (lambda p: (p / "adapter_model.safetensors").unlink(), [], "no adapter_model.safetensors"),
    "missing config": (lambda p: (p / "adapter_config.json").unlink(), [], "no adapter_config.json"),
    "missing folder": (shutil.rmtree, [], "no such folder"),
    "NaN": (lambda p: corrupt(p, float("nan")), [], "B holds NaN or infinite values"),
    "infinity": (lambda p: corrupt(p, float("inf")), [], "B holds NaN or infinite values"),
    "truncated": (truncate, [], "adapter_model.safetensors: "),
    "pickle": (to_pickle, [], "is a pickle, which can run code and is never loaded; open it with PEFT"),
    "a file for a folder": (lambda p: (shutil.rmtree(p), p.write_text("x")), [], "a file, expected an adapter folder"),
    "config is a list": (lambda p: (p / "adapter_config.json").write_text("[]"), [], "a list, expected names"),
    "pattern is a list": (lambda p: edit_config(p, rank_pattern=[1]), [], "rank_pattern is [1], expected names"),
    "α is NaN": (lambda p: edit_config(p, lora_alpha=float("nan")), [], "lora_alpha is nan, expected a positive"),
    "α of a module is 0": (
        lambda p: edit_config(p, alpha_pattern={"query": 0}),
        [],
        "alpha_pattern of 'query' is 0, expected positive numbers",
    ),
    "weights for norms": (None, ["--method", "hetlora", "--weights", "1,2,3"], "expected no weights"),
    "option called name": (None, ["--method", "fedex", "--option", "name=x"], "method fedex has no option 'name'"),
    "option that is not YAML": (None, ["--method", "fedex", "--option", "energy=["], "--option 'energy=['"),
    "option of many rounds": (
        None,
        ["--method", "fedex", "--option", "server_optimizer=fedadam"],
        "--option server_optimizer needs several rounds",
    ),
    "too few weights": (None, ["--weights", "1,2"], "2 weights, expected one for each of 3 folders"),
    "negative weight": (
        None,
        ["--weights", "1,-2,3"],
        "expected a number ≥ 0 for a mean; --sum takes weights",
    ),
    "weight not a number": (None, ["--weights", "1,x,3"], "--weights '1,x,3': expected numbers"),
    "weight nan": (None, ["--weights", "1,nan,3"], "expected a finite number"),
    "zero weights": (None, ["--weights", "0,0,0"], "all weights are 0"),
    "unknown method": (None, ["--method", "fedx"], "unknown method 'fedx'; did you mean 'fedex'"),
    "unknown option": (None, ["--method", "fedex", "--option", "rnk=2"], "method fedex has no option 'rnk'"),
    "option without method": (None, ["--option", "rank=2"], "--option needs a method"),
    "option without value": (None, ["--method", "fedex", "--option", "rank"], "expected key=value"),
    "unequal ranks": (None, ["--method", "fedit"], "method fedit needs equal ranks; module"),
    "method of clients": (None, ["--method", "fedsa"], "method fedsa can't run on folders"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_files(
    mistake: str, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, arguments, expected = MISTAKES[mistake]
    if damage:
        damage(folders[1])
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *folders, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not out
    if damage:
        assert str(folders[1]) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_different_heads_are_named(tiny_bert: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "1", tiny_bert, 0)
    two = save(tmp_path / "2", tiny_bert, 1, modules_to_save=["bert.pooler"])
    with pytest.raises(FedeltaError, match=r"1: no head bert.pooler.dense.bias, but .*2 has one: .* there is no mean"):
        aggregate_folders([one, two], tmp_path / "out")


def test_an_existing_output_is_not_overwritten(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FedeltaError, match="already exists"):
        aggregate_folders(folders, tmp_path / "out")
    with pytest.raises(FedeltaError, match="no adapter folders"):
        aggregate_folders([], tmp_path / "new")
