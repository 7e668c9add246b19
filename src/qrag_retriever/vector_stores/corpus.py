"""A vector store in place of a `ChunkIndex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qrag_retriever.corpus import AllOf, Corpus
from qrag_retriever.errors import ConfigError, InvalidInputError, VectorStoreError
from qrag_retriever.q_values import QValues
from qrag_retriever.rotary import rotate
from qrag_retriever.vector_stores.kinds import open_store
from qrag_retriever.vector_stores.probe import score_to_q
from qrag_retriever.vector_stores.store import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.candidates import Candidates
    from qrag_retriever.chunk import Chunk
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.search import SearchOptions
    from qrag_retriever.vector_stores.store import Hit, Store


class StoreCorpus(Corpus):
    """The chunks of a vector store that was filled with a model's embeddings.

    Args:
        store: A vector store of LangChain or LlamaIndex, see `kinds.open_store`.
        model: The model that filled it. With ``positions="relative"`` its ρ must be truncated, so
            that runs of chunks share a rotated query.
        filter: In the store's own language; every search obeys it, whatever else it filters by.
        number_key: Key of the metadata under which each chunk's number in its document stands,
            from 0 without gaps; needed for positions and for ``state_order="document"``. FAISS has
            its row numbers.

    Raises:
        ConfigError: If the model's positions cannot be served, or ``number_key`` is missing.
        VectorStoreError: If the store fails, is of a kind that cannot serve, or its metric is not
            the inner product.
        FingerprintMismatchError: If another model filled it.
        InvalidInputError: If it is empty, or the filter cannot be used.
    """

    adds_filters = True

    def __init__(
        self, store: Any, model: QRAGModel, *, filter: Any = None, number_key: str | None = None
    ) -> None:
        self.model = model
        self.fingerprint = model.fingerprint
        self._store = open_store(store, number_key).narrowed(filter)
        self._check(model)
        self._to_q = score_to_q(self._store, model)

    def candidates(
        self,
        queries: Sequence[str],
        model: QRAGModel,
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
    ) -> Sequence[Candidates]:
        """See `Corpus`; the filter is in the store's own language and adds to that of the corpus.

        Ids that the store does not hold may be excluded too.
        """
        self._check(model)
        own = _StoreCandidates(
            self._narrowed(options, filter), model, options, exclude_ids, self._to_q
        )
        return [own] * len(queries)

    def check(self, options: SearchOptions, filter: Any) -> None:
        """See `Corpus`."""
        self._narrowed(options, filter)

    def _narrowed(self, options: SearchOptions, filter: Any) -> Store:
        """The store as a search sees it."""
        if options.temperature is not None:
            raise InvalidInputError(
                f"temperature={options.temperature} needs Q of every chunk, and a vector store "
                "tells of the best alone. Leave it out, or use a ChunkIndex."
            )
        store = self._store
        for part in filter if isinstance(filter, AllOf) else (filter,):
            store = store.narrowed(part)
        return store

    def _check(self, model: QRAGModel) -> None:
        config, kind = model.config, self._store.kind
        scheme = config.position_scheme
        if scheme.mode == "absolute" or (scheme.mode == "relative" and not scheme.truncate):
            raise ConfigError(
                f"A vector store cannot serve positions={config.positions!r} with "
                f"truncate_positions={config.truncate_positions}: every chunk would need a rotated "
                "query of its own. Use a ChunkIndex, or a model with positions='none', or "
                "'relative' with truncate_positions=True."
            )
        if not self._store.numbered and (scheme.mode != "none" or config.state_order == "document"):
            raise ConfigError(
                f"The model's positions={config.positions!r} and state_order="
                f"{config.state_order!r} need the order of the document, which this {kind} store "
                "does not know. Write each chunk's number, from 0, into its metadata and give the "
                "key as number_key."
            )

    def __repr__(self) -> str:
        return f"StoreCorpus({self._store.kind}, dimension={self.model.dimension})"

    def __copy__(self) -> StoreCorpus:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StoreCorpus:
        return self


# Milvus returns no more for one vector
_MOST = 16_384


class _StoreCandidates:
    """The chunks of a store, by numbers that let the first in the document win where Q is equal.

    Where the model has positions these are the numbers in the document. Otherwise chunks get them
    as they are seen, and equal chunks have equal Q in every state: none of them gets a number until
    all of them have been seen, as `_found` sees to.
    """

    rows = None
    excluded = ()
    complete = False

    def __init__(
        self,
        store: Store,
        model: QRAGModel,
        options: SearchOptions,
        exclude_ids: Collection[str],
        to_q: Callable[[Any], Any],
    ) -> None:
        self._store = store
        self._config = model.config
        self._scheme = model.config.position_scheme
        self._left_out = frozenset(exclude_ids)
        self._breadth = options.breadth
        self._to_q = to_q
        self._seen: dict[int, Hit] = {}
        self._number_of: dict[str, int] = {}
        placed = self._scheme.mode != "none"
        ordered = placed or model.config.state_order == "document"
        count = self._checked_count() if ordered else None
        self.n = count if placed else None

    def score(
        self,
        states: NDArray[np.float32],
        retrieved: Sequence[Sequence[int]],
        *,
        every: bool = False,  # noqa: ARG002
    ) -> list[QValues]:
        """Q of the best chunks of each state and of all equal to them."""
        best = self._found(states, retrieved)
        self._take_in({chunk_id: hit for hits in best for chunk_id, hit in hits.items()})
        known = [
            sorted((self._number_of[chunk_id], self._q(hit)) for chunk_id, hit in hits.items())
            for hits in best
        ]
        return [
            QValues(
                np.array([q for _, q in pairs], dtype=np.float32),
                np.array([number for number, _ in pairs], dtype=np.int64),
            )
            for pairs in known
        ]

    def chunk(self, number: int) -> Chunk:
        """See `Candidates`."""
        return self._seen[number].chunk

    def place(self, number: int) -> int:
        """See `Candidates`."""
        hit = self._seen[number]
        return _place(hit) if hit.row is None else hit.row

    def position(self, number: int, before: Sequence[int]) -> float:
        """See `Candidates`."""
        if self.n is None:
            return 0.0
        places = [_place(self._seen[other]) for other in before]
        return self._scheme.position(self.n, places, _place(self._seen[number]))

    def _found(
        self, states: NDArray[np.float32], retrieved: Sequence[Sequence[int]]
    ) -> list[dict[str, Hit]]:
        """Hits by the id of their chunk for each state: the best, and all of the last one's Q."""
        found: list[dict[str, Hit]] = [{} for _ in states]
        never = [
            self._left_out.union(self._seen[number].chunk.id for number in own) for own in retrieved
        ]
        asked = [
            (row, request)
            for row, (state, own) in enumerate(zip(states, retrieved, strict=True))
            for request in self._requests(state, own)
        ]
        while asked:
            answers = self._store.search([request for _, request in asked])
            for (row, _), hits in zip(asked, answers, strict=True):
                self._check_numbers(hits)
                new = (hit for hit in hits if hit.chunk.id not in never[row])
                found[row].update((hit.chunk.id, hit) for hit in new)
            least = [self._least(hits) for hits in found]
            asked = [
                (row, request._replace(limit=min(4 * request.limit, _most(request))))
                for (row, request), hits in zip(asked, answers, strict=True)
                if len(hits) == request.limit < _most(request) and self._q(hits[-1]) == least[row]
            ]
        return [
            {chunk_id: hit for chunk_id, hit in hits.items() if not self._q(hit) < q}  # nor NaN
            for hits, q in zip(found, least, strict=True)
        ]

    def _requests(self, state: NDArray[np.float32], retrieved: Sequence[int]) -> list[Request]:
        """One for all chunks, or one for each run of equal ρ with the state turned back by it.

        Each asks for one chunk more than is needed, which tells whether others equal the last.
        """
        needed = self._breadth + len(self._left_out) + len(retrieved)
        if self.n is None:
            return [Request(state, needed + 1, needed=needed)]
        runs = self._scheme.runs(self.n, [_place(self._seen[number]) for number in retrieved])
        turned = rotate(
            torch.from_numpy(state)[None], -torch.from_numpy(runs.first), self._config.rotary_base
        ).numpy()
        return [
            Request(vector, min(needed + 1, high - low), (low, high), needed)
            for vector, low, high in zip(
                turned, runs.bounds[:-1].tolist(), runs.bounds[1:].tolist(), strict=True
            )
        ]

    def _least(self, hits: dict[str, Hit]) -> np.float32:
        """Q of the last chunk needed."""
        q_values = np.sort([self._q(hit) for hit in hits.values()])
        return q_values[-self._breadth] if len(hits) >= self._breadth else np.float32(-np.inf)

    def _q(self, hit: Hit) -> np.float32:
        return np.float32(self._to_q(float(hit.score)))

    def _check_numbers(self, hits: Sequence[Hit]) -> None:
        """Chunks stay where they are while a search goes on.

        Raises:
            VectorStoreError: If one has another number than before.
        """
        for hit in hits if self.n is not None else ():
            before = self._number_of.get(hit.chunk.id)
            if before is not None and before != _place(hit):
                raise VectorStoreError(
                    f"{self._store.kind}: the chunk {hit.chunk.id!r} had the number {before} and "
                    f"has {hit.number} now; the store changed during the search: search again."
                )

    def _take_in(self, hits: dict[str, Hit]) -> None:
        """Number those that are new, in document order.

        Raises:
            VectorStoreError: If two chunks have the same number in the document.
        """
        new = [hit for chunk_id, hit in hits.items() if chunk_id not in self._number_of]
        for hit in sorted(new, key=lambda hit: hit.number or 0):
            number = len(self._seen) if self.n is None else _place(hit)
            other = self._seen.setdefault(number, hit)
            if other is not hit:
                raise VectorStoreError(
                    f"{self._store.kind}: the chunks {other.chunk.id!r} and {hit.chunk.id!r} have "
                    f"the same number {number}. Either each chunk of the document has to get a "
                    "number of its own, from 0 without gaps; or the store changed during the search"
                    ": search again."
                )
            self._number_of[hit.chunk.id] = number

    def _checked_count(self) -> int:
        """How many chunks there are, if their numbers are those from 0."""
        n = self._store.count()
        for low in (0, n // 2):  # numbers that are there twice leave gaps elsewhere
            inside = self._store.count((low, n)) if n else 0
            if inside != n - low:
                raise VectorStoreError(
                    f"{self._store.kind}: of the {n} chunks that may be seen, {inside} have a "
                    f"number from {low} to {n - 1} under {self._store.number_key!r}. Each must have"
                    " a number of its own, from 0 without gaps: number the chunks of each document "
                    "so, and filter for one document."
                )
        return n


def _most(request: Request) -> int:
    """How many chunks a request can ask for."""
    low, high = request.numbers or (0, _MOST)
    return min(high - low, _MOST)


def _place(hit: Hit) -> int:
    return -1 if hit.number is None else hit.number
