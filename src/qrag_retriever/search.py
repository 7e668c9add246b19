"""Which chunks to take, given Q: greedy, beam and sampled search with early stopping.

Knows numbers, not text: a `Search` says which states it wants Q-values for and is told them, so
that one encoder pass can serve many searches.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Literal

import numpy as np

from qrag_retriever.config import QRAGConfig
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.q_values import QValues

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

StopReason = Literal["budget", "threshold", "exhausted"]

# The soft policy chooses among so many of the best actions, as in training.
_TOP_ACTIONS = 5

_ROUNDING = 1e-9  # of log-probabilities


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        k: Retrieval budget T, the number of chunks.
        q_threshold: Stop at the first step whose best Q lies below it (paper App. B).
        beams: Most trajectories followed at once (paper App. C), the most probable under the soft
            policy (eq. 3); 1: greedy.
        temperature: Draw each chunk from softmax(Q / temperature) (eq. 3) instead of the best.
        seed: Seed of those draws.
        chunks_per_step: Chunks taken from one state; more save encoder passes for a large ``k``.
        runners_up: Next best chunks reported with each step.

    Raises:
        InvalidInputError: If a value is out of range.
    """

    k: int
    q_threshold: float | None = None
    beams: int = 1
    temperature: float | None = None
    seed: int | None = None
    chunks_per_step: int = 1
    runners_up: int = 3

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("beams", 1), ("chunks_per_step", 1), ("runners_up", 0)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise InvalidInputError(f"{name}={value!r}; give an integer of at least {least}.")
        whole = isinstance(self.seed, (int, np.integer)) and not isinstance(self.seed, bool)
        if self.seed is not None and not (whole and self.seed >= 0):
            raise InvalidInputError(f"seed={self.seed!r}; give an integer of at least 0, or None.")
        if self.q_threshold is not None and not _is_number(self.q_threshold):
            raise InvalidInputError(
                f"q_threshold={self.q_threshold!r}; give a number, or None to always use up k."
            )
        if self.temperature is not None:
            if not _is_number(self.temperature) or self.temperature <= 0:
                raise InvalidInputError(
                    f"temperature={self.temperature!r}; give a number above 0, or None for the "
                    "best chunk at every step."
                )
            if self.beams > 1:
                raise InvalidInputError(
                    f"temperature={self.temperature} and beams={self.beams} exclude each other; "
                    "leave one of them out."
                )

    @property
    def breadth(self) -> int:
        """How many of the best chunks a step may have to look at."""
        return self.chunks_per_step + max(self.rivals, self.runners_up)

    @property
    def rivals(self) -> int:
        """How many of the best chunks the soft policy, which ranks beams, chooses among."""
        return max(self.beams, _TOP_ACTIONS) if self.beams > 1 else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Pick:
    """One chunk taken: at which step, which one, its Q, and the next best (number, Q)."""

    step: int
    index: int
    q_value: float
    runners_up: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Beam:
    """A trajectory on its way.

    Attributes:
        picks: What was taken, in order.
        stopped: Why it ended; ``None`` while it goes on.
        q_values: Q of all candidates at each step, where they are kept.
        log_probability: That the soft policy (eq. 3) takes it, what `Search` ranks beams by; 0
            where there is but one. (Q itself is no such score: it is high as long as support is
            missing, and so ranks those trajectories first that have not found it.)
    """

    picks: tuple[Pick, ...] = ()
    stopped: StopReason | None = None
    q_values: tuple[NDArray[np.float32], ...] = ()
    log_probability: float = 0.0

    @property
    def retrieved(self) -> tuple[int, ...]:
        """Numbers of the chunks taken, in order."""
        return tuple(pick.index for pick in self.picks)


