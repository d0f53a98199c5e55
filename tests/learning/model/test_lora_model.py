"""The weight that a client trains, read off PEFT's own forward pass, equals a dense oracle."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.learning.model.base_model import ModelSettings, load_base, load_tokenizer, locate_model
from fedelta.learning.model.heads import find_heads
from fedelta.learning.model.lora_model import LoraModel, LoraSettings
from fedelta.lora.adapter import Adapter, LoraPair, lora_scale
from fedelta.lora.lowrank import Dense, LowRank

BERT_HEADS = ["bert.pooler", "classifier"]


def make(folder: Path, dtype: str = "float32", **lora: object) -> LoraModel:
    settings_ = ModelSettings(name=str(folder), dtype=dtype)
    base = load_base(settings_, 3, load_tokenizer(settings_), seed=1)
    return LoraModel(base, LoraSettings(**lora))


def random_adapter(model: LoraModel, rank: int, scale: float, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LoraPair(torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator), scale)
            for name, (m, n) in model.shapes.items()
        }
    )


def weight_by_forward(model: LoraModel, module: str) -> torch.Tensor:
    """Weight of a layer, out×in, read off PEFT's forward pass of the identity."""
    layer = model.layers[module]
    model.peft.eval()
    with torch.no_grad():
        n = model.shapes[module][1]
        dtype = layer.get_base_layer().weight.dtype
        output = layer(torch.eye(n, dtype=dtype)) - layer(torch.zeros(1, n, dtype=dtype))
    return output.T.double()


def base_weight(model: LoraModel, module: str) -> torch.Tensor:
    layer = model.layers[module]
    weight = layer.get_base_layer().weight.detach().double().clone()
    return weight.T if layer.fan_in_fan_out else weight


cases = st.tuples(
    st.integers(1, 6), st.sampled_from([1.0, 8.0, 16.0]), st.sampled_from(["alpha/r", "alpha/sqrt(r)", "alpha"])
)


@pytest.mark.parametrize(
    ("fixture", "targets"),
    [("tiny_bert", ("query", "value", "intermediate.dense")), ("tiny_gpt2", ("c_attn", "c_proj"))],
)
def test_the_effective_weight_is_base_plus_patches_plus_the_scaled_product(
    fixture: str, targets: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    """Linear and Conv1D, square and not, with mixed ranks and scales one after another in the same model."""
    model = make(request.getfixturevalue(fixture), target_modules=targets)
    originals = {module: base_weight(model, module) for module in model.shapes}
    assert any(m != n for m, n in model.shapes.values())

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cases, st.integers(0, 1000))
    def check(case: tuple[int, float, str], seed: int) -> None:
        rank, alpha, rule = case
        adapter = random_adapter(model, rank, lora_scale(alpha, rank, rule), seed)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        patch = {module: torch.randn(shape, generator=generator) for module, shape in model.shapes.items()}
        model.patch.set({module: Dense(C) for module, C in patch.items()})
        model.load(adapter, model.head_tensors())
        for module, pair in adapter.items():
            oracle = originals[module] + patch[module].double() + pair.scale * pair.B.double() @ pair.A.double()
            assert torch.allclose(weight_by_forward(model, module), oracle, atol=1e-4 * float(oracle.abs().max()))

    check()
    model.patch.set({})
    model.load(random_adapter(model, 2, 0.0), model.head_tensors())
    for module, original in originals.items():
        assert torch.equal(base_weight(model, module), original), "without a patch the base has its original bits"


def test_a_bf16_base_retains_small_patches_that_folding_would_lose(tiny_bert: Path) -> None:
    model = make(tiny_bert, "bfloat16")
    module = next(iter(model.shapes))
    before = base_weight(model, module)
    model.patch.set({m: Dense(torch.full(shape, 1e-5)) for m, shape in model.shapes.items()})
    assert torch.equal(base_weight(model, module), before), "the bf16 weight itself never changes"
    model.patch.set({m: Dense(torch.full(shape, 0.5)) for m, shape in model.shapes.items()})
    model.load(random_adapter(model, 2, 0.0), model.head_tensors())
    assert torch.allclose(weight_by_forward(model, module), before + 0.5, atol=1e-2)


