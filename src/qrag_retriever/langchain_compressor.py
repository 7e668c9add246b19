"""Multi-step selection as a LangChain document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import PrivateAttr

from qrag_retriever.model import QRAGModel
from qrag_retriever.second_stage import Selector


class QRAGDocumentCompressor(BaseDocumentCompressor):
    """Selects documents in several steps, for LangChain's ``ContextualCompressionRetriever``.

    The asynchronous method runs in a thread.

    Args:
        model: A `QRAGModel` with ``positions="none"``, or folder or hub name of one, or of any
            embedder to use untrained; ``None``: multihop-en.
        **settings: ``k``, the number of documents to select, by default what the model was trained
            for; ``q_threshold``: stop at the first step whose best Q lies below it, by default the
            model's.

    Raises:
        ConfigError: If the model needs to know the order of the document.
        InvalidInputError: If a setting is unknown or out of range.
        ModelFormatError: If the model cannot be loaded.
    """

    _selector: Selector = PrivateAttr()

    def __init__(self, model: QRAGModel | str | Path | None = None, **settings: Any) -> None:
        super().__init__()
        self._selector = Selector(model, **settings)

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks = None,  # noqa: ARG002
    ) -> Sequence[Document]:
        """The documents selected, in the order of selection; the very objects given.

        Args:
            documents: What to select from; of several with one id the first counts.
            query: The question.
            callbacks: Not used.

        Raises:
            InvalidInputError: If the query is empty.
        """
        return [step.chunk.source for step in self._selector.select(query, documents)]
