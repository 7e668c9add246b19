"""LangChain's stores whose filters are mappings: PGVectorStore and Chroma."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import VectorStoreError
from qrag_retriever.vector_stores.filtered import FilteredStore
from qrag_retriever.vector_stores.store import Hit, Request


class _MappingStore(FilteredStore):
    """Documents filtered by mappings such as ``{"year": {"$gte": 2020}}``."""

    allowed = "a mapping"

    def __init__(self, store: Any, number_key: str | None) -> None:
        super().__init__(number_key)
        self._store = store

    @abstractmethod
    def _found(self, vector: list[float], limit: int, where: Any) -> Sequence[tuple[Any, float]]:
        """Documents with their scores."""

    def _translated(self, filter: Any) -> Sequence[Any]:
        if not isinstance(filter, Mapping):
            raise TypeError
        return [{key: value} for key, value in filter.items()] if _is_filled(filter) else []

    def _range(self, low: int, high: int) -> Sequence[Any]:
        return [{self.number_key: {"$gte": low}}, {self.number_key: {"$lt": high}}]

    def _joined(self, conditions: Sequence[Any]) -> Any:
        return conditions[0] if len(conditions) == 1 else {"$and": list(conditions)}

    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        return [
            [
                self.hit(self._chunk(document), score)
                for document, score in self._found(
                    request.vector.tolist(), request.limit, self._where(request.numbers)
                )
            ]
            for request in requests
        ]

    def _count(self, numbers: tuple[int, int] | None) -> int:
        return len(self._store.get(where=self._where(numbers), include=[])["ids"])

    def _chunk(self, document: Any) -> Chunk:
        if not document.id:
            raise VectorStoreError(
                f"{self.kind} returned a document without an id; what was retrieved could not be "
                "told from what was not."
            )
        return Chunk(document.id, document.page_content, dict(document.metadata))


def _is_filled(part: Any, *, joined: bool = False) -> bool:
    """Whether each part of a filter holds a condition; a list is a part where it joins others."""
    if isinstance(part, Mapping):
        return bool(part) and all(
            _is_filled(value, joined=str(key).lower() in ("$and", "$or", "$not"))
            for key, value in part.items()
        )
    if joined and isinstance(part, (list, tuple)):
        return bool(part) and all(map(_is_filled, part))
    return True


class LangChainPostgres(_MappingStore):
    """``langchain_postgres.PGVectorStore``."""

    kind = "Postgres"

    def _found(self, vector: list[float], limit: int, where: Any) -> Sequence[tuple[Any, float]]:
        found: list[tuple[Any, float]] = self._store.similarity_search_with_score_by_vector(
            vector, k=limit, filter=where, hybrid_search_config=None
        )
        return found


class LangChainChroma(_MappingStore):
    """``langchain_chroma.Chroma``."""

    kind = "Chroma"

    def _found(self, vector: list[float], limit: int, where: Any) -> Sequence[tuple[Any, float]]:
        found: list[tuple[Any, float]] = (
            self._store.similarity_search_by_vector_with_relevance_scores(
                vector, k=limit, filter=where
            )
        )
        return found