def test_patches_of_a_large_bf16_base_stay_factors_in_fp32(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.learning.model.base_patch.MAX_DENSE_BYTES", 0)
    assert make(tiny_bert, "float32").patch.factor_bytes == 0, "patches that are written into the weight are summed"
    model = make(tiny_bert, "bfloat16")
    assert model.patch.factor_bytes == sum(4 * m * n for m, n in model.shapes.values())
    module, (m, n) = next(iter(model.shapes.items()))
    generator = torch.Generator().manual_seed(0)
    C = LowRank(torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator))
    layer = model.layers[module].get_base_layer()
    x = torch.randn(5, n, generator=generator)
    base = layer(x.bfloat16())
    model.patch.set({module: C})
    # An fp32 input reveals any factor that was rounded to bf16.
    hook = next(iter(layer._forward_hooks.values()))
    assert torch.allclose(hook(layer, (x,), torch.zeros(5, m)), x @ C.V.T @ C.U.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer(x.bfloat16()).float(), base.float() + x @ C.V.T @ C.U.T, rtol=2e-2, atol=2e-2)
    model.patch.set({})
    assert torch.equal(layer(x.bfloat16()), base)


def test_adapters_and_heads_are_fp32_on_a_bf16_base(tiny_bert: Path) -> None:
    model = make(tiny_bert, "bfloat16")
    model.load(random_adapter(model, 3, 1.0), model.head_tensors())
    assert {p.dtype for p in model.parameters} == {torch.float32}
    output = model.peft(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1]))
    assert output.logits.dtype == torch.float32
    output.loss.backward()


def test_a_frozen_factor_has_no_gradient_and_is_not_optimized(tiny_bert: Path) -> None:
    model = make(tiny_bert)
    model.load(random_adapter(model, 3, 1.0), model.head_tensors(), train={"B"})
    model.peft(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1])).loss.backward()
    for layer in model.layers.values():
        assert layer.lora_A[model.active].weight.grad is None
        assert layer.lora_B[model.active].weight.grad is not None
        assert not any(layer.lora_A[model.active].weight is p for p in model.parameters)


def test_only_the_parameters_of_the_loaded_client_train(tiny_bert: Path) -> None:
    model = make(tiny_bert)
    for rank in (2, 5, 2):
        model.load(random_adapter(model, rank, 1.0), model.head_tensors())
        lora = sum(rank * (m + n) for m, n in model.shapes.values())
        heads = sum(t.numel() for t in model.head_tensors().values())
        assert sum(p.numel() for p in model.parameters) == lora + heads


def test_loading_another_rank_does_not_change_an_adapter(tiny_bert: Path) -> None:
    model = make(tiny_bert)
    low, high = random_adapter(model, 2, 0.5), random_adapter(model, 4, 3.0, seed=1)
    heads = model.head_tensors()
    model.load(low, heads)
    model.load(high, {name: t + 1 for name, t in heads.items()})
    model.load(low, heads)
    for module, pair in model.read().items():
        assert torch.equal(pair.A, low[module].A)
        assert pair.scale == 0.5
    assert all(torch.equal(t, heads[name]) for name, t in model.head_tensors().items())


def test_the_pooler_is_part_of_the_head(tiny_bert: Path, tiny_gpt2: Path) -> None:
    assert make(tiny_bert).head_modules == BERT_HEADS
    assert make(tiny_gpt2).head_modules == ["score"]


