"""Which stores are supported, and why others are not."""

from __future__ import annotations

import importlib
from typing import Any

from qrag_retriever.errors import VectorStoreError
from qrag_retriever.vector_stores.store import Store

# by the package and the name of their class: looking at a store imports no framework
_SUPPORTED = {
    ("langchain_qdrant", "QdrantVectorStore"): ("qdrant", "LangChainQdrant"),
    ("langchain_milvus", "Milvus"): ("milvus", "LangChainMilvus"),
    ("langchain_postgres", "PGVectorStore"): ("mapping", "LangChainPostgres"),
    ("langchain_chroma", "Chroma"): ("mapping", "LangChainChroma"),
    ("langchain_community", "FAISS"): ("faiss", "LangChainFaiss"),
    ("llama_index", "QdrantVectorStore"): ("qdrant", "LlamaIndexQdrant"),
    ("llama_index", "MilvusVectorStore"): ("milvus", "LlamaIndexMilvus"),
    ("llama_index", "FaissVectorStore"): ("faiss", "LlamaIndexFaiss"),
}
_REFUSED = {
    ("langchain_core", "InMemoryVectorStore"): "it computes the cosine and nothing else",
    ("llama_index", "SimpleVectorStore"): "it computes the cosine and nothing else",
    ("llama_index", "PGVectorStore"): "it computes the cosine and nothing else",
    ("llama_index", "FaissMapVectorStore"): (
        "a VectorStoreIndex does not know which of its nodes belongs to which row; use a "
        "FaissVectorStore"
    ),
    ("llama_index", "LanceDBVectorStore"): "it returns exp(-distance), not inner products",
    ("llama_index", "ElasticsearchStore"): "it rescales the scores of every result",
    (
        "langchain_postgres",
        "AsyncPGVectorStore",
    ): "it has no synchronous methods; use PGVectorStore",
}


def open_store(store: Any, number_key: str | None) -> Store:
    """What a search needs of a store.

    Args:
        store: LangChain's ``QdrantVectorStore``, ``Milvus``, ``PGVectorStore``, ``Chroma`` or
            ``FAISS``; LlamaIndex's ``QdrantVectorStore`` or ``MilvusVectorStore``; or a
            ``VectorStoreIndex`` over one of these or over a ``FaissVectorStore``.
        number_key: See `StoreCorpus`.

    Raises:
        VectorStoreError: If it is of a kind that cannot serve.
    """
    index = store if ("llama_index", "VectorStoreIndex") in _names(store) else None
    store = store if index is None else index.vector_store
    # the nearest class decides: one that is refused may be derived from one that is supported
    known = [name for name in _names(store) if name in _SUPPORTED or name in _REFUSED]
    if known and known[0] in _SUPPORTED:
        module, adapter = _SUPPORTED[known[0]]
        kind = getattr(importlib.import_module(f"{__package__}.{module}"), adapter)
        outer = index is not None and kind.takes_index
        opened: Store = kind(index if outer else store, number_key)
        return opened
    reason = _REFUSED[known[0]] if known else "it is not known here"
    supported = ", ".join(sorted({f"{name} ({package})" for package, name in _SUPPORTED}))
    raise VectorStoreError(
        f"A {type(store).__name__} cannot serve multi-step retrieval: {reason}. Supported: "
        f"{supported}. As a second stage any retriever can serve: from_retriever."
    )


def _names(store: Any) -> list[tuple[str, str]]:
    return [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(store).__mro__]
