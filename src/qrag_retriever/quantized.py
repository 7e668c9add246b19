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
    from collections.abc import Sequence

    from numpy.typing import NDArray

_LARGEST = 127
_PART = 2 * _LARGEST + 1  # a vector is split into 255·high + low
_FINE = 3  # coefficients of a polynomial in 16 bits; those of higher powers are small


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

    def float(self, out: Tensor | None = None) -> Tensor:
        """The rows in float32, in ``out`` if that is given."""
        out = self.values.float() if out is None else out.copy_(self.values)
        return out.mul_(self.scales[:, None])

    def products(self, edges: NDArray[np.int64], parts: Tensor, steps: Tensor) -> Tensor:
        """The product of each row with the vectors of its stretch, computed in integers.

        So the rows need not be converted, which takes longer than to multiply them.

        Args:
            edges: Stretch ``g`` is the rows ``edges[g]`` up to ``edges[g + 1]``, ``[G + 1]``.
            parts: P vectors of S states for each stretch, as `in_parts` gives them,
                ``[G, S, P + fine, d]``.
            steps: The steps that belong to them, ``[S, P]``.

        Returns:
            float32 ``[M, P, S]``.
        """
        stretches = zip(itertools.pairwise(edges.tolist()), parts.flatten(1, 2), strict=True)
        sums = torch.cat(
            [torch._int_mm(part, self.values[first:last].T) for (first, last), part in stretches],  # noqa: SLF001
            dim=1,
        )
        numbers = torch.unflatten(sums.float(), 0, parts.shape[1:3])
        products, high = numbers.tensor_split([steps.shape[1]], dim=1)
        products[:, : high.shape[1]].add_(high, alpha=_PART)
        return products.mul_(steps[:, :, None]).mul_(self.scales).permute(2, 1, 0)


def in_parts(vectors: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Vectors in 16 bits, ``step * (255 * high + low)``, or in 8; high and low from -127 to 127.

    A product with one of 16 bits is off by about 1e-5 of the lengths of vector and row, much less
    than what rows of 8 bits lost when they were quantised.

    Args:
        vectors: P vectors for each run of each state, one state's after the other's, ``[R, P, d]``.
        counts: Number of runs of each of the S states.

    Returns:
        Low of all, then high of the first ones, which take 16 bits, int8 ``[R, P + fine, d]``; and
        the step of each state's vectors, ``[S, P]``.
    """
    largest = torch.stack(
        [of_state.abs().amax(dim=(0, 2)) for of_state in torch.split(vectors, list(counts))]
    )
    levels = largest.new_full((vectors.shape[1],), _LARGEST)
    levels[:_FINE] *= _PART + 1
    steps = (largest / levels).clamp_(min=torch.finfo(torch.float32).tiny)
    runs = torch.tensor(counts, device=steps.device)
    low = (vectors / steps.repeat_interleave(runs, dim=0)[:, :, None]).round_()
    high = (low[:, :_FINE] / _PART).round_()
    low[:, :_FINE].sub_(high, alpha=_PART)
    return torch.cat([low, high], dim=1).to(torch.int8), steps


@functools.cache
def multiplies_integers() -> bool:
    """Whether `QuantizedRows.products` can be used on the CPU.

    The function it calls is torch's own, undocumented one, and processors without the right
    instruction saturate where sums are large: so see whether it is there and exact. Without
    AVX-512 it is exact but a plain loop, which takes longer than to convert the rows.
    """
    served = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not served or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-_LARGEST, _LARGEST + 1, (4, 96), generator=random, dtype=torch.int8)
    a[0], a[1] = _LARGEST, -_LARGEST
    b = torch.cat([a[:2], a[2:].repeat(9, 1)])
    try:
        found = torch._int_mm(a, b.T)  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found.long(), a.long() @ b.long().T)
