"""Rows of small integers with a factor each, and their products with vectors."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST = 127
_PART = 2 * _LARGEST + 1  # a vector is split into 255·high + low


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix whose row ``i`` is ``values[i] * scales[i]``.

    Attributes:
        values: int8 ``[M, d]`` without -128.
        scales: float32 ``[M]``.
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """``[M, d]``."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """2."""
        return self.values.ndim

    @property
    def dtype(self) -> torch.dtype:
        """int8."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> QuantizedRows:
        return QuantizedRows(self.values[rows], self.scales[rows])

    def float(self) -> Tensor:
        """The rows in float32."""
        return self.values.float().mul_(self.scales[:, None])

    def products(self, edges: NDArray[np.int64], vectors: Tensor) -> Tensor:
        """The product of each row with the vectors of its stretch.

        Computed in integers, the vectors as two int8 parts, which is 16 bits: the rows need not be
        converted, which takes longer than to multiply them. The error is about 1e-5 of
        |vector||row|, much less than what the rows lost when they were quantised.

        Args:
            edges: Stretch ``g`` is the rows ``edges[g]`` up to ``edges[g + 1]``, ``[G + 1]``.
            vectors: C vectors for each stretch, float32 ``[G, C, d]``.

        Returns:
            float32 ``[M, C]``.
        """
        step = vectors.abs().amax(dim=(0, 2), keepdim=True) / (_LARGEST * (_PART + 1))
        step.clamp_(min=torch.finfo(torch.float32).tiny)  # vectors of zeros
        whole = (vectors / step).round_()
        high = (whole / _PART).round_()
        parts = torch.cat([high, whole - _PART * high], dim=1).to(torch.int8)
        stretches = zip(itertools.pairwise(edges.tolist()), parts, strict=True)
        sums = torch.cat(
            [torch._int_mm(part, self.values[first:last].T) for (first, last), part in stretches],  # noqa: SLF001
            dim=1,
        )
        upper, lower = sums.float().chunk(2)
        return lower.add_(upper, alpha=_PART).mul_(step[0]).mul_(self.scales).T


@functools.cache
def multiplies_integers() -> bool:
    """Whether `QuantizedRows.products` can be used on the CPU.

    The function it calls is torch's own, undocumented one, and processors without the right
    instruction saturate where sums are large: so see whether it is there and exact.
    """
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-_LARGEST, _LARGEST + 1, (4, 96), generator=random, dtype=torch.int8)
    a[0], a[1] = _LARGEST, -_LARGEST
    b = torch.cat([a[:2], a[2:].repeat(9, 1)])
    try:
        found = torch._int_mm(a, b.T)  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found.long(), a.long() @ b.long().T)
