"""Qdrant, as LangChain and as LlamaIndex fill it."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import VectorStoreError
from qrag_retriever.vector_stores.filtered import FilteredStore
from qrag_retriever.vector_stores.llama_index import MetadataFiltered, chunk_of
from qrag_retriever.vector_stores.store import Hit, Request


class _Qdrant(FilteredStore):
    """Points of a collection; all requests of a step travel as one."""

    kind = "Qdrant"

    def __init__(self, store: Any, number_key: str | None, path: str) -> None:
        super().__init__(number_key)
        self._store = store
        self._path = path

    @property
    @abstractmethod
    def _vector(self) -> str | None: ...

    @abstractmethod
    def _chunk(self, point: Any) -> Chunk: ...

    def _range(self, low: int, high: int) -> Sequence[Any]:
        from qdrant_client import models

        key = f"{self._path}{self.number_key}"
        return [models.FieldCondition(key=key, range=models.Range(gte=low, lt=high))]

    def _joined(self, conditions: Sequence[Any]) -> Any:
        from qdrant_client import models

        return models.Filter(must=list(conditions))

    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        from qdrant_client import models

        responses = self._store.client.query_batch_points(
            self._store.collection_name,
            [
                models.QueryRequest(
                    query=request.vector.tolist(),
                    using=self._vector,
                    filter=self._where(request.numbers),
                    limit=request.limit,
                    with_payload=True,
                )
                for request in requests
            ],
        )
        return [
            [self.hit(self._chunk(point), point.score) for point in response.points]
            for response in responses
        ]

    def _count(self, numbers: tuple[int, int] | None) -> int:
        where = self._where(numbers)
        counted = self._store.client.count(self._store.collection_name, where, exact=True)
        return int(counted.count)


class LangChainQdrant(_Qdrant):
    """``langchain_qdrant.QdrantVectorStore``, filtered by ``qdrant_client.models.Filter``."""

    allowed = "a qdrant_client.models.Filter"

    def __init__(self, store: Any, number_key: str | None) -> None:
        super().__init__(store, number_key, f"{store.metadata_payload_key}.")

    @property
    def _vector(self) -> str | None:
        name: str = self._store.vector_name
        return name

    def _translated(self, filter: Any) -> Sequence[Any]:
        from qdrant_client import models

        if not isinstance(filter, models.Filter):
            raise TypeError
        return [filter] if _is_filled(filter) else []

    def _chunk(self, point: Any) -> Chunk:
        text = (point.payload or {}).get(self._store.content_payload_key)
        if not isinstance(text, str):
            raise VectorStoreError(
                f"Qdrant returned point {point.id!r} without a text under "
                f"{self._store.content_payload_key!r}; fill the collection with LangChain, or set "
                "the store's content_payload_key."
            )
        return Chunk(str(point.id), text, point.payload.get(self._store.metadata_payload_key) or {})


def _is_filled(condition: Any) -> bool:
    """Whether each filter and range within a condition holds a condition."""
    from qdrant_client import models

    if isinstance(condition, models.NestedCondition):
        return _is_filled(condition.nested.filter)
    if isinstance(condition, models.FieldCondition):
        if all(value is None for name, value in condition if name != "key"):
            return False
        bounds = [own for own in (condition.range, condition.values_count) if own is not None]
        return all(any(value is not None for _, value in own) for own in bounds)
    if not isinstance(condition, models.Filter):
        return True
    clauses = [condition.must, condition.must_not, condition.should]
    if condition.min_should is not None and condition.min_should.min_count > 0:
        clauses.append(condition.min_should.conditions)
    parts: list[Any] = []
    for clause in clauses:
        parts += clause if isinstance(clause, list) else [clause] if clause else []
    return bool(parts) and all(map(_is_filled, parts))


class LlamaIndexQdrant(MetadataFiltered, _Qdrant):
    """``llama_index.vector_stores.qdrant.QdrantVectorStore``, filtered by ``MetadataFilters``."""

    def __init__(self, store: Any, number_key: str | None) -> None:
        super().__init__(store, number_key, "")

    @functools.cached_property
    def _vector(self) -> str | None:
        # LlamaIndex itself looks whether vectors have names, but only when it adds or asks
        found = self._store.client.get_collection(self._store.collection_name)
        named = isinstance(found.config.params.vectors, dict)
        return self._store.dense_vector_name if named else None

    def _native(self, query: Any) -> Sequence[Any]:
        condition = self._store._build_query_filter(query)  # noqa: SLF001 (no public way)
        return [] if condition is None else [condition]

    def _chunk(self, point: Any) -> Chunk:
        return chunk_of(self._store.parse_to_query_result([point]).nodes[0])
