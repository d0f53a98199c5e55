"""Compressed messages: bounded rounding errors, error feedback, and results that do not depend on the engine."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.protocol.compression import SCALE, Basis, Encoded, ErrorFeedback, compensate, decode, encode, rounded
from fedelta.protocol.messages import ClientUpdate
from fedelta.runs.runner import run

PRECISIONS = ("bfloat16", "float16", "int8")
BASIS = Basis(0, 3, 2.0)


def message(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator)

    return {
        "A/x": draw(3, 8),
        "B/x": draw(6, 3) * torch.tensor([1.0, 1e-3, 1e2]),
        "core/x": draw(3, 3),
        "tail/x/U": draw(6, 2),
        "tail/x/V": draw(2, 8),
        "head/weight": draw(4, 6),
        "head/bias": draw(4),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_the_rounding_error_is_at_most_half_a_step(precision: Any, seed: int, size: float) -> None:
    sent = message(seed, size)
    for key, tensor in rounded(sent, precision).items():
        exact = sent[key].double()
        if precision == "int8":
            # Each rank index, and each output of a head, has its own scale.
            across = {"A/x": 1, "B/x": 0, "core/x": 0, "tail/x/U": 0, "tail/x/V": 1, "head/weight": 1}.get(key)
            largest = exact.abs().amax(across, keepdim=True) if across is not None else exact.abs().max()
            step = largest / 127 * 0.5
        else:
            step = exact.abs() * (2.0**-8 if precision == "bfloat16" else 2.0**-11) + 3e-8
        assert tensor.dtype == torch.float32
        assert bool(((tensor.double() - exact).abs() <= step * 1.0001).all()), key


def test_int8_takes_one_byte_per_number_and_one_scale_per_rank_index() -> None:
    sent, dtypes = encode(message(0), "int8")
    assert sent["A/x"].dtype == torch.int8
    assert sent["A/x" + SCALE].shape == (3, 1)
    assert sent["B/x" + SCALE].shape == (1, 3)
    assert sent["head/bias" + SCALE].shape == (1,)
    assert set(dtypes.values()) == {"float32"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_survive_compression(precision: Any, bad: float) -> None:
    tensor = torch.ones(2, 3)
    tensor[1, 1] = bad
    assert not rounded({"A/x": tensor}, precision)["A/x"].isfinite().all()


def test_numbers_beyond_float16_are_clamped_and_empty_or_zero_tensors_pass() -> None:
    assert rounded({"head/x": torch.tensor([1e6, -1e6])}, "float16")["head/x"].tolist() == [65504.0, -65504.0]
    for precision in PRECISIONS:
        received = rounded({"B/x": torch.zeros(4, 2), "A/y": torch.zeros(0, 5)}, precision)  # type: ignore[arg-type]
        assert torch.equal(received["B/x"], torch.zeros(4, 2))
        assert received["A/y"].shape == (0, 5)


@pytest.mark.parametrize(
    ("dtypes", "drop"),
    [({"A/y": "float32"}, ""), ({"A/x": "complex64"}, ""), ({"A/x": 7}, ""), ({"A/x": "float32"}, "A/x" + SCALE)],
)
def test_a_message_that_contradicts_itself_is_refused(dtypes: dict[str, Any], drop: str) -> None:
    sent, _ = encode({"A/x": torch.ones(2, 3)}, "int8")
    sent.pop(drop, None)
    with pytest.raises(FedeltaError, match="message"):
        decode(sent, dtypes)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_over_the_rounds_only_the_last_rounding_error_is_missing(precision: Any) -> None:
    last: ErrorFeedback | None = None
    exact = received = torch.zeros(6, 3, dtype=torch.float64)
    for round in range(50):
        update = {"B/x": message(round)["B/x"]}
        encoded, last = compensate(update, precision, round, BASIS, last)
        exact = exact + update["B/x"].double()
        received = received + decode(*encoded)["B/x"].double()
    assert torch.allclose(exact - received, last.after["B/x"].double(), atol=1e-2, rtol=1e-3)
    assert bool(((exact - received).abs() < 0.05 * message(0)["B/x"].abs().amax(0)).all())


def sums(encoded: Encoded, feedback: ErrorFeedback) -> dict[str, torch.Tensor]:
    """The tensors before they were encoded: what the receiver decodes, plus the rounding error."""
    return {key: tensor + feedback.after[key] for key, tensor in decode(*encoded).items()}


def test_a_repeated_round_gives_the_same_message() -> None:
    _, first = compensate(message(0), "int8", 0, BASIS, None)
    once, feedback = compensate(message(1), "int8", 1, BASIS, first)
    again, same = compensate(message(1), "int8", 1, BASIS, feedback)
    assert once.tensors.keys() == again.tensors.keys()
    for key in once.tensors:
        assert torch.equal(once.tensors[key], again.tensors[key])
    for key in message(1):
        assert torch.equal(feedback.after[key], same.after[key])


def test_feedback_of_another_basis_or_of_a_later_round_is_not_used() -> None:
    _, first = compensate(message(0), "int8", 0, BASIS, None)
    plain = encode(message(1), "int8")
    others = [(1, basis) for basis in (BASIS._replace(seed=1), BASIS._replace(rank=2), BASIS._replace(scale=1.0))]
    for round, basis in [*others, (0, BASIS)]:
        # A feedback of a later round belongs to another run.
        last = first._replace(round=5) if basis == BASIS else first
        encoded, feedback = compensate(message(1), "int8", round, basis, last)
        assert all(torch.equal(encoded.tensors[key], tensor) for key, tensor in plain.tensors.items())
        assert not feedback.before
        for key, tensor in sums(encoded, feedback).items():
            assert torch.allclose(tensor, message(1)[key], rtol=1e-6, atol=1e-6)


def test_an_update_of_encoded_tensors_has_the_bytes_of_one_that_encodes_them_itself() -> None:
    factors = {"A": {"x": message(0)["A/x"]}, "B": {"x": message(0)["B/x"]}}
    update = ClientUpdate("a", 0, 3, 2.0, 0, "", 5, factors, {}, {"train_loss": 0.5}, "int8")
    encoded, _ = compensate(update.tensors, "int8", 0, BASIS, None)
    assert update.to_bytes(encoded) == update.to_bytes()


def files(finished: Any) -> list[bytes]:
    folder = finished.folder
    adapters = sorted(folder.adapter_folder.rglob("adapter_model.safetensors"))
    return [folder.rounds_file.read_bytes(), *(adapter.read_bytes() for adapter in adapters)]


def test_compression_saves_bytes_and_hardly_changes_the_training(tiny_config: Any) -> None:
    runs = {p: run(tiny_config(name=p, method="fedex", federation={"precision": p})) for p in ("float32", *PRECISIONS)}
    numbers = {
        precision: [
            sum(record[way][part] for record in each.records for part in ("adapter", "heads"))
            for way in ("bytes_down", "bytes_up")
        ]
        for precision, each in runs.items()
    }
    for way in (0, 1):
        assert numbers["bfloat16"][way] == numbers["float16"][way] == numbers["float32"][way] / 2
        assert 0.25 < numbers["int8"][way] / numbers["float32"][way] < 0.45
    # Patches of the base are not compressed.
    for each in runs.values():
        assert each.records[-1]["bytes_down"]["patch"] == runs["float32"].records[-1]["bytes_down"]["patch"]
        assert each.records[-1]["train_loss"] == pytest.approx(runs["float32"].records[-1]["train_loss"], rel=0.02)


@pytest.mark.parametrize("method", ["fedex", "flexlora", "ffa", "rolora", "hetlora", "fedsa"])
def test_rounded_messages_do_not_depend_on_workers_or_a_resume(method: str, tiny_config: Any) -> None:
    changes = {"method": method, "federation": {"precision": "int8", "participation": 0.75}}
    if method in ("ffa", "rolora", "fedsa"):
        changes["ranks"] = {"high": 4}
    whole = run(tiny_config(name="whole", rounds=4, **changes))
    assert files(run(tiny_config(name="two", rounds=4, workers=2, **changes))) == files(whole)
    run(tiny_config(name="parts", rounds=2, **changes))
    assert files(run(tiny_config(name="parts", rounds=4, **changes), resume=True))[1:] == files(whole)[1:]
