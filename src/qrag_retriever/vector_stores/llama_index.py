"""What LlamaIndex's vector stores have in common: nodes, and ``MetadataFilters``."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qrag_retriever.chunk import Chunk, to_chunks
from qrag_retriever.errors import VectorStoreError
from qrag_retriever.filters import compile_filter
from qrag_retriever.vector_stores.filtered import FilteredStore

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode


class MetadataFiltered(FilteredStore):
    """A store whose filters are ``MetadataFilters``.

    LlamaIndex's translations leave out some of what they do not understand, so every hit is checked
    against the filter once more.
    """

    allowed = "LlamaIndex MetadataFilters"

    @abstractmethod
    def _native(self, query: Any) -> Sequence[Any]:
        """Conditions in the store's own language for the filters of a ``VectorStoreQuery``."""

    def _translated(self, filter: Any) -> Sequence[Any]:
        from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery

        if not isinstance(filter, MetadataFilters):
            raise TypeError
        return self._native(VectorStoreQuery(filters=filter))

    def _guard(self, filter: Any) -> Callable[[Chunk], bool]:
        passes = compile_filter(filter)
        return lambda chunk: passes(
            dataclasses.replace(chunk, metadata={**chunk.metadata, **_of_document(chunk.source)})
        )


def _of_document(node: BaseNode) -> dict[str, str]:
    """What LlamaIndex writes beside the metadata of a node, so that one can filter for it."""
    return dict.fromkeys(("document_id", "doc_id", "ref_doc_id"), node.ref_doc_id or "None")


def chunk_of(node: BaseNode, key: object = None) -> Chunk:
    """The chunk for a node that a store returned.

    Args:
        node: The node.
        key: What the store knows it by, where LlamaIndex may make up the node's own id: another
            one in each search; ``None``: that id.

    Raises:
        VectorStoreError: If the node has no text.
    """
    [chunk] = to_chunks([node], ids=None if key is None else [str(key)])
    if not chunk.embed_text:  # a picture may have metadata alone
        raise VectorStoreError(
            f"The store returned node {chunk.id!r} without a text; it has to keep the texts "
            "(stores_text)."
        )
    return chunk
