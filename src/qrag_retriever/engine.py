"""Multi-step retrieval: a query in, a `Trajectory` out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.scoring import score
from qrag_retriever.search import Beam, Search, SearchOptions
from qrag_retriever.state import check_query
from qrag_retriever.trajectory import RunnerUp, Step, Trajectory

# embeddings may be mapped read-only, and nothing here writes into them
warnings.filterwarnings("ignore", "The given NumPy array is not writable", module=__name__)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.ann import AnnIndex
    from qrag_retriever.index import ChunkIndex, Snapshot
    from qrag_retriever.model import QRAGModel

    OnStep = Callable[[int, Step], None]


class MultiStepRetriever:
    """Runs searches of a model over an index.

    Args:
        model: Encoders and settings.
        index: Chunks and their action embeddings.

    Raises:
        FingerprintMismatchError: If the index was made by another model.
    """

    def __init__(self, model: QRAGModel, index: ChunkIndex) -> None:
        if model is not index.model and model.fingerprint != index.fingerprint:
            raise FingerprintMismatchError(
                f"The index was made by the model {index.fingerprint[:12]}…, the model given is "
                f"{model.fingerprint[:12]}…. Search with the model that made the index, or make "
                "the index again."
            )
        self.model = model
        self.index = index

    def search(self, query: str, options: SearchOptions, **selection: Any) -> Trajectory:
        """Search for one query; see `search_batch`."""
        return self.search_batch([query], options, **selection)[0]

    def search_batch(
        self,
        queries: Sequence[str],
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
        keep_q_values: bool = False,
        on_step: OnStep | None = None,
    ) -> list[Trajectory]:
        """Search for several queries at once, with one encoder pass a step for all of them.

        Args:
            queries: Queries.
            options: How to search.
            filter: Which chunks are candidates, see `filters.compile_filter`; positions are
                counted over these alone.
            exclude_ids: Chunks that are never taken; they keep their place in the document.
            keep_q_values: Keep Q of every candidate at each step, for `Trajectory.plot`.
            on_step: Called with the number of the query and each step, as `stream_batch` gives
                them.

        Returns:
            A trajectory for each query.

        Raises:
            InvalidInputError: If a query is empty, the index holds no chunk, an excluded id is
                unknown or the filter is malformed.
        """
        run = _Run(
            self.model,
            self.index,
            queries,
            options,
            filter=filter,
            exclude_ids=exclude_ids,
            keep_q_values=keep_q_values,
        )
        while run.advance():
            if on_step is not None:
                for number, step in run.new_steps():
                    on_step(number, step)
        return [run.trajectory(number) for number in range(len(queries))]

    def stream(self, query: str, options: SearchOptions, **selection: Any) -> Iterator[Step]:
        """The steps of one search as they are taken; see `stream_batch`."""
        return (step for _, step in self.stream_batch([query], options, **selection))

    def stream_batch(
        self, queries: Sequence[str], options: SearchOptions, **selection: Any
    ) -> Iterator[tuple[int, Step]]:
        """The steps of several searches, each as soon as it is known, with the query's number.

        A step is known once it is taken; with several beams when the search has ended, since until
        then another trajectory may win. Arguments and errors as `search_batch`.
        """
        run = _Run(self.model, self.index, queries, options, **selection)
        while run.advance():
            yield from run.new_steps()


class _Run:
    """Searches that go step by step together over one snapshot of the index."""

    def __init__(
        self,
        model: QRAGModel,
        index: ChunkIndex,
        queries: Sequence[str],
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
        keep_q_values: bool = False,
    ) -> None:
        for query in queries:
            check_query(query)
        if isinstance(exclude_ids, str):
            raise InvalidInputError("exclude_ids is a list of ids, not one str; put it in a list.")
        self.model = model
        self.queries = queries
        self.snapshot: Snapshot = index.snapshot()
        if len(self.snapshot) == 0:
            raise InvalidInputError("The index holds no chunks; add some before searching.")
        self.rows = self.snapshot.select(filter)
        self.n = len(self.snapshot) if self.rows is None else len(self.rows)
        excluded = self._numbers([self.snapshot.row_of(chunk_id) for chunk_id in exclude_ids])
        # what an approximate index is asked for besides the chunks already retrieved
        self.spare = len(excluded) + options.chunks_per_step
        self.spare += max(options.beams, options.runners_up)
        self.actions = self.snapshot.tensor()
        self.searches = [
            Search(self.n, options, excluded, keep_q_values=keep_q_values) for _ in queries
        ]
        self.reported = [0] * len(queries)

    def advance(self) -> bool:
        """Take one step in every search that goes on; whether there was one."""
        going = [number for number, search in enumerate(self.searches) if not search.done]
        if not going:
            return False
        retrieved = [(number, beam) for number in going for beam in self.searches[number].states]
        states = [(self.queries[number], self._chunks_of(beam)) for number, beam in retrieved]
        vectors = self.model.encode_states(states)
        q_values = self._score(vectors, [beam for _, beam in retrieved])
        start = 0
        for number in going:
            end = start + len(self.searches[number].states)
            self.searches[number].advance(q_values[start:end])
            start = end
        return True

    def new_steps(self) -> Iterator[tuple[int, Step]]:
        """Steps that are certain and were not reported before."""
        for number, search in enumerate(self.searches):
            if search.options.beams > 1 and not search.done:
                continue
            picks = search.best.picks
            for place in range(self.reported[number], len(picks)):
                yield number, self._step(search.best, place)
            self.reported[number] = len(picks)

    def trajectory(self, number: int) -> Trajectory:
        """The outcome of one search."""
        best = self.searches[number].best
        return Trajectory(
            query=self.queries[number],
            steps=tuple(self._step(best, place) for place in range(len(best.picks))),
            stopped=best.stopped or "budget",
            n_candidates=self.n,
            q_values=best.q_values,
            candidates=self.rows,
        )

    def _score(
        self, states: NDArray[np.float32], retrieved: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        if self.snapshot.ann is not None:
            return self._score_nearest(self.snapshot.ann, states, retrieved)
        config = self.model.config
        return score(
            torch.from_numpy(states),
            self.actions,
            retrieved,
            config.position_scheme,
            rows=self.rows,
            base=config.rotary_base,
        ).numpy()

    def _score_nearest(
        self, ann: AnnIndex, states: NDArray[np.float32], retrieved: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Exact Q of the chunks an approximate index finds; ``-inf`` for all others."""
        q_values = np.full((len(states), self.n), -np.inf, dtype=np.float32)
        count = self.spare + max(map(len, retrieved))
        found = ann.search(states, count, self.rows)
        for q, state, rows in zip(q_values, states, found, strict=True):
            q[self._numbers(rows)] = self.snapshot.embeddings[rows] @ state
        return q_values

    def _chunks_of(self, retrieved: Sequence[int]) -> list[str]:
        in_document_order = self.model.config.state_order == "document"
        order = sorted(retrieved) if in_document_order else retrieved
        return [self._chunk(number).embed_text for number in order]

    def _step(self, beam: Beam, place: int) -> Step:
        pick = beam.picks[place]
        before = [other.index for other in beam.picks if other.step < pick.step]
        scheme = self.model.config.position_scheme
        return Step(
            step=pick.step,
            chunk=self._chunk(pick.index),
            index=self._row(pick.index),
            q_value=pick.q_value,
            position=float(scheme.positions(self.n, before)[pick.index]),
            runners_up=tuple(
                RunnerUp(self._chunk(index).id, self._row(index), q) for index, q in pick.runners_up
            ),
        )

    def _chunk(self, number: int) -> Any:
        return self.snapshot.chunks[self._row(number)]

    def _row(self, number: int) -> int:
        return number if self.rows is None else int(self.rows[number])

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
