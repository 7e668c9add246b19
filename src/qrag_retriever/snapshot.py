"""What an index held at one moment: chunks and embeddings that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qrag_retriever.ann import AnnIndex, AnnKind
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.filters import CompiledFilter, compile_filter
from qrag_retriever.locks import Lock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from numpy.typing import NDArray

    from qrag_retriever.chunk_store import ChunkSequence
    from qrag_retriever.vectors import StoredVectors

_KEPT_SELECTIONS = 8


class Snapshot:
    """An immutable view of an index; later changes to the index make a new one.

    Rows found by :meth:`select` and :meth:`row_of` belong to this snapshot's chunks and embeddings.
    Take one snapshot per query and ask it for everything, or a change in between may shift rows.

    Attributes:
        chunks: All chunks in document order.
        vectors: Their action embeddings as they are stored; may be memory-mapped.
        version: Number of changes the index had seen.
    """

    def __init__(
        self,
        chunks: ChunkSequence,
        vectors: StoredVectors,
        version: int,
        *,
        ann_kind: AnnKind = "none",
        stored_ann: NDArray[np.uint8] | None = None,
    ) -> None:
        self.chunks = chunks
        self.vectors = vectors
        self.version = version
        self._ann_kind = ann_kind
        self._stored_ann = stored_ann
        self._ann: AnnIndex | None = None
        self._selections: dict[Hashable, NDArray[np.int64]] = {}
        self._lock = Lock()

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """The action embeddings in float32 ``[N, d]``, read-only.

        The stored ones themselves if that is how they are stored, or else made at each call.
        """
        return self.vectors.float32()

    @property
    def ann(self) -> AnnIndex | None:
        """The approximate index over the embeddings, built when first asked for; or ``None``."""
        if self._ann_kind == "none" or len(self.chunks) == 0:
            return None
        with self._lock:
            if self._ann is None:
                self._ann = AnnIndex(self.vectors, self._ann_kind, self._stored_ann)
            return self._ann

    def select(self, filter: object = None) -> NDArray[np.int64] | None:
        """Rows of the chunks that pass a filter.

        The last few results are kept, but not those of functions, which see every chunk each time.

        Args:
            filter: See :func:`~qrag_retriever.filters.compile_filter`.

        Returns:
            Sorted int64 rows, read-only, maybe none; ``None`` if the filter is ``None``: all rows.

        Raises:
            InvalidInputError: If the filter is not usable, or cannot be compared with a value.
        """
        if filter is None:
            return None
        passes = compile_filter(filter)
        if not isinstance(passes, CompiledFilter):
            return _rows(passes(chunk) for chunk in self.chunks)
        with self._lock:
            rows = self._selections.get(passes.key)
        if rows is None:
            rows = _rows(passes.matches(metadata) for metadata in self.chunks.metadatas())
            if passes.key is not None:
                with self._lock:
                    self._selections[passes.key] = rows
                    while len(self._selections) > _KEPT_SELECTIONS:
                        del self._selections[next(iter(self._selections))]
        return rows

    def row_of(self, id_: str) -> int:
        """The row of the chunk with an id.

        Raises:
            InvalidInputError: If there is none.
        """
        row = self.chunks.find(id_)
        if row is None:
            raise InvalidInputError(f"No chunk has the id {id_!r}; the index has {len(self)}.")
        return row

    def __len__(self) -> int:
        return len(self.chunks)

    def __repr__(self) -> str:
        return f"Snapshot({len(self)} chunks, version={self.version})"


def _rows(passes: Iterable[bool]) -> NDArray[np.int64]:
    rows = np.flatnonzero(np.fromiter(passes, dtype=bool)).astype(np.int64, copy=False)
    rows.setflags(write=False)
    return rows
