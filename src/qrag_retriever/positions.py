"""Where a chunk lies between the retrieved ones: ρ, and the contiguous runs it falls into.

The position of a chunk is piecewise linear in its number, with a break at every retrieved chunk, so
a few numbers per break describe the whole corpus. Nothing here but :meth:`PositionScheme.positions`
ever touches as many numbers as there are chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from qrag_retriever.errors import ConfigError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PositionMode = Literal["none", "absolute", "relative"]


class Runs(NamedTuple):
    """Contiguous stretches of chunks that together hold every chunk once, in document order.

    Attributes:
        bounds: Run ``m`` holds the chunks ``bounds[m]`` up to, not including, ``bounds[m + 1]``;
            int64 ``[r + 1]``.
        first: ρ of each run's first chunk, float64 ``[r]``.
        last: ρ of each run's last chunk, float64 ``[r]``; between the two ρ is linear. Equal to
            ``first`` where ρ is constant over a run.
    """

    bounds: NDArray[np.int64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]


@dataclass(frozen=True)
class PositionScheme:
    """The map from chunk numbers and retrieved chunks to positions ρ (paper §3.3, eq. 6).

    Attributes:
        mode: ``"relative"`` to the retrieved chunks; ``"absolute"``: the chunk's number;
            ``"none"``: 0 for every chunk.
        step: δ of eq. 6, added at every retrieved chunk.
        span: ℓ of eq. 6, the range of ρ between two retrieved chunks.
        endpoint: ``False``: ρ grows by ``ℓ / L`` a chunk in an interval of L chunks (eq. 6);
            ``True``: by ``ℓ / (L - 1)``, so that the last one is at ℓ (the released code).
        truncate: Round ρ to float32, then cut it to an integer, as the released code does.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> scheme = PositionScheme("relative", step=10.0, span=9.0)
        >>> scheme.positions(6, retrieved=[3])
        array([ 0.,  3.,  6., 10., 13., 16.])
    """

    mode: PositionMode = "none"
    step: float = 10.0
    span: float = 9.0
    endpoint: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(PositionMode):
            allowed = ", ".join(map(repr, get_args(PositionMode)))
            raise ConfigError(f"mode={self.mode!r} is not a position mode; give one of {allowed}.")
        for name in ("step", "span"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r} is not allowed; give a finite number above 0.")

    @property
    def constant(self) -> bool:
        """Whether ρ is the same for all chunks of a run, see `runs`."""
        return self.mode == "none" or self.truncate

    def positions(
        self, n: int, retrieved: Sequence[int] = (), chunks: NDArray[np.int64] | None = None
    ) -> NDArray[np.float64]:
        """ρ of every chunk, or of some.

        Args:
            n: Number of chunks.
            retrieved: Numbers of the retrieved chunks, in any order.
            chunks: Numbers of the chunks, ``[m]``; ``None``: all, in document order.

        Returns:
            float64 ``[n]`` or ``[m]``.

        Raises:
            InvalidInputError: If a retrieved chunk does not exist or is given twice.
        """
        chunks = np.arange(n) if chunks is None else chunks
        return self._at(self._intervals(n, retrieved), chunks)

    def position(self, n: int, retrieved: Sequence[int], chunk: int) -> float:
        """ρ of one chunk, without those of all others; arguments and errors as `positions`."""
        return float(self.positions(n, retrieved, np.array([chunk]))[0])

    def runs(
        self,
        n: int,
        retrieved: Sequence[int] = (),
        width: float = 1.0,
        *,
        aligned: bool = False,
    ) -> Runs:
        """Cut the chunks into runs over which ρ is constant, or else linear and nearly so.

        Takes time and memory in proportion to the number of runs, not of chunks: in relative mode
        ``k + 1`` intervals of about ``span`` runs each (``span / width`` if ρ is not truncated).

        Args:
            n: Number of chunks.
            retrieved: Numbers of the retrieved chunks, in any order.
            width: Upper limit of ``last - first`` of a run where ρ is not truncated.
            aligned: Where ρ is not truncated, let runs begin at multiples of powers of two, as
                those of other lists of retrieved chunks do; up to twice as many.

        Returns:
            The runs; ``first == last`` everywhere if `constant`.

        Raises:
            InvalidInputError: If a retrieved chunk does not exist or is given twice.

        Example:
            >>> scheme = PositionScheme("relative", truncate=True)
            >>> bounds, rho, _ = scheme.runs(900_000, retrieved=[899_997])
            >>> bounds[:3], rho[:3], rho[-3:]
            (array([     0, 100000, 200000]), array([0., 1., 2.]), array([10., 13., 16.]))
        """
        intervals = self._intervals(n, retrieved)
        if self.truncate:
            cuts = self._level_cuts(intervals)
        else:
            cuts = (_aligned_cuts if aligned else _even_cuts)(intervals, width)
        bounds = np.unique(np.concatenate([intervals.start, cuts, [n]]))
        first, last = (self._at(intervals, chunks) for chunks in (bounds[:-1], bounds[1:] - 1))
        return Runs(bounds, first, last)

    def _intervals(self, n: int, retrieved: Sequence[int]) -> _Intervals:
        found = np.sort(np.asarray(retrieved, dtype=np.int64))
        if found.size and (found[0] < 0 or found[-1] >= n or not np.diff(found).all()):
            raise InvalidInputError(
                f"retrieved={list(retrieved)} does not fit {n} chunks; "
                f"give different numbers from 0 to {n - 1}."
            )
        start = np.concatenate([[0], found if self.mode == "relative" else found[:0]])
        length = np.diff(start, append=n)
        base = np.arange(len(start)) * np.float64(self.step)
        if self.mode == "relative":
            slope = self.span / np.maximum(length - self.endpoint, 1)
        else:
            slope = np.full(1, float(self.mode == "absolute"))
        return _Intervals(start, length, base, slope)

    def _at(self, intervals: _Intervals, chunks: NDArray[np.int64]) -> NDArray[np.float64]:
        """ρ of some chunks; of equal starts the last one counts (chunk 0 was retrieved)."""
        j = np.searchsorted(intervals.start, chunks, side="right") - 1
        return self._rho(intervals, j, chunks - intervals.start[j])

    def _rho(
        self, intervals: _Intervals, j: NDArray[np.int64], offset: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        # In this order of operations, which is numpy.linspace's, the released code's very values.
        rho: NDArray[np.float64] = offset * intervals.slope[j] + intervals.base[j]
        return np.trunc(rho.astype(np.float32)).astype(np.float64) if self.truncate else rho

    def _level_cuts(self, intervals: _Intervals) -> NDArray[np.int64]:
        """The first chunk of every interval at each new integer ρ."""
        held = np.flatnonzero(intervals.length)
        low, high = (self._rho(intervals, held, o) for o in (0 * held, intervals.length[held] - 1))
        part, place = _ragged((high - low).astype(np.int64))
        j, level = held[part], low[part] + place + 1
        # Solve ρ = level, where ρ is rounded up to it from half a float32 below. The division may
        # be off by one chunk, so ask the formula itself about the neighbours.
        below = np.nextafter(level.astype(np.float32), np.float32(0)).astype(np.float64)
        guess = np.ceil(((level + below) / 2 - intervals.base[j]) / intervals.slope[j])
        near = guess.astype(np.int64)[:, None] + np.arange(-1, 2)
        too_low = self._rho(intervals, j[:, None], near) < level[:, None]
        cuts: NDArray[np.int64] = intervals.start[j] + near[:, 0] + too_low.sum(axis=1)
        return cuts


class _Intervals(NamedTuple):
    """The stretches between retrieved chunks; ρ = base + slope · (i - start) in each of them."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    base: NDArray[np.float64]
    slope: NDArray[np.float64]


