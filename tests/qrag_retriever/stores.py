"""Vector stores of real engines in local mode, filled the usual way with a corpus of 48 chunks.

What is not installed is skipped. The extras chroma, faiss, milvus, pgvector, qdrant, and pgserver
for a Postgres of its own, go into one environment; milvus-llama-index needs another.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document

from qrag_retriever import QRAGEmbedding, QRAGEmbeddings

TEXTS = [
    f"{who} {did} the {what}."
    for what in ("garden", "kitchen", "office", "hallway")
    for did in ("went to", "came from", "ran through")
    for who in ("Mary", "John", "Sandra", "Daniel")
]
IDS = [str(uuid.uuid5(uuid.NAMESPACE_URL, text)) for text in TEXTS]
# numbered as one document, and as two of 30 and 18 chunks
METADATAS: list[dict[str, Any]] = [
    {
        "tenant": "ab"[number % 2],
        "number": number,
        "book": "one" if number < 30 else "two",
        "place": number % 30,
    }
    for number in range(len(TEXTS))
]


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)  # Milvus Lite wants it to be there
    return str(folder)


_NAMES = (f"chunks{number}" for number in itertools.count())


def documents() -> list[Document]:
    return [
        Document(text, id=id_, metadata=dict(metadata))
        for text, id_, metadata in zip(TEXTS, IDS, METADATAS, strict=True)
    ]


def nodes() -> list[Any]:
    from llama_index.core.schema import TextNode

    return [
        TextNode(text=text, id_=id_, metadata=dict(m), excluded_embed_metadata_keys=list(m))
        for text, id_, m in zip(TEXTS, IDS, METADATAS, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Engine:
    """How to fill a store, filter it by equality, and take it away.

    ``fill(model, folder, items, metric)``: metric is "ip", "cosine" or "l2". Portable filters mean
    what they mean to a `ChunkIndex`.
    """

    fill: Callable[..., Any]
    where: Callable[..., Any]
    drop: Callable[[Any], None]
    metrics: tuple[str, ...] = ("cosine", "l2")
    portable: bool = True


def langchain_qdrant(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    store = pytest.importorskip("langchain_qdrant")
    from qdrant_client import QdrantClient, models

    distance = {"ip": "Dot", "cosine": "Cosine", "l2": "Euclid"}[metric]
    client, name = QdrantClient(path=str(folder / "qdrant")), next(_NAMES)
    settings = models.VectorParams(size=model.dimension, distance=models.Distance(distance))
    client.create_collection(name, settings)
    made = store.QdrantVectorStore(
        client, name, QRAGEmbeddings(model), distance=models.Distance(distance)
    )
    if items:
        made.add_documents(items, ids=[item.id for item in items])
    return made


def qdrant_filter(prefix: str) -> Callable[..., Any]:
    def where(**values: Any) -> Any:
        from qdrant_client import models

        return models.Filter(
            must=[
                models.FieldCondition(key=prefix + key, match=models.MatchValue(value=value))
                for key, value in values.items()
            ]
        )

    return where


def drop_qdrant(store: Any) -> None:
    store.client.delete_collection(store.collection_name)


def langchain_milvus(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    store = pytest.importorskip("langchain_milvus")
    pytest.importorskip("milvus_lite")
    made = store.Milvus(
        QRAGEmbeddings(model),
        collection_name=next(_NAMES),
        connection_args={"uri": _made(folder) + "/milvus.db"},
        index_params={"index_type": "FLAT", "metric_type": metric.upper()},
        auto_id=False,
    )
    if items:
        made.add_documents(items, ids=[item.id for item in items])
    return made


def expression(**values: Any) -> str:
    return " and ".join(f'{key} == "{value}"' for key, value in values.items())


def drop_milvus(store: Any) -> None:
    store.client.drop_collection(store.collection_name)


_POSTGRES: list[Any] = []


def langchain_postgres(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    langchain = pytest.importorskip("langchain_postgres")
    pgserver = pytest.importorskip("pgserver")
    from langchain_postgres.v2.indexes import DistanceStrategy

    if not _POSTGRES:  # one server for all tests: it takes seconds to start
        server = pgserver.get_server(tempfile.mkdtemp(prefix="postgres-"), cleanup_mode="delete")
        server.psql("CREATE EXTENSION IF NOT EXISTS vector")
        uri = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        _POSTGRES.extend([langchain.PGEngine.from_connection_string(uri), server])
    engine, name = _POSTGRES[0], next(_NAMES)
    engine.init_vectorstore_table(name, model.dimension)
    strategy = {"ip": "INNER_PRODUCT", "cosine": "COSINE_DISTANCE", "l2": "EUCLIDEAN"}[metric]
    made = langchain.PGVectorStore.create_sync(
        engine, QRAGEmbeddings(model), name, distance_strategy=DistanceStrategy[strategy]
    )
    if items:
        made.add_documents(items, ids=[item.id for item in items])
    return made


def mapping(**values: Any) -> dict[str, Any]:
    return values


def drop_postgres(store: Any) -> None:
    _POSTGRES[0].drop_table(store.get_table_name())


def langchain_chroma(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    store = pytest.importorskip("langchain_chroma")
    import chromadb

    made = store.Chroma(
        next(_NAMES),
        QRAGEmbeddings(model),
        client=chromadb.PersistentClient(str(folder / "chroma")),
        collection_configuration={"hnsw": {"space": metric}},
    )
    if items:
        made.add_documents(items, ids=[item.id for item in items])
    return made


def drop_chroma(store: Any) -> None:
    store.delete_collection()


def faiss_index(dimension: int, metric: str) -> Any:
    import faiss

    return faiss.IndexFlatIP(dimension) if metric == "ip" else faiss.IndexFlatL2(dimension)


def langchain_faiss(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    community = pytest.importorskip("langchain_community.vectorstores")
    from langchain_community.docstore.in_memory import InMemoryDocstore

    index = faiss_index(model.dimension, metric)
    made = community.FAISS(QRAGEmbeddings(model), index, InMemoryDocstore(), {})
    if items:
        made.add_documents(items, ids=[item.id for item in items])
    return made


def drop_faiss(store: Any) -> None:
    store.index_to_docstore_id.clear()


def in_llama_index(store: Any, model: Any, items: Any) -> Any:
    from llama_index.core import StorageContext, VectorStoreIndex

    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex(items, storage_context=context, embed_model=QRAGEmbedding(model))


def llama_qdrant(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    module = pytest.importorskip("llama_index.vector_stores.qdrant")
    from qdrant_client import QdrantClient, models

    distance = {"ip": "Dot", "cosine": "Cosine", "l2": "Euclid"}[metric]
    settings = models.VectorParams(size=model.dimension, distance=models.Distance(distance))
    client = QdrantClient(path=str(folder / "qdrant"))
    name = next(_NAMES)
    if not items:  # by another's hand, and without a name for its vectors
        client.create_collection(name, settings)
    made = module.QdrantVectorStore(name, client, dense_config=settings)
    in_llama_index(made, model, items)
    return made


def llama_milvus(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    module = pytest.importorskip("llama_index.vector_stores.milvus")
    made = module.MilvusVectorStore(
        _made(folder) + "/milvus.db",
        collection_name=next(_NAMES),
        dim=model.dimension,
        similarity_metric=metric.upper(),
        use_async_client=False,
    )
    in_llama_index(made, model, items)
    return made


def llama_faiss(model: Any, folder: Path, items: Any, metric: str = "ip") -> Any:
    module = pytest.importorskip("llama_index.vector_stores.faiss")
    store = module.FaissVectorStore(faiss_index(model.dimension, metric))
    return in_llama_index(store, model, items)


def drop_llama_faiss(index: Any) -> None:
    index.index_struct.nodes_dict.clear()


def metadata_filters(**values: Any) -> Any:
    from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

    return MetadataFilters(
        filters=[MetadataFilter(key=key, value=value) for key, value in values.items()]
    )


ENGINES = {
    "langchain-qdrant": Engine(
        langchain_qdrant, qdrant_filter("metadata."), drop_qdrant, portable=False
    ),
    "langchain-milvus": Engine(langchain_milvus, expression, drop_milvus, portable=False),
    "langchain-postgres": Engine(langchain_postgres, mapping, drop_postgres),
    "langchain-chroma": Engine(langchain_chroma, mapping, drop_chroma),
    "langchain-faiss": Engine(langchain_faiss, mapping, drop_faiss, ("l2",)),
    "llama-index-qdrant": Engine(llama_qdrant, metadata_filters, drop_qdrant),
    "llama-index-milvus": Engine(llama_milvus, metadata_filters, drop_milvus),
    "llama-index-faiss": Engine(llama_faiss, metadata_filters, drop_llama_faiss, ("l2",)),
}


def items_for(name: str) -> Any:
    return documents() if name.startswith("langchain") else nodes()
