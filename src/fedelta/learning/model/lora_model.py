"""One base model with LoRA through PEFT, into which clients' adapters are swapped in place.

No client gets a copy of the model: for each rank that occurs PEFT holds one adapter, and a client's A, B,
scale and heads are copied into it before it trains. What a client trains is therefore PEFT's own forward
pass, not a second implementation of LoRA.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedelta.errors import FedeltaError
from fedelta.learning.model.base_model import modules_to_train
from fedelta.learning.model.base_patch import BasePatch
from fedelta.learning.model.dropout import use_fast_dropout
from fedelta.lora.adapter import Adapter, LoraPair, ScaleRule, draw_basis
from fedelta.settings import Settings


class LoraSettings(Settings):
    """The adapters.

    Args:
        alpha, scale: LoRA's α, and how it becomes s: α/r, α/√r (rsLoRA), or α itself at every rank.
        dropout: on the input of the LoRA branch.
        target_modules: names or endings of layers, or `all-linear`; None takes PEFT's choice for the model.
        modules_to_save: modules trained whole besides LoRA, by name or ending; None finds all that lies between the
            backbone and the label. PEFT always adds the last layer (`classifier` or `score`). A causal language model
            has none unless they are named.
    """

    alpha: float = Field(default=16, gt=0)
    scale: ScaleRule = "alpha/r"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None


def peft_name(rank: int) -> str:
    return f"rank-{rank}"


class LoraModel:
    """A model with LoRA, its adapter and base patch swapped in place.

    Args:
        base: a model that classifies, or a causal language model.
        settings: where LoRA goes and what is trained whole.

    Attributes:
        shapes: module → (m, n) of each adapted layer, out×in.
        head_modules: names of the modules trained whole.
        task_type: PEFT's name for what the model does.
        patch: what has been added to the base.
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
        self.head_modules = modules_to_train(base, settings.modules_to_save)
        try:
            self.peft: Any = peft.get_peft_model(base, self._config(1), adapter_name=peft_name(1))
        except ValueError as error:
            if settings.target_modules is None:
                raise FedeltaError(
                    f"lora.target_modules: PEFT has no default for a {base.config.model_type} model; "
                    "name its layers, or say all-linear"
                ) from error
            raise FedeltaError(f"lora.target_modules: {error}") from error
        except re.error as error:
            raise FedeltaError(f"lora.target_modules: {settings.target_modules!r} is no pattern: {error}") from error
        prefix = "base_model.model."
        self.layers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.peft.named_modules()
            if isinstance(module, LoraLayer)
        }
        for name, layer in self.layers.items():
            if layer.lora_embedding_A:
                raise FedeltaError(f"module {name}: LoRA on an embedding is not supported")
        self._refuse_missing_targets()
        self._refuse_shared_weights()
        self.shapes = {name: (layer.out_features, layer.in_features) for name, layer in sorted(self.layers.items())}
        # As PEFT wrapped them, which is not always what it was asked for: whatever trains must be in the messages.
        self._head_wrappers: dict[str, Any] = {
            name.removeprefix(prefix): module
            for name, module in self.peft.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
        }
        self.head_modules = sorted(self._head_wrappers)
        self.patch = BasePatch(self.layers, self.dtype)
        self._prepare_heads()
        self._use_fast_dropout()

    def _refuse_missing_targets(self) -> None:
        """PEFT passes over a name without a layer, as long as another one has some."""
        targets = self.settings.target_modules
        for name in targets if isinstance(targets, tuple) else ():
            if not any(f".{layer}".endswith(f".{name}") for layer in self.layers):
                raise FedeltaError(f"lora.target_modules: no layer's name is or ends with {name!r}")

    def _refuse_shared_weights(self) -> None:
        """A base patch of a tied output layer would change the embedding too, and PEFT would merge it into both."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.peft.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name.removeprefix("base_model.model."))
        for name, layer in self.layers.items():
            own = f"{name}.base_layer.weight"
            others = [other for other in names.get(id(layer.get_base_layer().weight), []) if other != own]
            if others:
                raise FedeltaError(f"module {name}: its weight is {others[0]} too, and LoRA there would change both")

    def _use_fast_dropout(self) -> None:
        if self.device.type == "cpu":
            use_fast_dropout(self.peft)

    def _config(self, rank: int) -> Any:
        import peft

        targets = self.settings.target_modules
        return peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=self.settings.dropout,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            modules_to_save=list(self.head_modules),  # PEFT extends the list that it is given
            fan_in_fan_out=self._conv1d,
            task_type=self.task_type,
        )

    def _prepare_heads(self) -> None:
        """Make the active heads compute in fp32, on whatever the backbone hands them."""
        for wrapper in self._head_wrappers.values():
            head = wrapper.modules_to_save[self.active].float()
            head.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
            if isinstance(head, nn.Embedding):
                # What follows it is the backbone, and not the label.
                head.register_forward_hook(lambda module, args, found: found.to(self.dtype))  # noqa: ARG005

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the loaded client trains."""
        return [p for p in self.peft.parameters() if p.requires_grad]

    @property
    def base_parameters(self) -> int:
        """Of the model without LoRA, heads included: what full fine-tuning would train."""
        own = [(name, p) for name, p in self.peft.named_parameters() if "lora_" not in name]
        # PEFT keeps an untrained original beside each adapter's copy of a head; a byte holds two numbers of four bits.
        halves = {"Params4bit": 2}
        return sum(p.numel() * halves.get(type(p).__name__, 1) for name, p in own if "modules_to_save" not in name)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self.peft.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base."""
        return self.peft.dtype

    @property
    def active(self) -> str:
        """PEFT's name of the adapter that runs and trains."""
        return self.peft.active_adapter

    def head_tensors(self) -> dict[str, Tensor]:
        """Copies of the active heads on the CPU, `module.parameter` → tensor, fp32."""
        return {
            f"{name}.{key}": tensor.detach().cpu().clone()
            for name, wrapper in self._head_wrappers.items()
            for key, tensor in wrapper.modules_to_save[self.active].state_dict().items()
        }

    def prepare(self, rank: int) -> None:
        """Make PEFT's adapter of this rank the active one; the first time it is made."""
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
        """Make this adapter and these heads the ones that the model runs and trains.

        Args:
            adapter: of one rank in all modules; its scale becomes the layers' scaling.
            heads: as from `head_tensors`.
            train: which factors require gradients, out of "A", "B" and "core". Heads always do.
            seed: of the basis Q of a core C, where B = Q·C and C alone is trained.

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
            # After set_adapter, which turns gradients on: frozen must mean frozen.
            layer.lora_A[self.active].weight.requires_grad_("A" in train)
            layer.lora_B[self.active].weight.requires_grad_(bool(train & {"B", "core"}))
            if "core" in train:
                basis = _Basis(draw_basis(module, pair.shape[0], pair.rank, seed).to(self.device))
                parametrize.register_parametrization(layer.lora_B[self.active], "weight", basis, unsafe=True)
        left = dict(heads)
        for name, wrapper in self._head_wrappers.items():
            for key, tensor in wrapper.modules_to_save[self.active].state_dict().items():
                full = f"{name}.{key}"
                if full not in left:
                    raise FedeltaError(f"head {full} is missing from what was received")
                _copy(tensor, left.pop(full), f"head {full}")
        if left:
            raise FedeltaError(f"head {sorted(left)[0]} was received, but the model has no such head")

    def active_heads(self) -> dict[str, nn.Module]:
        """Name → module, of the heads that run and train."""
        return {name: wrapper.modules_to_save[self.active] for name, wrapper in self._head_wrappers.items()}

    def live(self) -> Adapter:
        """The active A and B themselves, with their gradients: what a penalty is a function of."""
        return Adapter(
            {
                module: LoraPair(
                    layer.lora_A[self.active].weight, layer.lora_B[self.active].weight, layer.scaling[self.active]
                )
                for module, layer in self.layers.items()
            }
        )

    def read(self) -> Adapter:
        """Copies of the active A and B on the CPU, with their scale."""
        return self.live().map(
            lambda pair: LoraPair(pair.A.detach().cpu().clone(), pair.B.detach().cpu().clone(), pair.scale)
        )


class _Basis(nn.Module):
    """B = Q·C with Q fixed: the parameter that trains is C, (r, r)."""

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


def _copy(target: Tensor, source: Tensor, what: str) -> None:
    if target.shape != source.shape:
        raise FedeltaError(f"{what} is {tuple(source.shape)}, the model expects {tuple(target.shape)}")
    target.copy_(source)
