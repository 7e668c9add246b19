"""A vector store in place of a `ChunkIndex`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qrag_retriever.corpus import Corpus
from qrag_retriever.errors import ConfigError, InvalidInputError, VectorStoreError
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
        if options.temperature is not None:
            raise InvalidInputError(
                f"temperature={options.temperature} needs Q of every chunk, and a vector store "
                "tells of the best alone. Leave it out, or use a ChunkIndex."
            )
        own = _StoreCandidates(
            self._store.narrowed(filter), model, options, exclude_ids, self._to_q
        )
        return [own] * len(queries)

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


class _StoreCandidates:
    """The chunks of a store, numbered in the order in which they are seen."""

    rows = None
    excluded = ()
    complete = False

    def __init__(
        self,
        store: Store,
        model: QRAGModel,
        options: SearchOptions,
        exclude_ids: Collection[str],
        to_q: Callable[[float], float],
    ) -> None:
        self._store = store
        self._config = model.config
        self._scheme = model.config.position_scheme
        self._left_out = frozenset(exclude_ids)
        self._limit = options.breadth + len(self._left_out)
        self._to_q = to_q
        self._seen: list[Hit] = []
        self._number_of: dict[str, int] = {}
        self.n = None if self._scheme.mode == "none" else self._checked_count()

    def score(
        self, states: NDArray[np.float32], retrieved: Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """Q of the best chunks of each state, ``-inf`` for all others seen so far."""
        requests, owner = [], []
        for row, (state, found) in enumerate(zip(states, retrieved, strict=True)):
            own = self._requests(state, found)
            requests += own
            owner += [row] * len(own)
        best: list[dict[str, float]] = [{} for _ in states]
        new: dict[str, Hit] = {}
        for row, hits in zip(owner, self._store.search(requests), strict=True):
            for hit in hits:
                if hit.chunk.id not in self._left_out:
                    best[row][hit.chunk.id] = self._to_q(hit.score)
                    if hit.chunk.id not in self._number_of:
                        new[hit.chunk.id] = hit
        self._take_in(new)
        q_values = np.full((len(states), len(self._seen)), -np.inf, dtype=np.float32)
        for row, q_of in enumerate(best):
            for chunk_id, q in q_of.items():
                q_values[row, self._number_of[chunk_id]] = q
        return q_values

    def chunk(self, number: int) -> Chunk:
        """See `Candidates`."""
        return self._seen[number].chunk

    def place(self, number: int) -> int:
        """See `Candidates`."""
        place = self._seen[number].number
        return -1 if place is None else place

    def position(self, number: int, before: Sequence[int]) -> float:
        """See `Candidates`."""
        if self.n is None:
            return 0.0
        places = [self.place(other) for other in before]
        return self._scheme.position(self.n, places, self.place(number))

    def _requests(self, state: NDArray[np.float32], retrieved: Sequence[int]) -> list[Request]:
        """One for all chunks, or one for each run of equal ρ with the state turned back by it."""
        limit = self._limit + len(retrieved)
        if self.n is None:
            return [Request(state, limit)]
        runs = self._scheme.runs(self.n, [self.place(number) for number in retrieved])
        turned = rotate(
            torch.from_numpy(state)[None], -torch.from_numpy(runs.first), self._config.rotary_base
        ).numpy()
        return [
            Request(vector, min(limit, high - low), (low, high))
            for vector, low, high in zip(
                turned, runs.bounds[:-1].tolist(), runs.bounds[1:].tolist(), strict=True
            )
        ]

    def _take_in(self, new: dict[str, Hit]) -> None:
        """Number chunks seen together in document order: of equal Q the lower number wins."""
        for hit in sorted(new.values(), key=lambda hit: hit.number or 0):
            self._number_of[hit.chunk.id] = len(self._seen)
            self._seen.append(hit)

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
