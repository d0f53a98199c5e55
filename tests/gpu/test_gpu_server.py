"""The server computes on the CPU wherever clients train, and `device: auto` finds the GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fedelta.federation.server import Server
from fedelta.learning.model.base_model import ModelSettings, load_base
from fedelta.lora.adapter import Adapter
from fedelta.protocol.messages import ClientUpdate
from fedelta.runs.assemble import prepare
from fedelta.runs.config import Config
from fedelta.runs.runner import run

pytestmark = pytest.mark.gpu


def factors(adapter: Adapter) -> list[Tensor]:
    return [factor for pair in adapter.values() for factor in (pair.A, pair.B)]


@pytest.mark.parametrize("method", ["fedex", "flexlora", "replication"])
def test_a_step_of_the_server_has_tensors_only_on_the_cpu(
    method: str, device: str, calm: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's sums are allocated on the CPU, so state, updates and patches must be there too."""
    seen: dict[str, list[Tensor]] = {"state": [], "updates": [], "patches": []}
    true = Server.step

    def watched(replies: Any) -> Iterator[Any]:
        for reply in replies:
            assert isinstance(reply.update, ClientUpdate)
            seen["updates"] += reply.update.tensors.values()
            yield reply

    def step(self: Server, state: Any, replies: Any) -> Any:
        after, outcome = true(self, state, watched(replies))
        for each in (state, after):
            seen["state"] += [*factors(each.method.adapter), *each.heads.values(), *each.method.memory.values()]
            for patch in each.log.entries.values():
                seen["patches"] += [tensor for product in patch.values() for tensor in product.tensors.values()]
        return after, outcome

    monkeypatch.setattr(Server, "step", step)
    run(calm("encoder", device, method, method=method))
    assert seen["state"]
    assert seen["updates"]
    assert bool(seen["patches"]) == (method == "fedex")
    assert {tensor.device.type for tensors in seen.values() for tensor in tensors} == {"cpu"}


def test_clients_train_on_the_device(device: str, calm: Callable[..., Config]) -> None:
    trainer, _ = prepare(calm("encoder", device, "where"))
    assert {parameter.device.type for parameter in trainer.model.peft.parameters()} == {device}


def test_auto_takes_a_gpu_if_there_is_one(device: str, tiny_bert: Path) -> None:  # noqa: ARG001
    base = load_base(ModelSettings(name=str(tiny_bert)), 3, AutoTokenizer.from_pretrained(tiny_bert), 0)
    assert base.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
