"""A model as LangChain embeddings, to fill a vector store the usual way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from langchain_core.embeddings import Embeddings

from qrag_retriever.model_choice import resolve_model

if TYPE_CHECKING:
    from qrag_retriever.model import QRAGModel


class QRAGEmbeddings(Embeddings):
    """Embeds documents with the action encoder and queries as states without chunks.

    The inner product of the two is Q of the first step, so a plain similarity search of a store
    filled with it finds what a search by `QRAGRetriever` finds first. The store's metric must be
    the inner product. The asynchronous methods run in threads.

    Args:
        model: A `QRAGModel`, or folder or hub name of one, or of any embedder to use untrained;
            ``None``: multihop-en.

    Raises:
        ModelFormatError: If the model cannot be loaded.

    Attributes:
        model: The model.

    Example:
        .. code-block:: python

            store = Chroma.from_texts(
                texts,
                QRAGEmbeddings("folder"),
                collection_configuration={"hnsw": {"space": "ip"}},
            )
            retriever = QRAGRetriever.from_vector_store(store, model="folder")
    """

    def __init__(self, model: QRAGModel | str | Path | None = None) -> None:
        self.model = resolve_model(model)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embeddings of chunks, d numbers each; equal texts are embedded once.

        Raises:
            InvalidInputError: If a chunk is not a text.
        """
        vectors: list[list[float]] = self.model.encode_actions(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Embedding of the state in which nothing has been found yet, d numbers.

        Raises:
            InvalidInputError: If the query is empty or not a text.
        """
        vector: list[float] = self.model.encode_states([(text, [])])[0].tolist()
        return vector
