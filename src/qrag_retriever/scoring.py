"""Q of all chunks for one or many states: ``Q(s, c_i) = ⟨E_s(s), R(ρ(i)) E_a(c_i)⟩`` (paper §3.2).

As ``⟨s, R(ρ)a⟩ = ⟨R(-ρ)s, a⟩``, the state is rotated and never the corpus. Over a run of chunks ρ
is either constant, and one rotated state serves them all; or it is linear, and Q is a polynomial in
ρ to within rounding, whose coefficients are again products with a few vectors made from the state.
So a step costs about what reading the corpus once costs, for several states together.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.quantized import QuantizedRows, in_parts, multiplies_integers
from qrag_retriever.rotary import phases, rotate, turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.positions import PositionScheme, Runs

    Rows = Tensor | QuantizedRows

# Interpolated in P Chebyshev nodes, P even, on a run of ρ-width w, Q is off by 2 (w/4)^P / P! of
# |s||a| at most, if all components turn at the highest frequency: 7.6e-7 and 6.8e-7 here, and
# 2.1e-5 for rows of 8 bits, which are off by far more themselves.
_NARROW = (0.22, 4)  # fewer vectors
_WIDE = (1.0, 6)  # fewer runs
_QUANTIZED = (0.5, 4)  # of rows of 8 bits, where a further vector costs next to nothing

# Set by measurement (examples/benchmarks/scoring.py); they change the time and memory taken only.
_BLOCK = 1 << 20  # numbers in a temporary: 4 MB in float32
_GROUP = 32  # states that share a pass over the corpus
_LONG = 180  # average rows of a narrow piece above which fewer vectors are worth more pieces
_SHORT = 16  # average rows of a piece below which a rotated state for each row costs less
_SPARSE = 4  # rows read for each row wanted, above which to gather the wanted ones costs less


def q_at(states: Tensor, actions: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Q of given pairs of state and chunk: ``⟨R(-ρ)s, a⟩``.

    Args:
        states: State embeddings ``[..., d]``.
        actions: Chunk embeddings without position, ``[..., d]``; all three broadcast.
        positions: ρ of each pair, ``[...]``.
        base: Base of the rotation frequencies.

    Returns:
        ``[...]``, differentiable with respect to states and actions.

    Raises:
        ConfigError: If ``d`` is not a multiple of 4.
    """
    return (rotate(states, -positions, base) * actions).sum(dim=-1)


@torch.no_grad()
def score(
    states: Tensor,
    actions: Tensor | QuantizedRows,
    retrieved: Sequence[Sequence[int]],
    scheme: PositionScheme,
    *,
    rows: NDArray[np.int64] | None = None,
    base: float = 10000.0,
) -> Tensor:
    """Q of all candidate chunks for some states, without rotating or copying the corpus.

    Args:
        states: State embeddings ``[S, d]``.
        actions: Chunk embeddings without position ``[M, d]``, of any floating point type or
            quantized, in the memory of the CPU or a GPU; may be memory-mapped.
        retrieved: The chunks each state holds, counted among the candidates, ``0 … n-1``.
        scheme: Where chunks lie, given the retrieved ones.
        rows: The rows of ``actions`` that are candidates, ascending; ``None``: all, ``n = M``.
        base: Base of the rotation frequencies.

    Returns:
        float32 ``[S, n]`` on the device of ``actions``. Retrieved chunks have their Q too; whether
        they may be chosen again is for the search to decide.

    Raises:
        InvalidInputError: If shapes do not fit, ``rows`` are not ascending rows of ``actions``, or
            a retrieved chunk is not among the candidates.
        ConfigError: If ``d`` is not a multiple of 4 and positions are in use.

    Example:
        >>> from qrag_retriever.positions import PositionScheme
        >>> actions = torch.tensor([[3.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
        >>> score(torch.ones(1, 4), actions, [[]], PositionScheme("none"))
        tensor([[3., 2., 1.]])
        >>> score(torch.ones(1, 4), actions, [[1]], PositionScheme("relative", truncate=True))
        tensor([[ 3.0000, -0.5901, -0.8539]])
    """
    if states.ndim != 2 or states.shape[1:] != actions.shape[1:] or len(states) != len(retrieved):
        raise InvalidInputError(
            f"states {list(states.shape)}, actions {list(actions.shape)} and {len(retrieved)} lists"
            " of retrieved chunks do not fit; give [S, d], [M, d] and S lists."
        )
    corpus = _Corpus(actions, rows, turned=scheme.mode == "absolute")
    states = states.to(actions.device, torch.float32)
    scores = states.new_empty(len(states), corpus.n)
    # where training computes in half precision, validation still scores in float32
    with torch.autocast(states.device.type, enabled=False):
        for first in range(0, len(states) if corpus.n else 0, _GROUP):
            some = slice(first, first + _GROUP)
            if scheme.mode == "absolute":
                _score_absolute(scores[some], states[some], corpus, base)
            else:
                _score_by_runs(scores[some], states[some], corpus, retrieved[some], scheme, base)
    return scores


