"""Stretches of chunks over which Q is one polynomial for each of several states."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from qrag_retriever.positions import Runs


class Pieces(NamedTuple):
    """Stretches of chunks in which no state's run ends, and where in its run each state is there.

    Attributes:
        bounds: Piece ``g`` holds the chunks ``bounds[g]`` up to ``bounds[g + 1]``; ``[G + 1]``.
        run: Number of the run each state is in, counted through all states' runs; ``[G, S]``.
        start: t of the piece's first chunk, where t goes from -1 to 1 along a run; ``[G, S]``.
        slope: What t grows by from one chunk to the next; ``[G, S]``.
    """

    bounds: NDArray[np.int64]
    run: NDArray[np.int64]
    start: NDArray[np.float64]
    slope: NDArray[np.float64]

    def groups(
        self, most_rows: int, most_pieces: int, at_first: int | None = None
    ) -> Iterator[slice]:
        """Consecutive pieces, as many as together do not exceed these limits, but at least one.

        Args:
            most_rows: Chunks of a group.
            most_pieces: Pieces of a group.
            at_first: Chunks of the first group; ``None``: as of the others.
        """
        first = 0
        while first < len(self.run):
            rows = most_rows if first or at_first is None else min(at_first, most_rows)
            limit = np.searchsorted(self.bounds, self.bounds[first] + rows, side="right") - 1
            last = max(min(int(limit), first + most_pieces), first + 1)
            yield slice(first, last)
            first = last

    def t(self, some: slice, like: Tensor) -> Tensor:
        """Where in its run each chunk of some pieces lies, for each state: ``[L, S]``."""
        bounds = self.bounds[some.start : some.stop + 1]
        start, slope = (torch.from_numpy(x[some]).to(like) for x in (self.start, self.slope))
        lengths = np.diff(bounds)
        place = torch.arange(int(lengths.max()), device=like.device)[:, None].to(like)
        t = like.new_empty(int(lengths.sum()), self.run.shape[1])
        for equally in of_equal_length(lengths):
            length = int(lengths[equally.start])
            rows = t[bounds[equally.start] - bounds[0] : bounds[equally.stop] - bounds[0]]
            equal = torch.unflatten(rows, 0, (-1, length))
            torch.addcmul(start[equally, None], place[:length], slope[equally, None], out=equal)
        return t


def cut_pieces(runs: Sequence[Runs], blocks: NDArray[np.int64]) -> Pieces:
    """Cut the chunks wherever a run of any state, or a block, begins."""
    bounds = np.union1d(blocks, begins(runs))
    run, start, slope, count = [], [], [], 0
    for of_state in runs:
        own = np.searchsorted(of_state.bounds, bounds[:-1], side="right") - 1
        slope.append(2 / np.maximum(np.diff(of_state.bounds) - 1, 1)[own])
        start.append((bounds[:-1] - of_state.bounds[own]) * slope[-1] - 1)
        run.append(own + count)
        count += len(of_state.first)
    return Pieces(bounds, *(np.stack(columns, axis=1) for columns in (run, start, slope)))


def begins(runs: Sequence[Runs]) -> NDArray[np.int64]:
    """The chunks with which a run of any state begins, and how many chunks there are."""
    begins: NDArray[np.int64] = np.unique(np.concatenate([of_state.bounds for of_state in runs]))
    return begins


def of_equal_length(lengths: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive pieces that are equally long, as those of a single state mostly are."""
    ends = np.flatnonzero(np.diff(lengths, append=-1)) + 1
    return itertools.starmap(slice, itertools.pairwise([0, *ends.tolist()]))
