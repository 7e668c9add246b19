"""Multi-step retrieval: a query in, a `Trajectory` out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qrag_retriever.collector import collector_of
from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.search import Search, SearchOptions
from qrag_retriever.state import check_query, in_state_order
from qrag_retriever.trajectory import RunnerUp, Step, Trajectory

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from qrag_retriever.corpus import Corpus
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.q_values import QValues

    OnStep = Callable[[int, Step], None]


class MultiStepRetriever:
    """Runs searches of a model over an index.

    Args:
        model: Encoders and settings.
        index: Where to look for chunks.

    Raises:
        FingerprintMismatchError: If the index was made by another model, or the model has changed
            since.
    """

    def __init__(self, model: QRAGModel, index: Corpus) -> None:
        if not index.is_of(model):
            raise FingerprintMismatchError(
                f"The index was made by the model {index.fingerprint[:12]}…, the model given is "
                f"{model.fingerprint[:12]}…. Search with the model that made the index, as it was "
                "then, or make the index again."
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
            keep_q_values: Keep Q of every candidate at each step, for `Trajectory.plot`, where it
                is known.
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
        return [run.trajectory(number) for number in range(len(run.queries))]

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


def _checked_ids(ids: Collection[str] | None) -> list[str]:
    """Ids that a search leaves out, as a list; ``None`` stands for none."""
    if ids is None:
        return []
    given = [ids] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    if isinstance(ids, str) or not all(isinstance(id_, str) for id_ in given):
        raise InvalidInputError(f"exclude_ids={ids!r}; give a list of ids, each a str.")
    return given


class _Run:
    """Searches that go step by step together over what the index held at the start."""

    def __init__(
        self,
        model: QRAGModel,
        index: Corpus,
        queries: Sequence[str],
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
        keep_q_values: bool = False,
    ) -> None:
        if isinstance(queries, str):
            raise InvalidInputError("Give a list of queries; for one, use search or invoke.")
        queries = list(queries)
        for query in queries:
            check_query(query)
        exclude_ids = _checked_ids(exclude_ids)
        self.model = model
        self.queries = queries
        # a draw may take any chunk
        self._every = keep_q_values or options.temperature is not None
        self.candidates = index.candidates(
            queries, model, options, filter=filter, exclude_ids=exclude_ids
        )
        self.searches = [
            Search(
                own.n,
                options,
                own.excluded,
                keep_q_values=keep_q_values and own.complete,
                alpha=model.config.alpha,
            )
            for own in self.candidates
        ]
        self.reported = [0] * len(queries)

    def advance(self) -> bool:
        """Take one step in every search that goes on; whether there was one."""
        going = [number for number, search in enumerate(self.searches) if not search.done]
        if not going:
            return False
        beams = [(number, beam) for number in going for beam in self.searches[number].states]
        vectors = collector_of(self.model).encode_states(
            [(self.queries[number], self._texts(number, beam)) for number, beam in beams]
        )
        q_values = self._score(vectors, beams)
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
                yield number, self._step(number, place)
            self.reported[number] = len(picks)

    def trajectory(self, number: int) -> Trajectory:
        """The outcome of one search."""
        best, own = self.searches[number].best, self.candidates[number]
        return Trajectory(
            query=self.queries[number],
            steps=tuple(self._step(number, place) for place in range(len(best.picks))),
            stopped=best.stopped or "budget",
            n_candidates=own.n,
            q_values=best.q_values,
            candidates=own.rows,
        )

    def _score(
        self, states: NDArray[np.float32], beams: Sequence[tuple[int, Sequence[int]]]
    ) -> list[QValues]:
        """Q for each state, together for those that choose from the same candidates."""
        q_values: dict[int, QValues] = {}
        for own in {id(own): own for own in self.candidates}.values():
            places = [
                place for place, (number, _) in enumerate(beams) if self.candidates[number] is own
            ]
            if places:
                retrieved = [beams[place][1] for place in places]
                found = own.score(states[places], retrieved, every=self._every)
                q_values.update(zip(places, found, strict=True))
        return [q_values[place] for place in range(len(beams))]

    def _texts(self, number: int, retrieved: Sequence[int]) -> list[str]:
        own = self.candidates[number]
        order = in_state_order(retrieved, self.model.config.state_order, own.place)
        return [own.chunk(chunk).embed_text for chunk in order]

    def _step(self, number: int, place: int) -> Step:
        own, picks = self.candidates[number], self.searches[number].best.picks
        pick = picks[place]
        before = [other.index for other in picks if other.step < pick.step]
        return Step(
            step=pick.step,
            chunk=own.chunk(pick.index),
            index=own.place(pick.index),
            q_value=pick.q_value,
            position=own.position(pick.index, before),
            runners_up=tuple(
                RunnerUp(own.chunk(index).id, own.place(index), q) for index, q in pick.runners_up
            ),
        )
