"""The chunks one search chooses from, and their Q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from qrag_retriever.q_values import QValues
from qrag_retriever.scoring import score, score_best

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.ann import AnnIndex
    from qrag_retriever.chunk import Chunk
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.search import SearchOptions
    from qrag_retriever.snapshot import Snapshot


class Candidates(Protocol):
    """The chunks that the searches of one run choose from, by numbers that stay the same in it.

    Attributes:
        n: How many there are; ``None`` where nobody has counted them.
        excluded: Numbers of those that are never taken.
        rows: Their numbers in the corpus; ``None``: all of it, or unknown.
        complete: Whether Q of all of them is known at each step.
    """

    @property
    def n(self) -> int | None: ...  # noqa: D102
    @property
    def excluded(self) -> Collection[int]: ...  # noqa: D102
    @property
    def rows(self) -> NDArray[np.int64] | None: ...  # noqa: D102
    @property
    def complete(self) -> bool: ...  # noqa: D102

    def score(
        self,
        states: NDArray[np.float32],
        retrieved: Sequence[Sequence[int]],
        *,
        every: bool = False,
    ) -> list[QValues]:
        """Q of the candidates for states ``[S, d]`` that hold the retrieved ones.

        Args:
            states: float32.
            retrieved: Numbers of the chunks that each state holds.
            every: Whether Q of all candidates is wanted, where it is known of all (`complete`).

        Returns:
            For each state Q of some candidates, among them the best that are not retrieved.
        """

    def chunk(self, number: int) -> Chunk:
        """A candidate."""

    def place(self, number: int) -> int:
        """Its number in the corpus, in document order; -1 where that is not known."""

    def position(self, number: int, before: Sequence[int]) -> float:
        """Its ρ once others have been retrieved."""


class SnapshotCandidates:
    """All chunks of a snapshot that pass a filter.

    Args:
        snapshot: The chunks and embeddings.
        model: Its settings say how Q depends on positions.
        options: How to search.
        filter: See `filters.compile_filter`.
        exclude_ids: Chunks that are never taken.

    Raises:
        InvalidInputError: If an excluded id is unknown or the filter is malformed.
    """

    complete = True

    def __init__(
        self,
        snapshot: Snapshot,
        model: QRAGModel,
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
    ) -> None:
        self.snapshot = snapshot
        self.config = model.config
        self.rows = snapshot.select(filter)
        self.n = len(snapshot) if self.rows is None else len(self.rows)
        self.excluded = self._numbers([snapshot.row_of(chunk_id) for chunk_id in exclude_ids])
        self._breadth = options.breadth
        # a draw may take any chunk
        self._ann = None if options.temperature is not None else snapshot.ann
        self._actions = snapshot.vectors.tensor()

    def score(
        self,
        states: NDArray[np.float32],
        retrieved: Sequence[Sequence[int]],
        *,
        every: bool = False,
    ) -> list[QValues]:
        """See `Candidates`."""
        if self._ann is not None:
            return self._score_nearest(self._ann, states, retrieved)
        arguments = (torch.from_numpy(states), self._actions, retrieved)
        scheme, base = self.config.position_scheme, self.config.rotary_base
        if every:
            q = score(*arguments, scheme, rows=self.rows, base=base)
            return [QValues(of_state) for of_state in q.numpy()]
        return score_best(
            *arguments,
            scheme,
            self._breadth,
            longest=self.snapshot.vectors.longest,
            excluded=self.excluded,
            rows=self.rows,
            base=base,
        )

    def chunk(self, number: int) -> Chunk:
        """See `Candidates`."""
        return self.snapshot.chunks[self.place(number)]

    def place(self, number: int) -> int:
        """See `Candidates`."""
        return number if self.rows is None else int(self.rows[number])

    def position(self, number: int, before: Sequence[int]) -> float:
        """See `Candidates`."""
        return self.config.position_scheme.position(self.n, before, number)

    def _score_nearest(
        self, ann: AnnIndex, states: NDArray[np.float32], retrieved: Sequence[Sequence[int]]
    ) -> list[QValues]:
        """Exact Q of the chunks an approximate index finds."""
        count = self._breadth + len(self.excluded) + max(map(len, retrieved))
        found = map(np.sort, ann.search(states, count, self.rows))
        return [
            QValues(
                self.snapshot.vectors.float32(rows) @ state,
                np.array(self._numbers(rows), dtype=np.int64),
            )
            for state, rows in zip(states, found, strict=True)
        ]

    def _numbers(self, rows: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Numbers among the candidates of chunks given by row; those filtered out have none."""
        if self.rows is None:
            return [int(row) for row in rows]
        numbers = np.searchsorted(self.rows, rows)
        return [
            int(number)
            for number, row in zip(numbers, rows, strict=True)
            if number < self.n and self.rows[number] == row
        ]
