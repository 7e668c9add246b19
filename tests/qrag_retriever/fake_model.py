"""A stand-in for QRAGModel: texts become vectors by hashing, and every text asked for is counted."""

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
        self.spoil: Callable[[np.ndarray], object] = lambda vectors: vectors

    def encode_actions(self, texts: Sequence[str], *, show_progress: bool = False) -> np.ndarray:
        self.encoded.extend(texts)
        vectors = [vector(text, self.dimension) for text in texts]
        return self.spoil(np.array(vectors, dtype=np.float32).reshape(len(texts), self.dimension))


def vector(text: str, dimension: int = 8) -> np.ndarray:
    """The embedding the fake gives a text, float32 [dimension]."""
    seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng(list(seed)).standard_normal(dimension).astype(np.float32)
