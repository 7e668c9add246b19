"""Multi-step selection among what another retriever finds."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qrag_retriever.candidates import SnapshotCandidates
from qrag_retriever.chunk import Candidate, to_chunks
from qrag_retriever.chunk_store import MemoryChunks
from qrag_retriever.collector import in_thread
from qrag_retriever.corpus import Corpus
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_retriever.fingerprint import present
from qrag_retriever.locks import Lock
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.search import SearchOptions
from qrag_retriever.snapshot import Snapshot
from qrag_retriever.state import check_query
from qrag_retriever.vectors import StoredVectors, checked_vectors

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from qrag_retriever.candidates import Candidates
    from qrag_retriever.config import QRAGConfig
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.trajectory import Trajectory


class EmbeddingCache:
    """Action embeddings by the text they were made from; the least recently used ones go first.

    May be used from several threads.

    Args:
        model: Embeds the texts.
        size: Most embeddings kept, 4·d bytes each.
    """

    def __init__(self, model: QRAGModel, size: int = 10_000) -> None:
        self.model = model
        self.size = size
        self._made_by = present(model)
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = Lock()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of texts, float32 ``[n, d]``; those that are not kept come from the model.

        Raises:
            InvalidInputError: If the model returns something other than finite vectors.
        """
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        now = present(self.model)
        with self._lock:
            if now != self._made_by:  # the model was changed in the meantime
                self._made_by = now
                self._kept.clear()
            known = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            vectors = checked_vectors(
                self.model.encode_actions(list(new.values())),
                (len(new), self.model.dimension),
                "the model's embeddings",
            )
            known.update(zip(new, vectors, strict=True))
        with self._lock:
            if now == self._made_by:
                for key in keys:
                    # a row of its own, which does not keep the batch it came from
                    self._kept[key] = known[key].copy() if key in new else known[key]
                    self._kept.move_to_end(key)
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        vectors = np.array([known[key] for key in keys], dtype=np.float32)
        return vectors.reshape(len(texts), self.model.dimension)

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingCache, (self.model, self.size)


