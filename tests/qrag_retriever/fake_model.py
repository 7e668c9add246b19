"""A stand-in for QRAGModel: hashes texts to vectors and counts those it was asked to embed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from qrag_retriever.config import QRAGConfig


class FakeModel:
    def __init__(
        self, dimension: int = 8, positions: str = "none", fingerprint: str = "fake"
    ) -> None:
        self.dimension = dimension
        self.config = QRAGConfig(positions=positions)
        self.fingerprint = fingerprint
        self.encoded: list[str] = []
        self.spoil: Callable[[np.ndarray], object] | None = None  # what it returns instead

    def encode_actions(self, texts: Sequence[str], *, show_progress: bool = False) -> np.ndarray:
        self.encoded.extend(texts)
        vectors = vectors_of(texts, self.dimension)
        return vectors if self.spoil is None else self.spoil(vectors)


def vectors_of(texts: Sequence[str], dimension: int = 8) -> np.ndarray:
    """The embeddings the fake gives to texts, float32 [n, dimension]."""
    vectors = np.empty((len(texts), dimension), dtype=np.float32)
    for row, text in enumerate(texts):
        digest = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(dimension)
        vectors[row] = np.frombuffer(digest, dtype=np.int8)
    return vectors / 64
