"""LangChain Documents as chunks, and back. LangChain is imported only once it is in use."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from typing_extensions import TypeIs

    from qrag_retriever.chunk import Chunk


def is_document(item: object) -> TypeIs[Document]:
    """Whether an object is a LangChain Document; imports nothing to find out."""
    if "langchain_core.documents.base" not in sys.modules:
        return False  # nobody can have made one
    from langchain_core.documents import Document

    return isinstance(item, Document)


def read_document(document: Document) -> dict[str, Any]:
    """What a chunk takes over from a Document, apart from the id: text, metadata, source.

    The Document is copied, so later changes to it do not reach the chunk. A plain Document is
    nothing but its text and metadata; only the instance of a subclass is kept as source.
    """
    from langchain_core.documents import Document

    metadata = copy.deepcopy(document.metadata)
    source = None
    if type(document) is not Document:
        source = document.model_copy(update={**_own_fields(document), "metadata": metadata})
    return {"text": document.page_content, "metadata": metadata, "source": source}


def document_from_chunk(chunk: Chunk) -> Document:
    """A new Document for a chunk, whatever the chunk was made from.

    Args:
        chunk: The chunk; its id becomes the Document's. A `Candidate` gives the Document that was
            found, which may have none.

    Returns:
        A Document that the caller may write into, of the class of the chunk's source if that was a
        Document; an index loaded from disk gives plain Documents.

    Example:
        >>> from qrag_retriever.chunk import Chunk
        >>> document_from_chunk(Chunk("a", "text", {"page": 3}))
        Document(id='a', metadata={'page': 3}, page_content='text')
    """
    from langchain_core.documents import Document

    from qrag_retriever.chunk import Candidate

    fields: dict[str, Any] = {
        "id": chunk.id,
        "page_content": chunk.text,
        "metadata": copy.deepcopy(chunk.metadata),
    }
    if is_document(chunk.source):
        if isinstance(chunk, Candidate):
            del fields["id"]
        return chunk.source.model_copy(update={**_own_fields(chunk.source), **fields})
    return Document(**fields)


def _own_fields(document: Document) -> dict[str, Any]:
    """Copies of the fields that a subclass adds."""
    names = set(type(document).model_fields) - {"id", "page_content", "metadata", "type"}
    return {name: copy.deepcopy(getattr(document, name)) for name in names}