def _score_by_runs(
    scores: Tensor,
    states: Tensor,
    corpus: _Corpus,
    retrieved: Sequence[Sequence[int]],
    scheme: PositionScheme,
    base: float,
) -> None:
    """Choose the runs, and whether they are long enough for products of their own."""
    constant = scheme.mode == "none" or scheme.truncate
    # pieces are few where the runs of several states begin at the same chunks
    aligned = len(retrieved) > 1 and not constant

    def cut(width: float) -> list[Runs]:
        return [scheme.runs(corpus.n, chunks, width, aligned=aligned) for chunks in retrieved]

    width, nodes = _QUANTIZED if corpus.in_integers else _NARROW
    runs = cut(width)
    if constant:
        nodes = 1
    elif not corpus.in_integers and corpus.n < _LONG * len(_begins(runs)):
        width, nodes = _WIDE
        runs = cut(width)
    pieces = _cut(runs, np.arange(0, corpus.n, corpus.piece_rows(len(states) * nodes)))
    short = _SHORT if nodes == 1 else 3 * _SHORT
    if scheme.mode == "relative" and scores.numel() < short * len(pieces.run):
        rho = np.stack([scheme.positions(corpus.n, chunks) for chunks in retrieved])
        _score_by_row(scores, states, corpus, rho, base)
    else:
        vectors = _coefficients(states, runs, scheme, nodes, base)
        counts = [len(of_state.first) for of_state in runs]
        _score_by_piece(scores, vectors, counts, corpus, pieces)


