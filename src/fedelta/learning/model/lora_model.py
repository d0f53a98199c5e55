"""One base model with LoRA through PEFT, which loads the adapter of one client after another.

No client has a copy of the model. PEFT holds one adapter for each rank that occurs, and a client's A, B, scale and
heads are copied into it before the client trains. Clients therefore train with PEFT's own forward pass, not with a
second implementation of LoRA.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedelta.errors import FedeltaError, one_line
from fedelta.learning.model.base_patch import BasePatch
from fedelta.learning.model.dropout import use_fast_dropout
from fedelta.learning.model.heads import modules_to_train
from fedelta.learning.model.targets import lora_targets, refuse_missing_targets, refuse_shared_weights
from fedelta.learning.model.weights import library_errors
from fedelta.lora.adapter import Adapter, LoraPair, ScaleRule, draw_basis
from fedelta.settings import Settings


class LoraSettings(Settings):
    """Settings of the adapters.

    Args:
        alpha, scale: LoRA's α, and the rule for the scale s: α/r, α/√r (rsLoRA), or α itself at every rank.
        dropout: dropout probability on the input of the LoRA branch.
        target_modules: names of layers or endings of them, or `all-linear`. None takes PEFT's choice for the model.
        modules_to_save: modules that are trained in full, by name or ending. None finds everything between the
            backbone and the label, and nothing in a causal language model. PEFT always adds the last layer of a
            classifier (`classifier` or `score`).
    """

    alpha: float = Field(default=16, gt=0)
    scale: ScaleRule = "alpha/r"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None


def peft_name(rank: int) -> str:
    """PEFT's name of the adapter of this rank."""
    return f"rank-{rank}"