@pytest.mark.parametrize(
    ("architecture", "settings_", "expected"),
    [
        ("DistilBert", {"dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, ["classifier", "pre_classifier"]),
        (
            "Roberta",
            {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            ["classifier"],
        ),
        (
            "Albert",
            {
                "hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "embedding_size": 12,
            },
            ["albert.pooler", "classifier"],
        ),
        (
            "Llama",
            {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            ["score"],
        ),
    ],
)
def test_heads_are_found_in_other_architectures(architecture: str, settings_: dict, expected: list[str]) -> None:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(vocab_size=40, pad_token_id=0, num_labels=3, **settings_)
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    assert find_heads(model) == expected


def test_distilberts_lora_on_q_k_v_has_the_papers_number_of_parameters() -> None:
    """Byun & Lee report 552,960 at rank 20. The DistilBERT here is built from its configuration."""
    import transformers

    config = transformers.DistilBertConfig(num_labels=4)
    model = LoraModel(
        transformers.DistilBertForSequenceClassification(config),
        LoraSettings(target_modules=("q_lin", "k_lin", "v_lin")),
    )
    assert random_adapter(model, 20, 1.0).parameters == 552_960


def test_adapters_and_heads_that_do_not_fit_are_refused(tiny_bert: Path) -> None:
    model = make(tiny_bert)
    adapter, heads = random_adapter(model, 2, 1.0), model.head_tensors()
    first = next(iter(adapter))
    with pytest.raises(FedeltaError, match=f"adapter and model differ in module {first}"):
        model.load(Adapter({m: p for m, p in adapter.items() if m != first}), heads)
    with pytest.raises(FedeltaError, match="head classifier.bias is missing"):
        model.load(adapter, {k: v for k, v in heads.items() if k != "classifier.bias"})
    with pytest.raises(FedeltaError, match="head extra was received, but the model has no such head"):
        model.load(adapter, heads | {"extra": torch.ones(1)})
    with pytest.raises(FedeltaError, match=r"head classifier.bias is \(2,\), the model expects \(3,\)"):
        model.load(adapter, heads | {"classifier.bias": torch.ones(2)})


def test_a_new_head_depends_only_on_the_seed(tiny_bert: Path) -> None:
    settings_ = ModelSettings(name=str(tiny_bert))
    tokenizer = load_tokenizer(settings_)
    torch.manual_seed(5)
    one = load_base(settings_, 3, tokenizer, seed=7).classifier.weight
    torch.manual_seed(6)
    assert torch.equal(one, load_base(settings_, 3, tokenizer, seed=7).classifier.weight)
    assert not torch.equal(one, load_base(settings_, 3, tokenizer, seed=8).classifier.weight)


def test_the_built_in_model_is_found_in_its_installed_distribution() -> None:
    folder = Path(locate_model("minilm"))
    assert (folder / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(FedeltaError, match=r"model \./nowhere: no config.json in that folder"):
        locate_model("./nowhere")


def test_unknown_target_modules_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(FedeltaError, match="lora.target_modules"):
        make(tiny_bert, target_modules=("no_such_layer",))


def test_a_target_without_a_layer_is_refused_even_if_another_has_one(tiny_bert: Path) -> None:
    with pytest.raises(FedeltaError, match=r"lora\.target_modules: no layer's name is or ends with 'vlaue'"):
        make(tiny_bert, target_modules=("query", "vlaue"))
    assert len(make(tiny_bert, target_modules=("query", "layer.0.attention.self.value")).shapes) == 3


@pytest.mark.parametrize("pattern", ["(", "a[", "*"])
def test_an_invalid_pattern_is_refused(pattern: str, tiny_bert: Path) -> None:
    with pytest.raises(FedeltaError, match=r"lora\.target_modules: .* is not a valid pattern"):
        make(tiny_bert, target_modules=pattern)


@pytest.mark.parametrize("named", [("bert.pooler",), ("pooler",), ()])
def test_every_module_that_peft_trains_is_a_head(named: tuple[str, ...], tiny_bert: Path) -> None:
    """PEFT also trains the classifier. A trained module outside the messages would leak from client to client."""
    model = make(tiny_bert, modules_to_save=named)
    expected = BERT_HEADS if named else ["classifier"]
    assert model.head_modules == expected
    model.load(random_adapter(model, 2, 1.0), model.head_tensors())
    lora = sum(2 * (m + n) for m, n in model.shapes.values())
    assert sum(p.numel() for p in model.parameters) == lora + sum(t.numel() for t in model.head_tensors().values())


def test_an_unknown_module_to_save_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(FedeltaError, match="lora.modules_to_save: the model has no module 'nothing'"):
        make(tiny_bert, modules_to_save=("nothing",))


def test_a_model_without_its_tokenizer_is_refused(tiny_bert: Path) -> None:
    settings_ = ModelSettings(name=str(tiny_bert))
    tokenizer = load_tokenizer(settings_)
    tokenizer.__class__.__len__, before = (lambda _: 5), tokenizer.__class__.__len__
    try:
        with pytest.raises(FedeltaError, match="its tokenizer has 5 tokens, the model"):
            load_base(settings_, 3, tokenizer, seed=0)
    finally:
        tokenizer.__class__.__len__ = before
