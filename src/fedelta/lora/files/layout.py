"""How the two factors of a layer lie in a file: of a Linear, an embedding, a convolution, or a stack of experts.

All of them are products B·A of a tall and a wide matrix, so one algebra covers them:

    linear        lora_A (r, n), lora_B (m, r)
    embedding     lora_embedding_A (r, n), lora_embedding_B (m, r): n tokens, and the weight is (B·A)ᵀ
    convolution   lora_A (r, n, k…), lora_B (m, r, 1…): A is flattened to (r, n·k…)
    parameter     lora_A (E·r, n), lora_B (m, r·E) of E experts (`target_parameters`): rows e·r to (e+1)·r of A and
                  columns e, E+e, 2E+e, … of B belong to expert e. Each expert is a layer of its own here.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedelta.lora.files.tensor_names import PREFIX

Kind = Literal["linear", "embedding", "convolution", "parameter"]


class Layout(NamedTuple):
    """Place of one layer in a file.

    Args:
        module: name of the module in the file.
        kind: kind of the layer.
        expert: number of the expert; 0 except in a stack.
        experts: E; 1 except in a stack.
        kernel: k… of a convolution.
    """

    module: str
    kind: Kind = "linear"
    expert: int = 0
    experts: int = 1
    kernel: tuple[int, ...] = ()

    @property
    def layer(self) -> str:
        """Name of the layer: of the module, or `module[e]` of an expert."""
        return f"{self.module}[{self.expert}]" if self.experts > 1 else self.module

    def key(self, factor: str) -> str:
        """Name of the tensor with factor A or B."""
        if self.kind == "embedding":
            return f"{PREFIX}{self.module}.lora_embedding_{factor}"
        return f"{PREFIX}{self.module}.lora_{factor}.weight"

    def matrices(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (r, n) and (m, r) of this layer from the tensors of the file."""
        if self.experts > 1:
            rank = len(A) // self.experts
            return A[self.expert * rank : (self.expert + 1) * rank], B[:, self.expert :: self.experts]
        return A.flatten(1), B.flatten(1)

    def tensors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensors of the file for the factors (r, n) and (m, r) of a layer that is not in a stack."""
        if not self.kernel:
            return A, B
        ones = [1] * len(self.kernel)
        return A.reshape(len(A), -1, *self.kernel), B.reshape(*B.shape, *ones)


def stack(A: list[Tensor], B: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the tensors (E·R, n) and (m, R·E) of a stack of experts, with smaller ranks padded by zeros.

    Args:
        A, B: factors (r_e, n) and (m, r_e) of each expert.
    """
    rank, m = max(len(each) for each in A), len(B[0])
    padded = [torch.nn.functional.pad(each, (0, 0, 0, rank - len(each))) for each in A]
    columns = [torch.nn.functional.pad(each, (0, rank - each.shape[1])) for each in B]
    return torch.cat(padded), torch.stack(columns, dim=2).reshape(m, -1)


def pad_rank(A: Tensor, B: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the tensors of a file with each rank raised to `rank` by zeros.

    Args:
        A, B: tensors as they lie in the file.
        experts: E of a stack; 1 otherwise.
        rank: R.
    """
    old = len(A) // experts
    rows = A.reshape(experts, old, -1)
    columns = B.reshape(len(B), old, -1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, rank - old))
    columns = torch.nn.functional.pad(columns, (0, 0, 0, rank - old))
    return rows.reshape(experts * rank, *A.shape[1:]), columns.reshape(len(B), rank * B.shape[1] // old, *B.shape[2:])
