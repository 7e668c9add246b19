"""Products of rows with a few vectors for each piece of the corpus, in float32 or less.

Each way is called with a block of L rows, the places in it where its G pieces begin and the last
ends, and for S states the number of the run each piece lies in, ``[G, S]``. It gives the products
of the rows with the P vectors of these runs, float32 ``[L, P, S]``.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.candidate_rows import BLOCK
from qrag_retriever.pieces import of_equal_length
from qrag_retriever.quantized import QuantizedRows, in_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.candidate_rows import CandidateRows, Rows

_MANY = 16  # columns from which on products in bfloat16 cost less, even if rows are converted


class Products(Protocol):
    """A way to multiply.

    Attributes:
        lost: What the products with a row of length 1 are off by at most, besides rounding to
            float32, all P of a run together; ``[S]``.
    """

    @property
    def lost(self) -> Tensor | float: ...  # noqa: D102

    def __call__(self, block: Rows, edges: NDArray[np.int64], run: Tensor) -> Tensor: ...  # noqa: D102


class InFloat32:
    """Rows of any type, converted if they are not in float32.

    Args:
        vectors: P vectors for each run, ``[R, P, d]``.
        corpus: What the rows are of.
    """

    lost = 0.0

    def __init__(self, vectors: Tensor, corpus: CandidateRows) -> None:
        self._vectors = vectors
        self._corpus = corpus

    def __call__(self, block: Rows, edges: NDArray[np.int64], run: Tensor) -> Tensor:
        """See the module."""
        columns = two_at_least(_of_runs(self._vectors, run))
        products = columns.new_empty(len(block), columns.shape[1])
        if isinstance(block, Tensor) and block.dtype == torch.float32:
            # pieces of equal length at once: a thread takes whole ones
            for some in of_equal_length(np.diff(edges)):
                rows, shape = _rows_of(some, edges)
                out = torch.unflatten(products[rows], 0, shape)
                torch.bmm(torch.unflatten(block[rows], 0, shape), columns[some].mT, out=out)
        else:
            numbers = block.values if isinstance(block, QuantizedRows) else block
            # piece by piece: what was just converted is still in the cache when it is multiplied
            for (first, last), c in zip(itertools.pairwise(edges.tolist()), columns, strict=True):
                torch.mm(self._corpus.converted(numbers[first:last]), c.T, out=products[first:last])
        if isinstance(block, QuantizedRows):  # fewer products than rows have numbers
            products.mul_(block.scales[:, None])
        shape = (self._vectors.shape[1], run.shape[1])
        return torch.unflatten(products[:, : shape[0] * shape[1]], 1, shape)


class InBfloat16:
    """Rows of float32 or bfloat16 in bfloat16, on processors that multiply it.

    Args:
        vectors: P vectors for each run, ``[R, P, d]``.
        counts: Number of runs of each of the S states.
    """

    def __init__(self, vectors: Tensor, counts: Sequence[int]) -> None:
        self._vectors = vectors.bfloat16()
        lengths = (vectors - self._vectors).norm(dim=-1)
        # the numbers of a row, and each product, are off by 2^-8 of themselves
        lengths += 1.01 * 2**-7 * vectors.norm(dim=-1)
        self.lost = _most(lengths, counts)

    def __call__(self, block: Rows, edges: NDArray[np.int64], run: Tensor) -> Tensor:
        """See the module."""
        assert isinstance(block, Tensor)
        columns = _of_runs(self._vectors, run)
        products = columns.new_empty(len(block), columns.shape[1])
        for equal in of_equal_length(np.diff(edges)):
            length = int(edges[equal.start + 1] - edges[equal.start])
            for some in _parts(equal, max(1, BLOCK // (length * block.shape[1]))):
                rows, shape = _rows_of(some, edges)
                out = torch.unflatten(products[rows], 0, shape)
                numbers = torch.unflatten(block[rows].bfloat16(), 0, shape)
                torch.bmm(numbers, columns[some].mT, out=out)
        return torch.unflatten(products.float(), 1, (self._vectors.shape[1], run.shape[1]))


class InIntegers:
    """Rows of 8 bits, not converted, and vectors of 16 bits, or 8 for high powers.

    Args:
        vectors: P vectors for each run, ``[R, P, d]``.
        counts: Number of runs of each of the S states.
    """

    def __init__(self, vectors: Tensor, counts: Sequence[int]) -> None:
        self._parts, self._steps = in_parts(vectors, counts)
        # each number of a vector is off by half a step
        self.lost = self._steps.sum(dim=1) * (0.5 * vectors.shape[-1] ** 0.5)

    def __call__(self, block: Rows, edges: NDArray[np.int64], run: Tensor) -> Tensor:
        """See the module."""
        assert isinstance(block, QuantizedRows)
        return block.products(edges, self._parts[run], self._steps)


def worth_bfloat16(corpus: CandidateRows, columns: int) -> bool:
    """Whether to multiply in bfloat16 takes less time than in float32."""
    if corpus.device.type != "cpu" or not _multiplies_bfloat16():
        return False
    return corpus.dtype in (torch.float32, torch.bfloat16) and columns >= _MANY


def two_at_least(vectors: Tensor) -> Tensor:
    """Vectors ``[..., m, d]``, a single one twice.

    BLAS may give a product with one column to a single thread, with two to all of them.
    """
    return vectors if vectors.shape[-2] > 1 else torch.cat([vectors, vectors], dim=-2)


def _of_runs(vectors: Tensor, run: Tensor) -> Tensor:
    """The vectors for each piece, ``[G, P · S, d]``."""
    order = torch.arange(vectors.shape[1], device=run.device)[:, None]
    return vectors[run[:, None], order].flatten(1, 2)


def _rows_of(pieces: slice, edges: NDArray[np.int64]) -> tuple[slice, tuple[int, int]]:
    """The rows of pieces of equal length, and the shape that takes them apart."""
    return slice(edges[pieces.start], edges[pieces.stop]), (pieces.stop - pieces.start, -1)


def _parts(whole: slice, most: int) -> Iterator[slice]:
    for first in range(whole.start, whole.stop, most):
        yield slice(first, min(first + most, whole.stop))


def _most(lengths: Tensor, counts: Sequence[int]) -> Tensor:
    """The most that all vectors of a run together have, of the runs of each state: ``[S]``."""
    return torch.stack([one.max() for one in torch.split(lengths.sum(dim=1), list(counts))])


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, and adds up in float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # not documented
    if not torch.backends.mkldnn.is_available() or not supported():  # type: ignore[no-untyped-call]
        return False
    ones = torch.ones(16, 1000, dtype=torch.bfloat16)
    return bool((ones @ ones.T == 1000).all())
