"""Messages in fewer bits: what arrives is near, what is left out comes later, and no bit depends on where it ran."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedelta.errors import FedeltaError
from fedelta.protocol.compression import SCALE, Basis, ErrorFeedback, compensate, decode, encode, rounded
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
def test_what_arrives_is_within_half_a_step(precision: Any, seed: int, size: float) -> None:
    sent = message(seed, size)
    for key, tensor in rounded(sent, precision).items():
        exact = sent[key].double()
        if precision == "int8":
            # Each rank index, and each output of a head, has a scale of its own.
            across = {"A/x": 1, "B/x": 0, "core/x": 0, "tail/x/U": 0, "tail/x/V": 1, "head/weight": 1}.get(key)
            largest = exact.abs().amax(across, keepdim=True) if across is not None else exact.abs().max()
            step = largest / 127 * 0.5
        else:
            step = exact.abs() * (2.0**-8 if precision == "bfloat16" else 2.0**-11) + 3e-8
        assert tensor.dtype == torch.float32
        assert bool(((tensor.double() - exact).abs() <= step * 1.0001).all()), key


def test_int8_takes_a_byte_a_number_and_a_scale_for_each_rank_index() -> None:
    sent, changed = encode(message(0), "int8")
    assert sent["A/x"].dtype == torch.int8
    assert sent["A/x" + SCALE].shape == (3, 1)
    assert sent["B/x" + SCALE].shape == (1, 3)
    assert sent["head/bias" + SCALE].shape == (1,)
    assert set(changed.values()) == {"float32"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(precision: Any, bad: float) -> None:
    tensor = torch.ones(2, 3)
    tensor[1, 1] = bad
    assert not rounded({"A/x": tensor}, precision)["A/x"].isfinite().all()


def test_numbers_beyond_float16_are_its_largest_and_empty_or_zero_tensors_pass() -> None:
    assert rounded({"head/x": torch.tensor([1e6, -1e6])}, "float16")["head/x"].tolist() == [65504.0, -65504.0]
    for precision in PRECISIONS:
        found = rounded({"B/x": torch.zeros(4, 2), "A/y": torch.zeros(0, 5)}, precision)  # type: ignore[arg-type]
        assert torch.equal(found["B/x"], torch.zeros(4, 2))
        assert found["A/y"].shape == (0, 5)


@pytest.mark.parametrize(
    ("changed", "drop"),
    [({"A/y": "float32"}, ""), ({"A/x": "complex64"}, ""), ({"A/x": 7}, ""), ({"A/x": "float32"}, "A/x" + SCALE)],
)
def test_a_message_that_contradicts_itself_is_refused(changed: dict[str, Any], drop: str) -> None:
    sent, _ = encode({"A/x": torch.ones(2, 3)}, "int8")
    sent.pop(drop, None)
    with pytest.raises(FedeltaError, match="message"):
        decode(sent, changed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_over_the_rounds_only_the_last_remainder_is_missing(precision: Any) -> None:
    last: ErrorFeedback | None = None
    exact = arrived = torch.zeros(6, 3, dtype=torch.float64)
    for round in range(50):
        update = {"B/x": message(round)["B/x"]}
        corrected, last = compensate(update, precision, round, BASIS, last)
        exact = exact + update["B/x"].double()
        arrived = arrived + rounded(corrected, precision)["B/x"].double()
    assert torch.allclose(exact - arrived, last.after["B/x"].double(), atol=1e-2, rtol=1e-3)
    assert bool(((exact - arrived).abs() < 0.05 * message(0)["B/x"].abs().amax(0)).all())


def test_a_round_that_is_done_again_gives_the_same_message() -> None:
    _, first = compensate(message(0), "int8", 0, BASIS, None)
    once, left = compensate(message(1), "int8", 1, BASIS, first)
    again, same = compensate(message(1), "int8", 1, BASIS, left)
    for key in once:
        assert torch.equal(once[key], again[key])
        assert torch.equal(left.after[key], same.after[key])


def test_a_remainder_of_another_basis_does_not_count() -> None:
    _, first = compensate(message(0), "int8", 0, BASIS, None)
    for basis in (BASIS._replace(seed=1), BASIS._replace(rank=2), BASIS._replace(scale=1.0)):
        corrected, _ = compensate(message(1), "int8", 1, basis, first)
        assert all(torch.equal(corrected[key], tensor) for key, tensor in message(1).items())
    # Nor does one of a later round: it is of another run.
    corrected, _ = compensate(message(1), "int8", 0, BASIS, first._replace(round=5))
    assert all(torch.equal(corrected[key], tensor) for key, tensor in message(1).items())


def files(finished: Any) -> list[bytes]:
    folder = finished.folder
    adapters = sorted(folder.adapter_folder.rglob("adapter_model.safetensors"))
    return [folder.rounds_file.read_bytes(), *(adapter.read_bytes() for adapter in adapters)]


def test_fewer_bits_are_fewer_bytes_and_the_run_goes_on_as_it_went(tiny_config: Any) -> None:
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
    # Patches of the base are whole whatever the precision.
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
