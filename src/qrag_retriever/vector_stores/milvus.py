"""Milvus, as LangChain and as LlamaIndex fill it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import InvalidInputError, VectorStoreError
from qrag_retriever.vector_stores.filtered import FilteredStore
from qrag_retriever.vector_stores.llama_index import MetadataFiltered, chunk_of
from qrag_retriever.vector_stores.store import Hit, Request


class _Milvus(FilteredStore):
    """Entities of a collection, filtered by boolean expressions."""

    kind = "Milvus"

    def __init__(self, store: Any, number_key: str | None) -> None:
        super().__init__(number_key)
        if number_key is not None and not number_key.isidentifier():
            raise InvalidInputError(
                f"number_key={number_key!r} is not a field name of Milvus; use letters, digits and "
                "underscores."
            )
        self._store = store

    def _range(self, low: int, high: int) -> Sequence[Any]:
        return [f"{self.number_key} >= {low} and {self.number_key} < {high}"]

    def _joined(self, conditions: Sequence[Any]) -> Any:
        return " and ".join(f"({condition})" for condition in conditions)

    def _count(self, numbers: tuple[int, int] | None) -> int:
        rows = self._store.client.query(
            self._store.collection_name,
            filter=self._where(numbers) or "",
            output_fields=["count(*)"],
        )
        return int(rows[0]["count(*)"])


class LangChainMilvus(_Milvus):
    """``langchain_milvus.Milvus``, filtered by expressions such as ``'tenant == "a"'``."""

    allowed = "an expression (str)"

    def _translated(self, filter: Any) -> Sequence[Any]:
        if not isinstance(filter, str):
            raise TypeError
        return [_whole(filter)] if filter.strip() else []

    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        if self._store.col is None:  # the store would find nothing and say nothing
            raise VectorStoreError(f"Milvus has no collection {self._store.collection_name!r}.")
        return [
            [
                self.hit(self._chunk(document), score)
                for document, score in self._store.similarity_search_with_score_by_vector(
                    request.vector.tolist(), k=request.limit, expr=self._where(request.numbers)
                )
            ]
            for request in requests
        ]

    def _chunk(self, document: Any) -> Chunk:
        metadata = dict(document.metadata)
        key = metadata.pop(self._store._primary_field, None)  # noqa: SLF001 (no public way)
        if key is None:
            raise VectorStoreError(
                "Milvus returned a chunk without its primary key; make the store without "
                "metadata_field."
            )
        return Chunk(str(key), document.page_content, metadata)


class LlamaIndexMilvus(MetadataFiltered, _Milvus):
    """``llama_index.vector_stores.milvus.MilvusVectorStore``, filtered by ``MetadataFilters``."""

    def _native(self, query: Any) -> Sequence[Any]:
        _refuse_mistranslated(query.filters)
        expression, _ = self._store._prepare_before_search(query)  # noqa: SLF001 (no public way)
        return [_whole(expression)] if expression.strip() else []

    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        from llama_index.core.vector_stores.types import VectorStoreQuery

        found = []
        for request in requests:
            query = VectorStoreQuery(
                query_embedding=request.vector.tolist(), similarity_top_k=request.limit
            )
            result = self._store.query(query, string_expr=self._where(request.numbers) or "")
            found.append(
                [
                    self.hit(chunk_of(node, key), score)
                    for node, key, score in zip(
                        result.nodes, result.ids, result.similarities, strict=True
                    )
                ]
            )
        return found


def _refuse_mistranslated(filters: Any) -> None:
    """Refuse what the LlamaIndex store would turn into another condition.

    Raises:
        InvalidInputError: If there is a NOT, which it leaves out, or a ``text_match``, of which it
            makes "begins with".
    """
    from llama_index.core.vector_stores.types import (
        FilterCondition,
        FilterOperator,
        MetadataFilters,
    )

    if filters.condition == FilterCondition.NOT:
        raise InvalidInputError(
            "LlamaIndex's Milvus store leaves out the condition NOT; write it with the operators "
            "!= and nin."
        )
    for part in filters.filters:
        if isinstance(part, MetadataFilters):
            _refuse_mistranslated(part)
        elif part.operator == FilterOperator.TEXT_MATCH:
            raise InvalidInputError(
                "LlamaIndex's Milvus store turns text_match into 'begins with'; filter by ==, in "
                "or a range."
            )


_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|['"()]""", re.DOTALL)


def _whole(expression: str) -> str:
    """An expression, unless it would close the brackets that are put around it.

    Raises:
        InvalidInputError: If its brackets or quotes do not match.
    """
    depth = 0
    for token in _TOKEN.findall(expression):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth < 0 or token in ("'", '"'):
            break
    else:
        if depth == 0:
            return expression
    raise InvalidInputError(
        f"The brackets or quotes of the filter {expression!r} do not match; give one whole "
        "expression."
    )