class SecondStage(Corpus):
    """What another retriever finds for a query, as the corpus of that query.

    Args:
        base: A LangChain or LlamaIndex retriever, or anything else that has ``invoke`` or
            ``retrieve`` and returns Documents, nodes or texts; ``None``: `having` is always used.
        model: Embeds what it finds; needs ``positions="none"`` and ``state_order="retrieval"``,
            as the order of what another retriever finds is not that of a document.
        candidates: How many to ask for, where the base retriever can be told (``k``,
            ``search_kwargs``, ``similarity_top_k``); of more, the first so many are considered.
        cache_size: Most embeddings kept.

    Raises:
        ConfigError: If the model needs to know the document's order.
        InvalidInputError: If ``base`` is no retriever, or a number is not positive.
    """

    def __init__(
        self, base: Any, model: QRAGModel, *, candidates: int = 100, cache_size: int = 10_000
    ) -> None:
        _check_order(model.config)
        for name, value in (("candidates", candidates), ("cache_size", cache_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(f"{name}={value!r}; give an integer of at least 1.")
        if isinstance(base, type):
            raise InvalidInputError(f"{base.__name__} is a class; give one of its retrievers.")
        if base is not None and not (hasattr(base, "invoke") or hasattr(base, "retrieve")):
            raise InvalidInputError(
                f"A {type(base).__name__} is no retriever: it has neither invoke (LangChain) nor "
                "retrieve (LlamaIndex)."
            )
        self.model = model
        self.fingerprint = model.fingerprint
        self.limit = candidates
        self._base = _asking_for(base, candidates)
        self._cache = EmbeddingCache(model, cache_size)
        self.found: Mapping[str, Sequence[Any]] = {}

    def is_of(self, model: QRAGModel) -> bool:
        """See `Corpus`; nothing is kept that a model made before it changed."""
        return model is self.model or super().is_of(model)

    def having(self, found: Mapping[str, Sequence[Any]]) -> SecondStage:
        """The same over what has been found already, by query."""
        twin = copy.copy(self)
        twin.found = found
        return twin

    async def fetched(self, queries: Iterable[str]) -> SecondStage:
        """The same with what the base retriever finds asynchronously, for all queries at a time."""
        asked = list(dict.fromkeys(queries))
        found = await asyncio.gather(*map(self.fetch, asked))
        return self.having(dict(zip(asked, found, strict=True)))

    async def fetch(self, query: str) -> list[Any]:
        """What the base retriever finds for one query asynchronously.

        Raises:
            InvalidInputError: If it returns no list of items.
        """
        for name in ("ainvoke", "aretrieve"):
            if hasattr(self._base, name):
                return self._first(await getattr(self._base, name)(query))
        return await in_thread(self._ask, query)

    def asked(self, configs: Mapping[str, Any]) -> SecondStage:
        """The same with what the base retriever finds; LangChain's are asked for all at once.

        Args:
            configs: The queries, each with the configuration for a LangChain retriever or ``None``.

        Raises:
            InvalidInputError: If the base retriever returns no list of items.
        """
        queries, own = list(configs), list(configs.values())
        is_runnable = hasattr(self._base, "with_config")
        if len(queries) > 1 and hasattr(self._base, "batch"):
            settings = (own,) if is_runnable and None not in own else ()
            found = map(self._first, self._base.batch(queries, *settings))
        else:
            found = map(self._ask, queries, own if is_runnable else [None] * len(own))
        return self.having(dict(zip(queries, found, strict=True)))

    def _ask(self, query: str, config: Any = None) -> list[Any]:
        ask = self._base.invoke if hasattr(self._base, "invoke") else self._base.retrieve
        return self._first(ask(query) if config is None else ask(query, config))

    def _first(self, found: Any) -> list[Any]:
        """The items that are considered of what the base retriever returns."""
        if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
            raise InvalidInputError(
                f"{type(self._base).__name__} returned a {type(found).__name__}, no list of "
                "Documents, nodes or texts; give a retriever, or a runnable from a query to these."
            )
        return list(itertools.islice(found, self.limit))

    def candidates(
        self,
        queries: Sequence[str],
        model: QRAGModel,
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
    ) -> Sequence[Candidates]:
        """See `Corpus`; a filter and ``exclude_ids`` act on what the base retriever returns.

        Raises:
            InvalidInputError: If it returns something else than Documents, nodes and texts, or the
                filter is malformed.
            ConfigError: If the model needs to know the document's order.
        """
        _check_order(model.config)
        missing = [query for query in queries if query not in self.found]
        everything = {**self.found, **self.asked(dict.fromkeys(missing)).found}
        found = [self._chunks(everything[query]) for query in queries]
        vectors = self._cache.embed([chunk.embed_text for chunks in found for chunk in chunks])
        result, start = [], 0
        for chunks in found:
            own = vectors[start : start + len(chunks)]
            start += len(chunks)
            snapshot = Snapshot(MemoryChunks(chunks), StoredVectors(own), 0)
            here = [id_ for id_ in exclude_ids if snapshot.chunks.find(id_) is not None]
            result.append(
                SnapshotCandidates(snapshot, model, options, filter=filter, exclude_ids=here)
            )
        return result

    def _chunks(self, found: Sequence[Any]) -> list[Candidate]:
        """The candidates among what was found; of several with one id, or equal ones, the first."""
        items: dict[Any, Any] = {}
        for item in found:
            bare = item.node if hasattr(item, "node") and hasattr(item, "score") else item
            own_id = getattr(bare, "node_id", None) or getattr(bare, "id", None)
            items.setdefault(own_id or repr(bare), bare)
        return [
            Candidate(chunk.id, chunk.text, chunk.metadata, chunk.embed_text, item)
            for chunk, item in zip(to_chunks(items.values()), items.values(), strict=True)
        ]

    def __repr__(self) -> str:
        return f"SecondStage({type(self._base).__name__}, candidates={self.limit})"

    def __deepcopy__(self, memo: dict[int, Any]) -> SecondStage:
        return self


class Selector:
    """Selects among given Documents, nodes or texts in several steps.

    Args:
        model: See `SecondStage`; or folder or hub name of one, or of any embedder to use untrained;
            ``None``: multihop-en.
        **settings: ``k`` (by default what the model was trained for) and ``q_threshold`` (by
            default the model's).

    Raises:
        ConfigError: If the model needs to know the document's order.
        InvalidInputError: If a setting is unknown or out of range.
        ModelFormatError: If the model cannot be loaded.
    """

    def __init__(self, model: QRAGModel | str | Path | None = None, **settings: Any) -> None:
        self.model = resolve_model(model)
        config = self.model.config
        known = {"k": config.max_steps, "q_threshold": config.q_threshold}
        if unknown := sorted(set(settings) - set(known)):
            raise InvalidInputError(
                f"Unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(known)}."
            )
        self.options = SearchOptions(**{**known, **settings})
        self._stage = SecondStage(None, self.model)

    def select(self, query: str, items: Sequence[Any]) -> Trajectory:
        """What is selected, in order; each chunk's ``source`` is the item (or its node) itself.

        Raises:
            InvalidInputError: If the query is empty, or an item is of another type.
        """
        check_query(query)
        engine = MultiStepRetriever(self.model, self._stage.having({query: items}))
        return engine.search(query, self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Selector:
        return self


def _check_order(config: QRAGConfig) -> None:
    if config.positions != "none" or config.state_order != "retrieval":
        raise ConfigError(
            f"A second stage cannot serve a model with positions={config.positions!r} and "
            f"state_order={config.state_order!r}: the order of what another retriever finds is "
            "not that of a document. Use a model with positions='none' and "
            "state_order='retrieval', or a ChunkIndex over the documents themselves."
        )


def _asking_for(base: Any, candidates: int) -> Any:
    """A copy of a retriever that returns so many, where it is of a kind that can be told."""
    fields = getattr(type(base), "model_fields", {})
    own: dict[str, Any] = {"k": candidates} if "k" in fields else {}
    if "search_kwargs" in fields:
        given = {**base.search_kwargs, "k": candidates}
        if getattr(base, "search_type", None) == "mmr":  # it chooses k of so many
            given["fetch_k"] = max(candidates, given.get("fetch_k", 0))
        own["search_kwargs"] = given
    if own:
        return base.model_copy(update=own)
    if "bound" in fields:  # a LangChain runnable with a configuration
        return base.model_copy(update={"bound": _asking_for(base.bound, candidates)})
    if hasattr(type(base), "similarity_top_k") or "similarity_top_k" in getattr(
        base, "__dict__", ()
    ):
        base = copy.copy(base)
        with contextlib.suppress(AttributeError):  # one that can only be read
            base.similarity_top_k = candidates
    return base
