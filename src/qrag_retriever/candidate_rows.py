"""The candidate rows of a matrix of embeddings, read in blocks without copying the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.quantized import QuantizedRows, multiplies_integers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Rows = Tensor | QuantizedRows

# Set by measurement (examples/benchmarks/scoring.py); they change the time and memory taken only.
BLOCK = 1 << 20  # numbers in a temporary: 4 MB in float32
_SPARSE = 4  # rows read for each row wanted, above which to gather the wanted ones costs less


class CandidateRows:
    """The candidate rows of a matrix, read in blocks; turned, they have to be in float32."""

    def __init__(self, actions: Rows, rows: NDArray[np.int64] | None, *, turned: bool) -> None:
        inside = rows is None or not len(rows) or 0 <= rows[0] <= rows[-1] < len(actions)
        if not inside or (rows is not None and (np.diff(rows) < 1).any()):
            raise InvalidInputError(
                f"rows are not ascending rows of a matrix with {len(actions)} rows; "
                "sort them and give each once."
            )
        self.actions = actions
        self.rows = rows
        self.n = len(actions) if rows is None else len(rows)
        self.width = actions.shape[1]
        self.dtype = actions.dtype
        self.device = actions.device
        self.as_float32 = actions.dtype == torch.float32
        self._converted: Tensor | None = None
        as_stored = isinstance(actions, QuantizedRows) and not turned
        # a GPU multiplies integers in some shapes alone
        self.in_integers = as_stored and actions.device.type == "cpu" and multiplies_integers()

    def block_rows(self, columns: int) -> int:
        """How many rows to read at a time where each of them fills so many temporary columns."""
        if self.in_integers:
            columns *= 4  # two parts of each, as integers and as numbers
        elif isinstance(self.actions, QuantizedRows):
            columns *= 2  # of a quarter of the memory, half the blocks are not too large a share
        # some of the rows may have to be copied
        return max(1, BLOCK // (columns if self.rows is None else max(columns, self.width)))

    def piece_rows(self, columns: int, *, converted: bool = False) -> int:
        """How many of those to multiply at a time, which is when they are converted, if they are.

        Args:
            columns: As `block_rows`.
            converted: Whether they are converted to another type than float32.
        """
        as_stored = self.in_integers or self.as_float32
        most = self.block_rows(columns)
        if as_stored and not converted:
            return most
        return min(most, max(1, BLOCK // (2 * self.width)))

    def read(self, bounds: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64], Tensor | None]:
        """The candidates from ``bounds[0]`` up to ``bounds[-1]``, if possible without a copy.

        Returns:
            A block of rows; where in it each of ``bounds`` is; and the candidates' places in it if
            it holds other rows too, because to multiply those costs less than to leave them out.
        """
        first, last = bounds[0], bounds[-1]
        if self.rows is None:
            return self.actions[first:last], bounds - first, None
        rows = self.rows[first:last]
        low, high = rows[0], rows[-1] + 1
        if high - low > _SPARSE * len(rows):
            return self.actions[self._index(rows)], bounds - first, None
        edges = np.append(rows[bounds[:-1] - first], high) - low
        places = None if high - low == len(rows) else self._index(rows - low)
        return self.actions[low:high], edges, places

    def blocks(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """All candidates in float32, block by block."""
        block_rows = self.piece_rows(columns)
        for first in range(0, self.n, block_rows):
            last = min(first + block_rows, self.n)
            block, _, places = self.read(np.array([first, last]))
            yield slice(first, last), self.converted(block if places is None else block[places])

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Some candidates in float32, ``[m, d]``."""
        chosen = self.actions[self._index(numbers if self.rows is None else self.rows[numbers])]
        return chosen.float()

    def converted(self, block: Rows) -> Tensor:
        """A block in float32, until the next one: all are converted into the same memory."""
        if isinstance(block, Tensor) and block.dtype == torch.float32:
            return block
        if self._converted is None or len(self._converted) < len(block):
            self._converted = torch.empty(block.shape, device=block.device)
        result = self._converted[: len(block)]
        if isinstance(block, QuantizedRows):
            return block.float(out=result)
        return result.copy_(block)

    def _index(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.tensor(rows, device=self.device)
