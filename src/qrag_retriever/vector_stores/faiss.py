"""FAISS, as LangChain and as LlamaIndex fill it; its rows are the chunks in document order."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from qrag_retriever.chunk import Chunk
from qrag_retriever.documents import read_document
from qrag_retriever.errors import VectorStoreError
from qrag_retriever.filters import compile_filter
from qrag_retriever.vector_stores.llama_index import chunk_of
from qrag_retriever.vector_stores.store import Hit, Request, Store

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self


class _Faiss(Store):
    """Rows of a FAISS index, filtered as a `ChunkIndex` is; numbers count those that pass."""

    kind = "FAISS"
    numbered = True

    def __init__(self, index: Any) -> None:
        super().__init__(None)
        self._index = index
        self.guards: tuple[Callable[[Chunk], bool], ...] = ()

    @abstractmethod
    def _chunk(self, row: int) -> Chunk: ...

    def _narrowed(self, filter: Any) -> Self:
        narrowed = copy.copy(self)
        narrowed.__dict__.pop("_rows", None)  # rows may have changed since
        if filter is not None:
            own = filter if callable(filter) else copy.deepcopy(filter)
            narrowed.guards = (*self.guards, compile_filter(own))
        return narrowed

    @functools.cached_property
    def _rows(self) -> NDArray[np.int64] | None:
        """Rows that pass the filters, ascending; ``None``: all."""
        if not self.guards:
            return None
        rows = range(self._index.ntotal)
        return np.array([row for row in rows if self._passes(self._chunk(row))], dtype=np.int64)

    def _passes(self, chunk: Chunk) -> bool:
        return all(passes(chunk) for passes in self.guards)

    def _count(self, numbers: tuple[int, int] | None) -> int:
        total = self._index.ntotal if self._rows is None else len(self._rows)
        return total if numbers is None else len(range(*slice(*numbers).indices(total)))

    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        return [self._nearest(request) for request in requests]

    def _nearest(self, request: Request) -> list[Hit]:
        if self._index.d != len(request.vector):
            raise VectorStoreError(
                f"The FAISS index holds vectors of {self._index.d} dimensions, the model makes "
                f"{len(request.vector)}. Fill it with this model."
            )
        limit = min(request.limit, self._count(request.numbers))
        if limit == 0:
            return []
        settings = self._settings(request.numbers)
        scores, rows = self._index.search(request.vector[None], limit, **settings)
        hits = []
        for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True):
            if row < 0:  # FAISS fills up what it did not find
                continue
            chunk = self._chunk(row)
            if not self._passes(chunk):
                raise VectorStoreError(
                    "The FAISS index was changed during the search; search again."
                )
            number = row if self._rows is None else int(np.searchsorted(self._rows, row))
            hits.append(Hit(chunk, number, score, row))
        return hits

    def _settings(self, numbers: tuple[int, int] | None) -> dict[str, Any]:
        """What tells FAISS which rows to look at; nothing for all."""
        chosen: Any
        if self._rows is not None:
            chosen = faiss.IDSelectorBatch(self._rows[slice(*numbers) if numbers else slice(None)])
        elif numbers is not None:
            chosen = faiss.IDSelectorRange(*numbers)
        else:
            return {}
        index: Any = faiss.downcast_index(self._index)
        # one with inverted lists accepts its own kind of parameters alone
        lists = {"nprobe": index.nprobe} if isinstance(index, faiss.IndexIVF) else {}
        kind: Any = faiss.SearchParametersIVF if lists else faiss.SearchParameters
        return {"params": kind(sel=chosen, **lists)}


class LangChainFaiss(_Faiss):
    """``langchain_community.vectorstores.FAISS``."""

    def __init__(self, store: Any, number_key: str | None) -> None:  # noqa: ARG002
        super().__init__(store.index)
        self._store = store

    def _chunk(self, row: int) -> Chunk:
        chunk_id = self._store.index_to_docstore_id.get(row)
        document = None if chunk_id is None else self._store.docstore.search(chunk_id)
        if document is None or isinstance(document, str):  # the docstore's way to say no
            raise VectorStoreError(
                f"The FAISS store has a vector in row {row} and no document for it; make it again."
            )
        return Chunk(chunk_id, **read_document(document))


class LlamaIndexFaiss(_Faiss):
    """A ``VectorStoreIndex`` over ``llama_index.vector_stores.faiss.FaissVectorStore``."""

    takes_index = True

    def __init__(self, index: Any, number_key: str | None) -> None:  # noqa: ARG002
        if not hasattr(index, "docstore"):
            raise VectorStoreError(
                "A FaissVectorStore holds vectors and no texts; give the VectorStoreIndex that "
                "holds it."
            )
        super().__init__(index.vector_store.client)
        self._nodes = index

    def _chunk(self, row: int) -> Chunk:
        node_id = self._nodes.index_struct.nodes_dict.get(str(row))
        node = None if node_id is None else self._nodes.docstore.get_node(node_id, False)
        if node is None:
            raise VectorStoreError(
                f"The FAISS index has a vector in row {row}, and LlamaIndex no node for it; it was "
                "deleted or the index is of another docstore. Make the index again."
            )
        return chunk_of(node)
