"""Low-rank adapters (LoRA; Hu et al., 2021) of some rows of a product: scale * (x A^T) B^T on top of x W^T.

Letters: M rows, N outputs, K inputs of a matrix; an adapter adds to n of the outputs, at rank r. Beside the
N * K weights that every row reads, its own are r * (K + n): 0.4 % of a 4096 * 4096 matrix at r = 8. Rows of
different adapters lie side by side in one product; an adapter's two small products run over its own rows
alone, so rows without one cost nothing. It is plain PyTorch, on CUDA too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's matrix is in ours, which may be several of them one above the other."""

    matrix: str  # our name
    outputs: slice  # its outputs in ours
    inputs: int  # K
    order: torch.Tensor | None = None  # int64 [n]: which of its outputs stand there, if not in its own order

    def shapes(self, rank: int) -> list[list[int]]:
        """Of A and B."""
        return [[rank, self.inputs], [self.outputs.stop - self.outputs.start, rank]]


@dataclass(frozen=True)
class Adapter:
    """Of one matrix. Any floating dtype; it computes in that of the rows."""

    outputs: slice
    A: torch.Tensor  # [r, K]
    B: torch.Tensor  # [n, r], scale included

    @classmethod
    def at(cls, place: Place, A, B, scale: float) -> "Adapter":
        """Of matrices as the checkpoint has them: B [n, r] in the order of its outputs. Differentiable."""
        return cls(place.outputs, A, scale * (B if place.order is None else B[place.order.to(B.device)]))


def add(out, x, adapted: Iterable[tuple[slice, Adapter]]):
    """out [M, N] plus what each adapter makes of its rows of x [M, K]; `out` may be written to.
    Differentiable."""
    for rows, adapter in adapted:
        if torch.is_grad_enabled() and out.requires_grad:
            out = out.clone()  # what a function of our own returned must not be written to
        part, A, B = out[rows, adapter.outputs], adapter.A.to(x.dtype), adapter.B.to(x.dtype)
        part.addmm_(F.linear(x[rows], A), B.T)
    return out
