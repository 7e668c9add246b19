"""What adding chunks changes in an index: which are new, and which replace another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qrag_retriever.chunk_store import MemoryChunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qrag_retriever.chunk import Chunk
    from qrag_retriever.vectors import StoredVectors


@dataclasses.dataclass(frozen=True)
class IndexChange:
    """Chunks to put into an index.

    Attributes:
        appended: New ones, which come last.
        changed: Those that replace another, by its row.
        reworded: The rows of these that are embedded anew.
    """

    appended: list[Chunk]
    changed: Mapping[int, Chunk] = dataclasses.field(default_factory=dict)
    reworded: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def between(cls, old: MemoryChunks, chunks: Iterable[Chunk]) -> IndexChange:
        """What adding chunks changes; nothing where one is there already as it is."""
        appended, changed = [], {}
        for chunk in chunks:
            row = old.find(chunk.id)
            if row is None:
                appended.append(chunk)
            elif not _equal(old[row], chunk):
                changed[row] = chunk
        reworded = [
            row for row, chunk in changed.items() if old[row].embed_text != chunk.embed_text
        ]
        return cls(appended, changed, reworded)

    def __bool__(self) -> bool:
        return bool(self.appended or self.changed)

    @property
    def to_embed(self) -> list[Chunk]:
        """The chunks whose embeddings `applied` needs, in its order."""
        return [*(self.changed[row] for row in self.reworded), *self.appended]

    def applied(
        self, old: MemoryChunks, vectors: StoredVectors, new: StoredVectors
    ) -> tuple[MemoryChunks, StoredVectors]:
        """All chunks and their embeddings after the change.

        Args:
            old: The chunks before.
            vectors: Their embeddings.
            new: Those of `to_embed`.
        """
        chunks = old
        if self.changed:
            chunks = MemoryChunks(self.changed.get(row, chunk) for row, chunk in enumerate(old))
        if self.reworded:
            vectors = vectors.replaced(self.reworded, new.take(slice(len(self.reworded))))
        if self.appended:
            chunks = chunks.extended(self.appended)
            vectors = vectors.extended(new.take(slice(len(self.reworded), None)))
        return chunks, vectors


def _equal(old: Chunk, new: Chunk) -> bool:
    """Whether nothing is to be changed: 1 is not True, and what cannot be compared is not equal."""
    try:
        return old == new and repr(old.metadata) == repr(new.metadata)
    except ValueError:  # arrays
        return False
