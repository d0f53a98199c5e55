"""Support for GPUs as far as a CPU can test it: device errors, deterministic flags, and the stopwatch."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from fedelta.errors import FedeltaError
from fedelta.federation.engines import Observer
from fedelta.federation.engines.rounds import explain
from fedelta.federation.engines.workers import can_fork
from fedelta.learning.device import DeviceError, deterministic, device_errors
from fedelta.learning.model import base_model
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.learning.training import train
from fedelta.learning.training.stopwatch import Stopwatch
from fedelta.runs.assemble import prepare
from fedelta.runs.runner import run


class Warnings(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines.")


def out_of_cpu_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    )


def no_kernel(*_: Any, **__: Any) -> Any:
    raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set …")


def no_workspace(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "this operation is not deterministic because it uses CuBLAS; set CUBLAS_WORKSPACE_CONFIG=:4096:8"
    )


@pytest.fixture
def fails_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, Any], None]:
    """Make the model's forward pass fail, in training or in evaluation."""

    def fail(training: bool, error: Any) -> None:
        true = BertForSequenceClassification.forward

        def forward(self: Any, *arguments: Any, **named: Any) -> Any:
            return error() if self.training == training else true(self, *arguments, **named)

        monkeypatch.setattr(BertForSequenceClassification, "forward", forward)

    return fail


def error_of(config: Any) -> str:
    """Message of the device error that ends a run."""
    with pytest.raises(DeviceError) as caught:
        run(config)
    return str(caught.value)


def test_running_out_of_memory_in_training_ends_the_run_in_one_line(tiny_config: Any, fails_in: Any) -> None:
    """The client is not skipped as one that failed, because every other client would fail too."""
    fails_in(True, out_of_memory)
    assert error_of(tiny_config()) == (
        "out of memory while client-000 trains; to need less, lower training.micro_batch_size (now 8) or "
        "lower data.max_length or set model.gradient_checkpointing: true or set model.dtype: bfloat16"
    )


def test_the_advice_omits_settings_that_are_already_in_use(tiny_config: Any, tiny_bert: Path, fails_in: Any) -> None:
    fails_in(True, out_of_memory)
    model = {"name": str(tiny_bert), "dtype": "bfloat16", "gradient_checkpointing": True}
    line = error_of(tiny_config(model=model, training={"steps": 2, "batch_size": 8, "micro_batch_size": 1}))
    assert line == "out of memory while client-000 trains; to need less, lower data.max_length"


def test_running_out_of_memory_in_evaluation_names_its_batch_size(tiny_config: Any) -> None:
    trained: list[bool] = []
    true = BertForSequenceClassification.forward

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        # Loading also runs the model in evaluation mode, so fail only after training.
        if self.training:
            trained.append(True)
        return out_of_memory() if trained and not self.training else true(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertForSequenceClassification, "forward", forward)
        line = error_of(tiny_config())
    assert line.startswith(
        "out of memory while the model is evaluated (validation); to need less, lower evaluation.batch"
    )
    assert trained


