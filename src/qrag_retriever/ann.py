"""Approximate search with FAISS, for models without positions.

With positions, the Q-value of a chunk depends on what was retrieved before, and no index over the
bare embeddings can rank by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qrag_retriever.errors import ConfigError, IndexFormatError, InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qrag_retriever.config import QRAGConfig
    from qrag_retriever.vectors import StoredVectors

AnnKind = Literal["none", "flat", "hnsw"]

_NEIGHBOURS = 32  # HNSW: edges per node, candidates while building, least candidates in a search
_BUILD_CANDIDATES = 160
_SEARCH_CANDIDATES = 128
_AT_ONCE = 1 << 16  # rows converted to float32 together
_SPARSE = 0.1  # below this share of allowed rows the graph loses its way: look at each of them


def check_ann(kind: str, config: QRAGConfig) -> None:
    """Refuse a kind that is unknown, or that cannot rank what a model computes.

    Raises:
        ConfigError: In these cases.
    """
    if kind not in get_args(AnnKind):
        raise ConfigError(f"ann={kind!r} is not known; give 'none', 'flat' or 'hnsw'.")
    if kind != "none" and config.positions != "none":
        raise ConfigError(
            f"ann={kind!r} needs a model with positions='none'; this one has "
            f"positions={config.positions!r}, whose Q-values change with every retrieved chunk. "
            "Use ann='none', the exact search."
        )


class AnnIndex:
    """Finds the chunks with the largest inner product with a state.

    Args:
        vectors: The embeddings ``[N, d]``, N at least 1. FAISS keeps a float32 copy of them.
        kind: ``"flat"`` (exact, all chunks) or ``"hnsw"`` (approximate, a graph).
        stored: What :meth:`to_bytes` gave, to save building it.

    Raises:
        IndexFormatError: If ``stored`` is not an index over these embeddings.

    Example:
        >>> import numpy as np
        >>> from qrag_retriever.vectors import StoredVectors
        >>> corpus = np.eye(3, 4, dtype=np.float32)
        >>> AnnIndex(StoredVectors(corpus), "flat").search(corpus[1:2], k=1)
        array([[1]])
    """

    def __init__(
        self,
        vectors: StoredVectors,
        kind: Literal["flat", "hnsw"],
        stored: NDArray[np.uint8] | None = None,
    ) -> None:
        faiss = _faiss()

        self._vectors = vectors
        self._kind = kind
        if stored is not None:
            self._index = _read(stored, vectors.shape)
            return
        count, dimension = vectors.shape
        if kind == "flat":
            self._index = faiss.IndexFlatIP(dimension)
        else:
            self._index = faiss.IndexHNSWFlat(dimension, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = _BUILD_CANDIDATES
        for first in range(0, count, _AT_ONCE):
            some = vectors.float32(slice(first, first + _AT_ONCE))
            self._index.add(np.ascontiguousarray(some))

    def search(
        self, states: NDArray[np.float32], k: int, rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The best chunks for each state, best first.

        Args:
            states: float32 ``[S, d]``.
            k: How many.
            rows: The only rows that may be found; ``None``: all.

        Returns:
            Row numbers, int64 ``[S, min(k, N or len(rows))]``.

        Raises:
            InvalidInputError: If the shapes do not fit, or ``k < 1``.
        """
        count, dimension = self._vectors.shape
        if states.ndim != 2 or states.shape[1] != dimension:
            raise InvalidInputError(
                f"states have shape {states.shape}; the index takes [S, {dimension}]."
            )
        if k < 1:
            raise InvalidInputError(f"k={k}; give an integer of at least 1.")
        states = np.ascontiguousarray(states, dtype=np.float32)
        k = min(k, count if rows is None else len(rows))
        if k == 0 or len(states) == 0:
            return np.empty((len(states), k), dtype=np.int64)
        if rows is not None and self._kind == "hnsw" and len(rows) < _SPARSE * count:
            return self._exact(states, k, rows)
        _, found = self._index.search(states, k, params=self._parameters(k, rows))
        result: NDArray[np.int64] = found.astype(np.int64, copy=False)
        short = (result < 0).any(axis=1)
        if short.any():  # the graph walk met too few of the allowed rows
            result[short] = self._exact(states[short], k, rows)
        return result

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """The index to be stored; ``None`` for ``"flat"``, which is as fast to build as to read."""
        faiss = _faiss()

        return faiss.serialize_index(self._index) if self._kind == "hnsw" else None

    def _parameters(self, k: int, rows: NDArray[np.int64] | None) -> Any:
        faiss = _faiss()

        choice: dict[str, Any] = {}
        if rows is not None:
            allowed = np.zeros(len(self._vectors), dtype=bool)
            allowed[rows] = True
            choice["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if self._kind == "flat":
            return faiss.SearchParameters(**choice)
        return faiss.SearchParametersHNSW(efSearch=max(_SEARCH_CANDIDATES, 2 * k), **choice)

    def _exact(
        self, states: NDArray[np.float32], k: int, rows: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        candidates = np.arange(len(self._vectors)) if rows is None else rows
        values = states @ self._vectors.float32(candidates).T
        return candidates[np.argsort(-values, axis=1, kind="stable")[:, :k]]


def _faiss() -> Any:
    import faiss  # takes a while, and most indexes do without

    return faiss


def _read(stored: NDArray[np.uint8], shape: tuple[int, ...]) -> Any:
    faiss = _faiss()
    try:
        index = faiss.deserialize_index(stored)
    except RuntimeError as error:
        raise IndexFormatError(
            f"The stored approximate index cannot be read ({error}); build the index again."
        ) from error
    if (index.ntotal, index.d) != shape:
        raise IndexFormatError(
            f"The stored approximate index is over {index.ntotal} vectors of {index.d} dimensions; "
            f"the embeddings are {shape}. Build the index again."
        )
    return index