def _even_cuts(intervals: _Intervals, width: float) -> NDArray[np.int64]:
    """Cut each interval into parts, as few as keep ρ from changing by more than ``width``.

    All are of equal length but the last, which may be shorter.
    """
    rise = (intervals.length - 1) * intervals.slope
    parts = np.clip(np.ceil(rise / width), 1, np.maximum(intervals.length, 1)).astype(np.int64)
    j, place = _ragged(parts)
    offset = place * -(-intervals.length[j] // parts[j])
    # a part less may do
    cuts: NDArray[np.int64] = (intervals.start[j] + offset)[offset < intervals.length[j]]
    return cuts


def _aligned_cuts(intervals: _Intervals, width: float) -> NDArray[np.int64]:
    """Cut each interval at the multiples of the largest power of two that keeps to ``width``."""
    with np.errstate(divide="ignore"):  # ρ that does not rise needs no cut
        longest = np.minimum(width / intervals.slope + 1, np.maximum(intervals.length, 1))
    step = np.exp2(np.floor(np.log2(longest))).astype(np.int64)
    begin = intervals.start // step + 1  # the first multiple inside
    end = -(-(intervals.start + intervals.length) // step)
    j, place = _ragged(np.maximum(end - begin, 0))
    cuts: NDArray[np.int64] = (begin[j] + place) * step[j]
    return cuts


def _ragged(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each cell of a table whose row ``j`` has ``counts[j]`` cells."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
