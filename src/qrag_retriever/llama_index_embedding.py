"""A model as a LlamaIndex embedding, to fill a vector store the usual way."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import Field, PrivateAttr, SerializerFunctionWrapHandler, model_serializer

from qrag_retriever.collector import in_thread
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.fingerprint import is_of
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import name_of, resolve_model


class QRAGEmbedding(BaseEmbedding):
    """Embeds nodes with the action encoder and queries as states without chunks.

    The inner product of the two is Q of the first step, so a plain similarity search of a store
    filled with it finds what a search by `QRAGRetriever` finds first. The store's metric must be
    the inner product. The asynchronous methods run in threads.

    Args:
        model: A `QRAGModel`, or folder or hub name of one, or of any embedder to use untrained;
            ``None``: multihop-en.
        **settings: Settings of LlamaIndex's ``BaseEmbedding``, such as ``embed_batch_size``.

    Raises:
        ModelFormatError: If the model cannot be loaded.
        InvalidInputError: If LlamaIndex's ``embeddings_cache`` is given.

    Attributes:
        model: The model.
        fingerprint: Of its action encoder, so that LlamaIndex's caches tell models apart.

    Example:
        .. code-block:: python

            embedding = QRAGEmbedding("folder")
            index = VectorStoreIndex(nodes, storage_context=storage, embed_model=embedding)
            retriever = QRAGRetriever.from_vector_store(index, model=embedding.model)
    """

    # LlamaIndex keeps embeddings by what an embedder dumps: two models must not dump the same
    fingerprint: str = Field(default="", description="Of the model; set by itself.")
    _model: QRAGModel = PrivateAttr()

    def __init__(self, model: QRAGModel | str | Path | None = None, **settings: Any) -> None:
        if model is None:  # what LlamaIndex makes of a dumped embedding has a name alone
            model = settings.get("model_name")
        if settings.get("embeddings_cache") is not None:
            raise InvalidInputError(
                "embeddings_cache keeps one vector for a text, whether it is a query or a chunk, "
                "and whoever made it; give IngestionPipeline a cache instead."
            )
        loaded = resolve_model(model)
        settings = {"model_name": name_of(model), "embed_batch_size": 64, **settings}
        super().__init__(**{**settings, "fingerprint": loaded.fingerprint})
        self._model = loaded

    @model_serializer(mode="wrap")
    def _with_fingerprint(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump what the model is now; it may have changed."""
        if not is_of(self.fingerprint, self._model):
            self.fingerprint = self._model.fingerprint
        dumped: dict[str, Any] = serialize(self)
        return dumped

    def __reduce__(self) -> tuple[Any, ...]:
        names = self.model_fields_set - {"callback_manager"}
        settings = {name: getattr(self, name) for name in names}
        return functools.partial(type(self), self._model, **settings), ()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> QRAGEmbedding:
        """An embedding of its own with the same model."""
        make, arguments = self.__reduce__()
        copied: QRAGEmbedding = make(*arguments)
        return copied

    @property
    def model(self) -> QRAGModel:
        """The model."""
        return self._model

    @classmethod
    def class_name(cls) -> str:
        """Name under which LlamaIndex knows the class."""
        return "QRAGEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._model.encode_states([(query, [])])[0].tolist()
        return vector

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.encode_actions(texts).tolist()
        return vectors

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await in_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await in_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await in_thread(self._get_text_embeddings, texts)