def test_the_clients_of_a_stack_without_memory_train_one_by_one_with_a_warning(
    calm_bert: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(stack: int) -> Any:
        training = {"steps": 2, "batch_size": 8, "learning_rate": 0.01, "stack": stack}
        return tiny_config(name=f"stack-{stack}", model={"name": str(calm_bert)}, training=training)

    alone = run(config(1))
    monkeypatch.setattr("fedelta.federation.client.train_stacked", out_of_memory)
    warnings = Warnings()
    together = run(config(4), observer=warnings)
    assert warnings.messages == [
        "round 0: training 4 clients one by one: out of memory while 4 clients train in one pass; "
        "to need less, lower training.stack"
    ]
    assert together.records == alone.records


def test_the_memory_of_a_failed_stack_is_freed_before_its_clients_train_one_by_one(
    calm_bert: Path, tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference to the exception would keep alive all activations of the pass that did not fit."""
    references: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def stacked(*_: Any) -> Any:
        activations = torch.zeros(10)
        references.append(weakref.ref(activations))
        return out_of_memory()

    def alone(*arguments: Any, **named: Any) -> float:
        alive.append(references[-1]() is not None)
        return train(*arguments, **named)

    monkeypatch.setattr("fedelta.federation.client.train_stacked", stacked)
    monkeypatch.setattr("fedelta.federation.client.train", alone)
    training = {"steps": 1, "batch_size": 8, "stack": 4}
    config = tiny_config(rounds=1, model={"name": str(calm_bert)}, training=training)
    gc.disable()
    try:
        run(config)
    finally:
        gc.enable()
    assert alive == [False] * 4


def test_an_operation_without_a_deterministic_kernel_names_the_setting(tiny_config: Any, fails_in: Any) -> None:
    fails_in(True, no_kernel)
    line = error_of(tiny_config())
    assert line.startswith("cumsum_cuda_kernel has no deterministic kernel on this device; set training.deterministic")


def test_a_product_before_the_deterministic_workspace_names_the_environment_variable() -> None:
    expected = pytest.raises(DeviceError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before the first")
    with expected, device_errors("client-000 trains", []):
        no_workspace()


def test_importing_the_package_changes_nothing_in_the_environment() -> None:
    """The variable for deterministic products is set when a model is loaded onto a GPU."""
    code = (
        "import os; before = dict(os.environ)\n"
        "import fedelta, fedelta.runs.runner, fedelta.cli\n"
        "assert dict(os.environ) == before, set(os.environ) ^ set(before)\n"
        "from fedelta.learning.device import allow_deterministic_products\n"
        "allow_deterministic_products()\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] in (':4096:8', ':16:8')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("failure", [out_of_memory, out_of_cpu_memory])
@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "set model.dtype: bfloat16 or set model.quantization: 4bit"),
        ({"dtype": "bfloat16"}, "set model.quantization: 4bit"),
    ],
)
def test_running_out_of_memory_while_loading_names_smaller_types(
    settings: dict[str, str],
    advice: str,
    failure: Callable[..., Any],
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.BertForSequenceClassification.from_pretrained", failure)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", failure)
    with pytest.raises(DeviceError) as caught:
        load_base(ModelSettings(name=str(tiny_bert), **settings), 3, AutoTokenizer.from_pretrained(tiny_bert), 0)
    assert str(caught.value) == f"out of memory while model {tiny_bert} is loaded; to need less, {advice}"


def test_other_errors_are_not_changed() -> None:
    error = RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, device_errors("client-000 trains", []):
        raise error
    assert caught.value is error
    assert not isinstance(error, FedeltaError)


def flags() -> tuple[bool, ...]:
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only, filled


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_deterministic_restores_torchs_flags(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        expected = flags()
        inside = []

        def fail() -> None:
            inside.append(flags())
            raise KeyError

        with pytest.raises(KeyError), deterministic(torch.device("cuda")):
            fail()
        assert inside == [(True, False, False)]
        assert flags() == expected
        for device, wanted in (("cpu", True), ("cuda", False)):
            with deterministic(torch.device(device), wanted):
                assert flags() == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_stopwatch_waits_at_the_end_of_each_lap() -> None:
    calls: list[int] = []
    watch = Stopwatch(lambda: calls.append(len(calls)))
    watch.lap("forward")
    watch.lap("backward")
    assert calls == [0, 1]
    assert set(watch.seconds) == {"forward", "backward"}


def test_a_timed_trainer_waits_for_its_device(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("fedelta.federation.client.synchronize", waited.append)
    trainer, _ = prepare(tiny_config())
    trainer.start_watch().lap("loading")
    assert waited == []
    trainer.timed = True
    trainer.start_watch().lap("loading")
    assert waited == [trainer.model.device]


@pytest.mark.parametrize("initialized", [False, True])
def test_a_process_can_be_forked_until_it_uses_its_gpu(initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the CPU can have workers even if the machine has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    assert can_fork() == (not initialized)


def test_a_missing_gpu_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedeltaError, match="model.device is cuda, but torch finds no CUDA device"):
        load_base(ModelSettings(name=str(tiny_bert), device="cuda"), 3, AutoTokenizer.from_pretrained(tiny_bert), 0)


def test_a_client_that_runs_out_of_memory_fails_but_its_update_is_not_bad() -> None:
    """So `on_bad_update: refuse` does not end a federation because one site is too small."""
    assert explain(DeviceError("out of memory")) == {"failed": "out of memory"}
    assert explain(FedeltaError("no rows")) == {"refused": "no rows"}
