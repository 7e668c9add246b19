"""Q of all chunks, or the chunks of highest Q, for one or many states (paper §3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.candidate_rows import BLOCK, CandidateRows
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.q_values import QValues
from qrag_retriever.rotary import q_at
from qrag_retriever.scan import Scan, scan
from qrag_retriever.shortlist import shortlist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.candidate_rows import Rows
    from qrag_retriever.positions import PositionScheme

# Set by measurement (examples/benchmarks/scoring.py); they change the time and memory taken only.
_GROUP = 32  # states that share a pass over the corpus
_FEW = 8192  # chunks that are all scored exactly
_EACH = 500  # and so many more for each of the best that is needed
_CLOSE = 0.01  # share of the chunks that may be among the best, above which all are scored exactly
# Of vectors shorter than this some products are too small for float32 to tell how far off they are.
_TINY = 1e-15


@torch.no_grad()
def score(
    states: Tensor,
    actions: Rows,
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
    corpus = _candidates(states, actions, retrieved, rows, scheme)
    states = states.to(actions.device, torch.float32)
    scores = states.new_empty(len(states), corpus.n)
    # where training computes in half precision, validation still scores in float32
    with torch.autocast(states.device.type, enabled=False):
        for some in _groups(states, corpus):
            group = _Group(states[some], corpus, retrieved[some], scheme, base)
            group.score_all(scores[some])
    return scores


@torch.no_grad()
def score_best(
    states: Tensor,
    actions: Rows,
    retrieved: Sequence[Sequence[int]],
    scheme: PositionScheme,
    count: int,
    *,
    longest: Callable[[], float],
    excluded: Sequence[int] = (),
    rows: NDArray[np.int64] | None = None,
    base: float = 10000.0,
) -> list[QValues]:
    """Q of the best chunks for some states.

    Where that takes less time, all chunks are scored roughly first, with an error that is known,
    and then exactly those that may be among the best: so they are the same, but for rounding, as if
    `score` had scored all.

    Args:
        states: State embeddings ``[S, d]``.
        actions: As `score`.
        retrieved: As `score`.
        scheme: As `score`.
        count: How many of the best chunks are needed.
        longest: Gives a length (Euclidean norm) that no row of ``actions`` exceeds; called only
            where it is needed, as it may have to read them all.
        excluded: Candidates that do not count, as retrieved ones do not.
        rows: As `score`.
        base: As `score`.

    Returns:
        For each state Q of some candidates, among them the ``count`` best that are neither
        retrieved nor excluded, with all that equal the last of them.

    Raises:
        InvalidInputError: As `score`.
        ConfigError: As `score`.

    Example:
        >>> from qrag_retriever.positions import PositionScheme
        >>> actions = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
        >>> arguments = (actions[:1], actions, [[2]], PositionScheme("relative"))
        >>> q, = score_best(*arguments, count=3, longest=lambda: 13.0)
        >>> q.best(3) == score(*arguments)[0].topk(3).indices.tolist(), len(q.values) < 200
        (True, True)
    """
    corpus = _candidates(states, actions, retrieved, rows, scheme)
    states = states.to(actions.device, torch.float32)
    if corpus.n == 0:
        return [QValues(np.empty(0, dtype=np.float32)) for _ in states]
    result: list[QValues] = []
    with torch.autocast(states.device.type, enabled=False):
        for some in _groups(states, corpus):
            group = _Group(states[some], corpus, retrieved[some], scheme, base)
            result += group.score_best(count, longest, excluded)
    return result


def _candidates(
    states: Tensor,
    actions: Rows,
    retrieved: Sequence[Sequence[int]],
    rows: NDArray[np.int64] | None,
    scheme: PositionScheme,
) -> CandidateRows:
    if states.ndim != 2 or states.shape[1:] != actions.shape[1:] or len(states) != len(retrieved):
        raise InvalidInputError(
            f"states {list(states.shape)}, actions {list(actions.shape)} and {len(retrieved)} lists"
            " of retrieved chunks do not fit; give [S, d], [M, d] and S lists."
        )
    return CandidateRows(actions, rows, turned=scheme.mode == "absolute")


def _groups(states: Tensor, corpus: CandidateRows) -> Iterator[slice]:
    """The states that share a pass over the corpus."""
    return (slice(i, i + _GROUP) for i in range(0, len(states) if corpus.n else 0, _GROUP))


class _Group(NamedTuple):
    """Some states that share a pass over the corpus."""

    states: Tensor
    corpus: CandidateRows
    retrieved: Sequence[Sequence[int]]
    scheme: PositionScheme
    base: float

    def score_all(self, scores: Tensor) -> None:
        """Write Q of all candidates, ``[S, n]``."""
        self._write(scan(*self), scores)

    def score_best(
        self, count: int, longest: Callable[[], float], excluded: Sequence[int]
    ) -> list[QValues]:
        """Q of the best candidates and perhaps others, see `score_best`."""
        n = self.corpus.n
        found = scan(*self, rough=n > _FEW + _EACH * count)
        if found.error is None:
            return self.score_every(found)
        limit = longest()
        lengths = self.states.cpu().double().norm(dim=1).clamp(max=limit)
        error = (found.error * limit).float().masked_fill(lengths < _TINY, torch.inf)
        error = error.to(self.states.device)
        near = shortlist(found.blocks, error, count, self.retrieved, excluded, int(_CLOSE * n))
        some = {state: own for state, own in enumerate(near) if own is not None}
        result = dict(zip(some, self.only([*some]).score_some([*some.values()]), strict=True))
        if others := [state for state in range(len(near)) if state not in some]:
            rest = self.only(others)
            result |= zip(others, rest.score_every(scan(*rest)), strict=True)
        return [result[state] for state in range(len(near))]

    def only(self, states: Sequence[int]) -> _Group:
        """Some of the states."""
        retrieved = [self.retrieved[state] for state in states]
        return self._replace(states=self.states[list(states)], retrieved=retrieved)

    def score_every(self, found: Scan) -> list[QValues]:
        """Q of all candidates for each state."""
        scores = self.states.new_empty(len(self.states), self.corpus.n)
        self._write(found, scores)
        return [QValues(of_state) for of_state in scores.cpu().numpy()]

    def _write(self, found: Scan, scores: Tensor) -> None:
        for first, q in found.blocks:
            scores[:, first : first + len(q)] = q.T

    def score_some(self, numbers: Sequence[NDArray[np.int64]]) -> Iterable[QValues]:
        """Q of some candidates for each state."""
        if not numbers:
            return []
        counts = [len(own) for own in numbers]
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        places = zip(self.retrieved, numbers, strict=True)
        rho = np.concatenate([self.scheme.positions(self.corpus.n, *place) for place in places])
        chunks = np.concatenate(numbers)
        q = self.states.new_empty(len(chunks))
        step = max(1, BLOCK // self.states.shape[1])
        for first in range(0, len(chunks), step):
            some = slice(first, first + step)
            states = self.states[owner[some].to(q.device)]
            actions = self.corpus.take(chunks[some])
            if self.scheme.mode == "none":
                q[some] = (states * actions).sum(dim=-1)
            else:
                positions = torch.from_numpy(rho[some]).to(q.device)
                q[some] = q_at(states, actions, positions, self.base)
        return map(QValues, np.split(q.cpu().numpy(), np.cumsum(counts)[:-1]), numbers)
