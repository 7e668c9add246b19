"""Where an index was saved, so that its pickle names the folder instead of holding the corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qrag_retriever.errors import IndexFormatError
from qrag_retriever.storage import generation_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from qrag_retriever.chunk import Chunk
    from qrag_retriever.index import ChunkIndex
    from qrag_retriever.model import QRAGModel


class SavedIndex(NamedTuple):
    """Where an index was saved, and what tells that it is still there.

    Attributes:
        folder: The folder.
        generation: Name of that save.
        version: Version of the index then.
    """

    folder: Path
    generation: str
    version: int

    def holds(self, version: int) -> bool:
        """Whether the folder holds that version of the index, and no other that came after."""
        return version == self.version and generation_of(self.folder) == self.generation


def make_again(
    make: Callable[..., ChunkIndex],
    chunks: Sequence[Chunk],
    embeddings: NDArray[np.float32],
    fingerprint: str,
) -> ChunkIndex:
    """What a pickle of an index that is not saved does when it is read."""
    index = make(chunks, embeddings)
    index.fingerprint = fingerprint  # the model may have changed after the index was made
    return index


def load_again(kind: type[ChunkIndex], saved: SavedIndex, model: QRAGModel) -> ChunkIndex:
    """What a pickle of a saved index does when it is read.

    Raises:
        IndexFormatError: If another index was saved there since. Others as `ChunkIndex.load`.
    """
    index = kind.load(saved.folder, model=model)
    if index.saved is None or index.saved.generation != saved.generation:
        raise IndexFormatError(
            f"Another index was saved in {saved.folder} since this one was pickled; load that one "
            "with ChunkIndex.load, or pickle again."
        )
    return index
