"""The ways to make a retriever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Self

from qrag_retriever.ann import AnnKind
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.second_stage import SecondStage
from qrag_retriever.vectors import StorageType

ALIASES = {"similarity_top_k": "k", "filters": "filter", "embed_model": "model"}


def resolve_aliases(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the other framework's names by ours (``similarity_top_k`` is ``k``).

    Raises:
        InvalidInputError: If both names are given with different values, or ``embedding``, which
            LangChain's stores have and a retriever does not.
    """
    result = dict(settings)
    if "embedding" in result:
        raise InvalidInputError(
            "A retriever has no embedding=; give the embedder as model=, by its folder or name."
        )
    for alias, name in ALIASES.items():
        if alias in result:
            value = result.pop(alias)
            if value is None:
                continue
            if result.get(name) is not None and result[name] != value:
                raise InvalidInputError(
                    f"{alias}={value!r} and {name}={result[name]!r} are one setting under two "
                    "names; give one of them."
                )
            result[name] = value
    return result


class Constructors:
    """Makes retrievers; for a class that takes ``index`` and settings."""

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        metadatas: Iterable[Mapping[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        model: QRAGModel | str | Path | None = None,
        dtype: StorageType = "float32",
        ann: AnnKind = "none",
        show_progress: bool = False,
        devices: Sequence[str] | None = None,
        checkpoint: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """A retriever over texts, in document order.

        Args:
            texts: The chunks.
            metadatas: One mapping a chunk, what filters look at.
            ids: One id a chunk; left out, they are made from the texts.
            model: A `QRAGModel`, or folder or hub name of one, or of any embedder to use untrained;
                ``None``: multihop-en.
            dtype: How the index stores embeddings: ``"float32"``, ``"bfloat16"``, ``"float16"`` or
                ``"int8"``.
            ann: Approximate search for ``positions="none"``: ``"hnsw"`` or ``"ivfpq"``.
            show_progress: Show a progress bar while the chunks are embedded.
            devices: Devices that share the embedding, such as ``["cuda:0", "cuda:1"]``.
            checkpoint: Folder from which an interrupted call goes on, see `Embedding`.
            **settings: Settings of the retriever, such as ``k``.

        Raises:
            InvalidInputError: If there is no text, or ids and metadatas do not match.
            ModelFormatError: If the model cannot be loaded.
        """
        settings = resolve_aliases({"model": model, **settings})
        model = resolve_model(settings.pop("model"))
        # what is wrong with the settings is said before anything is embedded
        cls(index=ChunkIndex(model, ann=ann, dtype=dtype), **settings)  # type: ignore[call-arg]
        index = ChunkIndex.from_texts(
            texts,
            metadatas,
            ids,
            model=model,
            dtype=dtype,
            ann=ann,
            show_progress=show_progress,
            devices=devices,
            checkpoint=checkpoint,
        )
        return cls(index=index, **settings)  # type: ignore[call-arg]

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Any],
        *,
        model: QRAGModel | str | Path | None = None,
        dtype: StorageType = "float32",
        ann: AnnKind = "none",
        show_progress: bool = False,
        devices: Sequence[str] | None = None,
        checkpoint: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """A retriever over LangChain Documents, LlamaIndex nodes, texts or chunks, also mixed.

        Arguments and errors as `from_texts`.
        """
        settings = resolve_aliases({"model": model, **settings})
        model = resolve_model(settings.pop("model"))
        # what is wrong with the settings is said before anything is embedded
        cls(index=ChunkIndex(model, ann=ann, dtype=dtype), **settings)  # type: ignore[call-arg]
        index = ChunkIndex.from_documents(
            documents,
            model=model,
            dtype=dtype,
            ann=ann,
            show_progress=show_progress,
            devices=devices,
            checkpoint=checkpoint,
        )
        return cls(index=index, **settings)  # type: ignore[call-arg]

    @classmethod
    def from_retriever(
        cls,
        base: Any,
        *,
        model: QRAGModel | str | Path | None = None,
        candidates: int = 100,
        cache_size: int = 10_000,
        **settings: Any,
    ) -> Self:
        """A second stage: multi-step selection among what another retriever finds.

        Documents and nodes come out as the other retriever returned them. A filter and
        ``exclude_ids`` act on what it returns.

        Args:
            base: A LangChain or LlamaIndex retriever, or any LangChain runnable from a query to
                Documents. A retriever that can only be asked asynchronously serves the
                asynchronous methods.
            model: See `from_texts`; needs ``positions="none"`` and ``state_order="retrieval"``.
            candidates: How many to ask ``base`` for, where it can be told (``k``,
                ``search_kwargs``, ``similarity_top_k``); of more, the first so many are considered.
            cache_size: Embeddings of so many texts are kept; the least recently used go first.
            **settings: Settings of the retriever, such as ``k``.

        Raises:
            ConfigError: If the model needs to know the order of the document.
            InvalidInputError: If ``base`` is no retriever or a setting is out of range.
            ModelFormatError: If the model cannot be loaded.
        """
        if base is None:
            raise InvalidInputError("Give a LangChain or LlamaIndex retriever; got None.")
        settings = resolve_aliases({"model": model, **settings})
        stage = SecondStage(
            base,
            resolve_model(settings.pop("model")),
            candidates=candidates,
            cache_size=cache_size,
        )
        return cls(index=stage, **settings)  # type: ignore[call-arg]

    @classmethod
    def from_vector_store(
        cls,
        store: Any,
        *,
        model: QRAGModel | str | Path | None = None,
        filter: Any = None,
        number_key: str | None = None,
        **settings: Any,
    ) -> Self:
        """A retriever over a vector store filled with this model's embeddings.

        Fill it the usual way, with `QRAGEmbeddings` (LangChain) or `QRAGEmbedding` (LlamaIndex) and
        the inner product as its metric. A few of its chunks are embedded again to see that it was.

        Args:
            store: LangChain's ``QdrantVectorStore``, ``Milvus``, ``PGVectorStore``, ``Chroma`` or
                ``FAISS``; LlamaIndex's ``QdrantVectorStore`` or ``MilvusVectorStore``, or a
                ``VectorStoreIndex`` over one of them or over a ``FaissVectorStore``.
            model: See `from_texts`. With ``positions="relative"`` it needs
                ``truncate_positions=True``.
            filter: A filter in the store's own language (LlamaIndex: ``MetadataFilters``; FAISS: as
                for a `ChunkIndex`) that every search obeys; the filter of a call comes on top.
            number_key: Key of the metadata under which each chunk's number in its document stands,
                from 0 without gaps. Needed where the model looks at the order of the document.
            **settings: Settings of the retriever, such as ``k``.

        Raises:
            VectorStoreError: If the store fails, is of a kind that cannot serve, or its metric is
                not the inner product.
            FingerprintMismatchError: If another model filled it.
            ConfigError: If the model's positions cannot be served, or ``number_key`` is missing.
            InvalidInputError: If the store is empty or the filter cannot be used.
            ModelFormatError: If the model cannot be loaded.
        """
        from qrag_retriever.vector_stores.corpus import StoreCorpus

        settings = resolve_aliases({"model": model, "filter": filter, **settings})
        corpus = StoreCorpus(
            store,
            resolve_model(settings.pop("model")),
            filter=settings.pop("filter"),
            number_key=number_key,
        )
        return cls(index=corpus, **settings)  # type: ignore[call-arg]