class LoraModel:
    """A model with LoRA whose adapter and base patch can be replaced in place.

    Args:
        base: a classifier or a causal language model.
        settings: which layers get LoRA, and which modules are trained in full.

    Attributes:
        shapes: module → (m, n) of each adapted layer, out×in.
        head_modules: names of the modules that are trained in full.
        task_type: PEFT's name for the type of the model.
        patch: the patch of the base.

    Raises:
        FedeltaError: if `settings` name a layer or module that the model lacks or that can't have LoRA.
    """

    def __init__(self, base: Any, settings: LoraSettings) -> None:
        import peft
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper
        from transformers.pytorch_utils import Conv1D

        self.settings = settings
        self._conv1d = any(isinstance(module, Conv1D) for module in base.modules())
        self.task_type = "CAUSAL_LM" if base.can_generate() else "SEQ_CLS"
        self.base_name = str(base.config._name_or_path)
        with library_errors(f"model {self.base_name}"):  # It computes logits once.
            self.head_modules = modules_to_train(base, settings.modules_to_save)
        self._targets = lora_targets(base, settings.target_modules)
        try:
            self.peft: Any = peft.get_peft_model(base, self._config(1), adapter_name=peft_name(1))
        except ValueError as error:
            if settings.target_modules is None:
                raise FedeltaError(
                    f"lora.target_modules: PEFT has no default for a {base.config.model_type} model; "
                    "name its layers, or set all-linear"
                ) from error
            raise FedeltaError(f"lora.target_modules: {one_line(error)[:200]}") from error
        except re.error as error:
            raise FedeltaError(
                f"lora.target_modules: {settings.target_modules!r} is not a valid pattern: {error}"
            ) from error
        prefix = "base_model.model."
        self.layers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.peft.named_modules()
            if isinstance(module, LoraLayer)
        }
        for name, layer in self.layers.items():
            if layer.lora_embedding_A:
                raise FedeltaError(f"module {name}: LoRA on an embedding is not supported")
            if not hasattr(layer.get_base_layer(), "weight") or layer.get_base_layer().weight.ndim != 2:
                kind = type(layer.get_base_layer()).__name__
                raise FedeltaError(f"module {name}: LoRA on a {kind} is not supported, expected a linear layer")
        refuse_missing_targets(settings.target_modules, self.layers)
        refuse_shared_weights(self.peft, self.layers)
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in sorted(self.layers.items())}
        # The heads that PEFT wrapped, which may be more than it was asked for: messages must contain all that trains.
        self._head_wrappers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.peft.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        }
        self.head_modules = sorted(self._head_wrappers)
        self.patch = BasePatch(self.layers, self.dtype)
        self._prepare_heads()
        self._use_fast_dropout()

    def _use_fast_dropout(self) -> None:
        if self.device.type == "cpu":
            use_fast_dropout(self.peft)

    def _config(self, rank: int) -> Any:
        import peft

        return peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=self.settings.dropout,
            target_modules=self._targets,
            modules_to_save=list(self.head_modules),  # A copy, because PEFT extends the list.
            fan_in_fan_out=self._conv1d,
            task_type=self.task_type,
        )

    def _prepare_heads(self) -> None:
        """Make the active heads compute in fp32, whatever type the backbone returns."""
        for wrapper in self._head_wrappers.values():
            head = wrapper.modules_to_save[self.active].float()
            head.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
            if isinstance(head, nn.Embedding):
                # The backbone follows an embedding, and expects its own type.
                head.register_forward_hook(lambda module, args, output: output.to(self.dtype))  # noqa: ARG005

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that the loaded client trains."""
        return [p for p in self.peft.parameters() if p.requires_grad]

    @property
    def base_parameters(self) -> int:
        """Number of parameters without LoRA but with heads: those that full fine-tuning would train."""
        own = [(name, p) for name, p in self.peft.named_parameters() if "lora_" not in name]
        # PEFT keeps an untrained original of each head in addition to the copies of the adapters. A byte holds two
        # four-bit numbers.
        numbers_per_element = {"Params4bit": 2}
        return sum(
            p.numel() * numbers_per_element.get(type(p).__name__, 1) for name, p in own if "modules_to_save" not in name
        )

    @property
    def device(self) -> torch.device:
        """Device of the model, on which batches must be."""
        return self.peft.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen base."""
        return self.peft.dtype

    @property
    def active(self) -> str:
        """PEFT's name of the active adapter."""
        return self.peft.active_adapter

    def head_tensors(self) -> dict[str, Tensor]:
        """Copy the active heads to the CPU: `module.parameter` → tensor, fp32."""
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, wrapper in self._head_wrappers.items()
            for key, tensor in wrapper.modules_to_save[self.active].state_dict().items()
        }

    def prepare(self, rank: int) -> None:
        """Activate PEFT's adapter of this rank. The first call for a rank creates it."""
        name = peft_name(rank)
        new = name not in self.peft.peft_config
        if new:
            self.peft.add_adapter(name, self._config(rank))
            self._use_fast_dropout()
        self.peft.set_adapter(name)
        if new:
            self._prepare_heads()

    @torch.no_grad()
    def load(
        self, adapter: Adapter, heads: Mapping[str, Tensor], train: Iterable[str] = ("A", "B"), seed: int = 0
    ) -> None:
        """Load an adapter and heads into the model, to run and train them.

        Args:
            adapter: adapter with the same rank in all modules. Its scale becomes the layers' scaling.
            heads: `module.parameter` → tensor, as `head_tensors` returns them.
            train: factors that require gradients, out of "A", "B" and "core". Heads always require them.
            seed: seed of the basis Q for "core", where B = Q·C and only the core C is trained.

        Raises:
            FedeltaError: unless every layer and head gets exactly one tensor of its shape.
        """
        if set(adapter) != set(self.layers):
            raise FedeltaError(f"adapter and model differ in module {sorted(set(adapter) ^ set(self.layers))[0]}")
        train = set(train)
        self.prepare(adapter.rank)
        for module, pair in adapter.items():
            layer = self.layers[module]
            if parametrize.is_parametrized(layer.lora_B[self.active]):
                parametrize.remove_parametrizations(layer.lora_B[self.active], "weight")
            _copy(layer.lora_A[self.active].weight, pair.A, f"A of module {module}")
            _copy(layer.lora_B[self.active].weight, pair.B, f"B of module {module}")
            layer.scaling[self.active] = pair.scale
            # This must follow set_adapter, which turns on gradients.
            layer.lora_A[self.active].weight.requires_grad_("A" in train)
            layer.lora_B[self.active].weight.requires_grad_(bool(train & {"B", "core"}))
            if "core" in train:
                basis = _Basis(draw_basis(module, pair.shape[0], pair.rank, seed).to(self.device))
                parametrize.register_parametrization(layer.lora_B[self.active], "weight", basis, unsafe=True)
        remaining = dict(heads)
        for name, wrapper in self._head_wrappers.items():
            for key, tensor in wrapper.modules_to_save[self.active].state_dict().items():
                full = f"{name}.{key}"
                if full not in remaining:
                    raise FedeltaError(f"head {full} is missing from the received heads")
                _copy(tensor, remaining.pop(full), f"head {full}")
        if remaining:
            raise FedeltaError(f"head {sorted(remaining)[0]} was received, but the model has no such head")

    def active_heads(self) -> dict[str, nn.Module]:
        """Name → module of each active head."""
        return {name: wrapper.modules_to_save[self.active] for name, wrapper in self._head_wrappers.items()}

    def live(self) -> Adapter:
        """The active A and B themselves, not copies, so that a penalty can be differentiated."""
        return Adapter(
            {
                module: LoraPair(
                    layer.lora_A[self.active].weight, layer.lora_B[self.active].weight, layer.scaling[self.active]
                )
                for module, layer in self.layers.items()
            }
        )

    def read(self) -> Adapter:
        """Copy the active A and B to the CPU, with their scale."""
        return self.live().map(
            lambda pair: LoraPair(pair.A.detach().cpu().clone(), pair.B.detach().cpu().clone(), pair.scale)
        )


class _Basis(nn.Module):
    """Parametrization B = Q·C with a fixed Q (m, r). The trained parameter is C (r, r)."""

    def __init__(self, Q: Tensor) -> None:
        super().__init__()
        self.Q = Q

    def forward(self, C: Tensor) -> Tensor:
        return self.Q @ C

    def right_inverse(self, B: Tensor) -> Tensor:
        return self.Q.T @ B


def _inputs_to_float32(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG001
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}


def _copy(target: Tensor, source: Tensor, name: str) -> None:
    if target.shape != source.shape:
        raise FedeltaError(f"{name} is {tuple(source.shape)}, the model expects {tuple(target.shape)}")
    target.copy_(source)