def _score_by_piece(
    scores: Tensor, vectors: Tensor, counts: Sequence[int], corpus: _Corpus, pieces: _Pieces
) -> None:
    """One product per piece with the vectors of its runs, then one polynomial per chunk."""
    run = torch.from_numpy(pieces.run).to(scores.device)
    nodes = vectors.shape[1]
    columns = nodes * run.shape[1]
    parts, steps = None, None
    if corpus.in_integers:
        parts, steps = in_parts(vectors, counts)
    for some in pieces.groups(corpus.block_rows(columns), _BLOCK // (columns * vectors.shape[2])):
        bounds = pieces.bounds[some.start : some.stop + 1]
        block, edges, places = corpus.read(bounds)
        if parts is not None and steps is not None and isinstance(block, QuantizedRows):
            powers = block.products(edges, parts[run[some]], steps)
        else:
            order = torch.arange(nodes, device=run.device)[:, None]
            powers = _products(corpus, block, edges, vectors[run[some][:, None], order])
        if places is not None:
            powers = powers[places]
        q = powers[:, -1]
        if powers.shape[1] > 1:
            t = pieces.t(some, like=q)
            for coefficient in reversed(powers[:, :-1].unbind(1)):
                q = torch.addcmul(coefficient, q, t)
        scores[:, bounds[0] : bounds[-1]] = q.T


def _products(corpus: _Corpus, block: Rows, edges: NDArray[np.int64], vectors: Tensor) -> Tensor:
    """The product of each row with the vectors of its piece, ``[G, P, S, d]``: ``[L, P, S]``."""
    nodes, states = vectors.shape[1:3]
    columns = _two_at_least(vectors.flatten(1, 2))
    products = vectors.new_empty(len(block), columns.shape[1])
    if isinstance(block, Tensor) and block.dtype == torch.float32:
        # pieces of equal length at once: a thread takes whole ones
        for some in _of_equal_length(np.diff(edges)):
            rows, pieces = slice(edges[some.start], edges[some.stop]), (some.stop - some.start, -1)
            out = torch.unflatten(products[rows], 0, pieces)
            torch.bmm(torch.unflatten(block[rows], 0, pieces), columns[some].mT, out=out)
    else:
        numbers = block.values if isinstance(block, QuantizedRows) else block
        # piece by piece: what was just converted is still in the cache when it is multiplied
        for (first, last), c in zip(itertools.pairwise(edges.tolist()), columns, strict=True):
            torch.mm(corpus.converted(numbers[first:last]), c.T, out=products[first:last])
    if isinstance(block, QuantizedRows):  # fewer products than rows have numbers
        products.mul_(block.scales[:, None])
    return torch.unflatten(products[:, : nodes * states], 1, (nodes, states))


def _of_equal_length(lengths: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive pieces that are equally long, as those of a single state mostly are."""
    ends = np.flatnonzero(np.diff(lengths, append=-1)) + 1
    return itertools.starmap(slice, itertools.pairwise([0, *ends.tolist()]))


def _two_at_least(vectors: Tensor) -> Tensor:
    # BLAS may give a product with one column to a single thread, with two to all of them.
    return vectors if vectors.shape[-2] > 1 else torch.cat([vectors, vectors], dim=-2)


def _coefficients(
    states: Tensor, runs: Sequence[Runs], scheme: PositionScheme, nodes: int, base: float
) -> Tensor:
    """The vectors whose products with a chunk are the coefficients of Q as a polynomial in t.

    Returns:
        ``[R, P, d]`` for the R runs of all states and P nodes; one node suffices for constant ρ.
    """
    owner = np.repeat(np.arange(len(runs)), [len(of_state.first) for of_state in runs])
    states = states[torch.from_numpy(owner).to(states.device), None]
    if scheme.mode == "none":
        return states
    first = np.concatenate([of_state.first for of_state in runs])
    last = np.concatenate([of_state.last for of_state in runs])
    middle = torch.from_numpy((first + last) / 2).to(states.device)
    states = rotate(states, -middle[:, None], base)
    if nodes == 1:
        return states
    # R(ht) as a polynomial in t: few half widths h are different. By the symmetry of the nodes its
    # even powers only scale a component pair, and its odd ones turn it by a right angle.
    half, which = np.unique(((last - first) / 2).round(12), return_inverse=True)
    t = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    turns = phases(torch.from_numpy(-half[:, None] * t).to(states.device), states.shape[-1], base)
    powers = torch.from_numpy(np.linalg.inv(np.vander(t, increasing=True))).to(turns) @ turns
    even, odd = powers[:, ::2].real, powers[:, 1::2].imag
    table = torch.stack([_paired(even, even), _paired(-odd, odd)], dim=2).to(states)
    vectors = table[torch.from_numpy(which).to(states.device)]
    turned = torch.unflatten(states, -1, (-1, 2)).flip(-1).flatten(-2)
    return vectors.mul_(torch.stack([states, turned], dim=2)).flatten(1, 2)


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """Factors for both components of each pair of both halves: ``[..., d / 4]`` to ``[..., d]``."""
    return torch.stack([first, second], dim=-1).flatten(-2).repeat(*[1] * (first.ndim - 1), 2)


class _Pieces(NamedTuple):
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

    def groups(self, most_rows: int, most_pieces: int) -> Iterator[slice]:
        """Consecutive pieces, as many as together do not exceed these limits, but at least one."""
        first = 0
        while first < len(self.run):
            limit = np.searchsorted(self.bounds, self.bounds[first] + most_rows, side="right") - 1
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
        for equally in _of_equal_length(lengths):
            length = int(lengths[equally.start])
            rows = t[bounds[equally.start] - bounds[0] : bounds[equally.stop] - bounds[0]]
            equal = torch.unflatten(rows, 0, (-1, length))
            torch.addcmul(start[equally, None], place[:length], slope[equally, None], out=equal)
        return t


def _cut(runs: Sequence[Runs], blocks: NDArray[np.int64]) -> _Pieces:
    """Cut the chunks wherever a run of any state, or a block, begins."""
    bounds = np.union1d(blocks, _begins(runs))
    run, start, slope, count = [], [], [], 0
    for of_state in runs:
        own = np.searchsorted(of_state.bounds, bounds[:-1], side="right") - 1
        slope.append(2 / np.maximum(np.diff(of_state.bounds) - 1, 1)[own])
        start.append((bounds[:-1] - of_state.bounds[own]) * slope[-1] - 1)
        run.append(own + count)
        count += len(of_state.first)
    return _Pieces(bounds, *(np.stack(columns, axis=1) for columns in (run, start, slope)))


def _begins(runs: Sequence[Runs]) -> NDArray[np.int64]:
    """The chunks with which a run of any state begins, and how many chunks there are."""
    begins: NDArray[np.int64] = np.unique(np.concatenate([of_state.bounds for of_state in runs]))
    return begins


def _score_by_row(
    scores: Tensor, states: Tensor, corpus: _Corpus, rho: NDArray[np.float64], base: float
) -> None:
    """A rotated state for every chunk: costs less than many products of a few chunks each."""
    positions = torch.from_numpy(rho).to(states.device)
    for part, block in corpus.blocks(columns=states.numel()):
        scores[:, part] = q_at(states[:, None], block, positions[:, part], base)


def _score_absolute(scores: Tensor, states: Tensor, corpus: _Corpus, base: float) -> None:
    """Turn every block by the same angles: ``⟨s, R(b + i)a⟩ = ⟨R(-b)s, R(i)a⟩``."""
    dimension = states.shape[1]
    here = torch.arange(min(corpus.n, corpus.piece_rows(dimension)), device=states.device)
    angles = phases(here, dimension, base).to(torch.complex64)
    for part, block in corpus.blocks(columns=dimension):
        vectors = _two_at_least(rotate(states, -here.new_tensor(part.start), base))
        scores[:, part] = (turn(block, angles[: len(block)]) @ vectors.T)[:, : len(states)].T


class _Corpus:
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
        self._width = actions.shape[1]
        self._converted: Tensor | None = None
        as_stored = isinstance(actions, QuantizedRows) and not turned
        # a GPU multiplies integers in some shapes alone
        self.in_integers = as_stored and actions.device.type == "cpu" and multiplies_integers()

    def block_rows(self, columns: int) -> int:
        """How many rows to read at a time where each of them fills so many temporary columns."""
        if self.in_integers:
            columns *= 8  # two parts of each, as integers and as numbers
        elif isinstance(self.actions, QuantizedRows):
            columns *= 2  # of a quarter of the memory, half the blocks are not too large a share
        # some of the rows may have to be copied
        return max(1, _BLOCK // (columns if self.rows is None else max(columns, self._width)))

    def piece_rows(self, columns: int) -> int:
        """How many of those to multiply at a time, which is when they are converted to float32."""
        unconverted = self.in_integers or self.actions.dtype == torch.float32
        most = self.block_rows(columns)
        return most if unconverted else min(most, max(1, _BLOCK // (2 * self._width)))

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
        return torch.tensor(rows, device=self.actions.device)