class Search:
    """A search over the chunks 0 … n-1 of one query.

    Ask for `states`, give their Q-values to `advance`, until `done`.

    Args:
        n: Number of candidate chunks; ``None``: not known.
        options: How to search.
        excluded: Candidates that are never taken.
        keep_q_values: Keep Q of all candidates at each step.
        alpha: Temperature α of the soft policy by which beams are ranked.

    Example:
        >>> search = Search(3, SearchOptions(k=2))
        >>> while not search.done:
        ...     search.advance(np.array([[0.2, 0.9, 0.5]], dtype=np.float32))
        >>> search.best.retrieved
        (1, 2)
    """

    def __init__(
        self,
        n: int | None,
        options: SearchOptions,
        excluded: Collection[int] = (),
        *,
        keep_q_values: bool = False,
        alpha: float = QRAGConfig.alpha,
    ) -> None:
        self.options = options
        self._n = n
        self._alpha = alpha
        self._excluded = np.fromiter(excluded, dtype=np.int64, count=len(excluded))
        self._available = (sys.maxsize if n is None else n) - len(set(excluded))
        self._keep = keep_q_values
        self._step = 0
        self._random = np.random.default_rng(options.seed)
        start: StopReason | None = None if self._available > 0 else "exhausted"
        self._beams = [Beam(stopped=start)]

    @property
    def done(self) -> bool:
        """Whether every trajectory has ended."""
        return all(beam.stopped for beam in self._beams)

    @property
    def best(self) -> Beam:
        """The leading trajectory."""
        return self._beams[0]

    @property
    def states(self) -> list[tuple[int, ...]]:
        """Retrieved chunks, in order, of each trajectory that goes on."""
        return [beam.retrieved for beam in self._beams if not beam.stopped]

    def advance(self, q_values: Iterable[QValues | NDArray[np.float32]]) -> None:
        """Take the next step.

        Args:
            q_values: Q of the candidates in each of `states`, or of those that may be among the
                `SearchOptions.breadth` best; as an array, of all, float32 ``[len(states), n]``.
                What is already retrieved or excluded may hold any value. Unknown Q is ``-inf``.

        Raises:
            QRAGError: If a Q-value is NaN.
        """
        self._step += 1
        rows = iter(q_values)
        pool: list[Beam] = []
        for beam in self._beams:
            pool.extend([beam] if beam.stopped else self._expand(beam, _known(next(rows))))
        pool.sort(key=lambda beam: -beam.log_probability)
        by_set: dict[frozenset[int], Beam] = {}
        for beam in pool:  # two orders that lead to the same set are one beam
            by_set.setdefault(frozenset(beam.retrieved), beam)
        self._beams = self._that_may_lead(list(by_set.values())[: self.options.beams])

    def _that_may_lead(self, beams: list[Beam]) -> list[Beam]:
        """All but those that will be behind another one whatever they find, and so cost in vain.

        The most probable of R actions has a probability of at least 1 / R, and none of more than 1.
        What takes the place of one that is dropped is behind it, and so cannot lead either.
        """
        rivals = self.options.rivals + (self.options.q_threshold is not None)
        at_least = max(
            beam.log_probability
            - (0 if beam.stopped else (self.options.k - len(beam.picks)) * math.log(rivals))
            for beam in beams
        )
        return [beam for beam in beams if not beam.log_probability < at_least - _ROUNDING]

    def _expand(self, beam: Beam, q_values: QValues) -> list[Beam]:
        options = self.options
        taken = np.array(beam.retrieved, dtype=np.int64)
        q = q_values.without(np.concatenate([self._excluded, taken]))
        left = self._available - len(beam.picks)
        take = min(options.chunks_per_step, options.k - len(beam.picks), left)
        wanted = min(take + max(options.rivals - 1, options.runners_up), left)
        ranked = q.best(wanted)
        if not ranked:
            return [dataclasses.replace(beam, stopped="exhausted")]
        if options.q_threshold is not None:
            if q.of(ranked[0]) < options.q_threshold:
                return [self._extend(beam, [], ranked, q, stopped="threshold")]
            above = sum(bool(q.of(index) >= options.q_threshold) for index in ranked)
        else:
            above = len(ranked)
        if options.temperature is not None:
            drawn = self._drawn(q).best(take)
            stopped: StopReason | None = "threshold" if len(drawn) < take else None
            return [self._extend(beam, drawn, ranked, q, stopped=stopped)]
        head, others = ranked[: take - 1], ranked[take - 1 : above]
        if not others:  # fewer than wanted at once are left, or reach the threshold
            reason: StopReason = "threshold" if above < len(ranked) else "exhausted"
            return [self._extend(beam, ranked[:above], ranked, q, stopped=reason)]
        return [self._extend(beam, [*head, other], ranked, q) for other in others[: options.beams]]

    def _drawn(self, q: QValues) -> QValues:
        """Keys whose order is a draw from the soft policy (eq. 3) without replacement."""
        t = np.float64(self.options.temperature)
        noise = self._random.gumbel(size=q.values.shape)
        # the same order either way; this way no temperature overflows
        with np.errstate(invalid="ignore"):  # an endless temperature makes no number of -inf
            keys = q.values + t * noise if t < 1 else q.values / t + noise
        threshold = self.options.q_threshold
        least = -np.inf if threshold is None else threshold
        keys[np.isneginf(q.values) | (q.values < least)] = -np.inf
        return QValues(keys, q.numbers)

    def _extend(
        self,
        beam: Beam,
        taken: Sequence[int],
        ranked: Sequence[int],
        q: QValues,
        stopped: StopReason | None = None,
    ) -> Beam:
        others = [index for index in ranked if index not in taken][: self.options.runners_up]
        runners_up = tuple((index, float(q.of(index))) for index in others)
        picks = [Pick(self._step, index, float(q.of(index)), runners_up) for index in taken]
        count = len(beam.picks) + len(picks)
        if count >= self.options.k:
            stopped = "budget"
        elif count >= self._available:
            stopped = "exhausted"
        kept = beam.q_values
        if self._keep and self._n is not None and picks:
            kept = (*kept, q.filled(self._n))
        log_probability = beam.log_probability
        if self.options.beams > 1 and count > 0:  # who takes nothing has no rivals
            log_probability += self._log_policy(q, ranked, taken, stops=stopped == "threshold")
        return Beam((*beam.picks, *picks), stopped, kept, log_probability)

    def _log_policy(
        self, q: QValues, ranked: Sequence[int], taken: Sequence[int], *, stops: bool
    ) -> float:
        """Log-probability of taking chunks one after the other, and perhaps of stopping then.

        Each is chosen among the best that are left; to stop is one more action, whose value is the
        threshold.
        """
        total, threshold = 0.0, self.options.q_threshold
        for place in range(len(taken) + stops):
            rivals = ranked[place : place + self.options.rivals]
            values = [float(q.of(index)) for index in rivals]
            values += [] if threshold is None else [threshold]
            value = float(q.of(taken[place])) if place < len(taken) else values[-1]
            gaps = (np.array([value, *values]) - max(values)) / self._alpha
            total += gaps[0] - np.logaddexp.reduce(gaps[1:])
        return float(total)


def _known(q_values: QValues | NDArray[np.float32]) -> QValues:
    if isinstance(q_values, QValues):
        return q_values
    return QValues(np.asarray(q_values, dtype=np.float32))


def _is_number(value: object) -> bool:
    numbers = (int, float, np.number)
    return isinstance(value, numbers) and not isinstance(value, bool) and not math.isnan(value)
