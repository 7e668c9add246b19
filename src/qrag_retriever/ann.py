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

AnnKind = Literal["none", "flat", "hnsw", "ivfpq"]

_NEIGHBOURS = 32  # HNSW: edges per node, candidates while building, least candidates in a search
_BUILD_CANDIDATES = 160
_SEARCH_CANDIDATES = 128
_SMALL = 10_000  # rows that IVF-PQ cannot learn lists and codes from; all are looked at instead
_TRAINING = 50  # rows for each list that they are learned from
_PROBED = 16  # one list in so many is looked at, and
_LEAST_PROBED = 32  # at least so many
_RESCORED = 200  # candidates whose exact product is computed, at least
_AT_ONCE = 1 << 16  # rows converted to float32 together
_SPARSE = 0.1  # below this share of allowed rows the graph loses its way: look at each of them


def check_ann(kind: str, config: QRAGConfig) -> None:
    """Refuse a kind that is unknown, or that cannot rank what a model computes.

    Raises:
        ConfigError: In these cases.
    """
    if kind not in get_args(AnnKind):
        raise ConfigError(f"ann={kind!r} is not known; give 'none', 'flat', 'hnsw' or 'ivfpq'.")
    if kind != "none" and config.positions != "none":
        raise ConfigError(
            f"ann={kind!r} needs a model with positions='none'; this one has "
            f"positions={config.positions!r}, whose Q-values change with every retrieved chunk. "
            "Use ann='none', the exact search."
        )


class AnnIndex:
    """Finds the chunks with the largest inner product with a state.

    Args:
        vectors: The embeddings ``[N, d]``, N at least 1.
        kind: ``"flat"`` (exact, all chunks), ``"hnsw"`` (approximate, a graph; FAISS keeps a
            float32 copy of the embeddings, as for ``"flat"``) or ``"ivfpq"`` (approximate, lists of
            codes of about d/8 bytes, whose best are compared exactly).
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
        kind: Literal["flat", "hnsw", "ivfpq"],
        stored: NDArray[np.uint8] | None = None,
    ) -> None:
        faiss = _faiss()

        self._vectors = vectors
        self._kind = kind
        if stored is not None:
            self._index = _read(stored, vectors.shape)
            return
        count, dimension = vectors.shape
        if kind == "ivfpq" and count >= _SMALL:
            self._index = _learned(vectors)
        elif kind != "hnsw":
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
        if rows is not None and self._kind != "flat" and len(rows) < _SPARSE * count:
            return self._exact(states, k, rows)
        codes = isinstance(self._index, _faiss().IndexIVF)
        wanted = max(_RESCORED, 4 * k) if codes else k
        _, found = self._index.search(states, wanted, params=self._parameters(k, rows))
        result: NDArray[np.int64] = found.astype(np.int64, copy=False)
        if codes:
            result = self._best(states, k, result)
        short = (result < 0).any(axis=1)
        if short.any():  # the graph walk met too few of the allowed rows
            result[short] = self._exact(states[short], k, rows)
        return result

    def to_bytes(self) -> NDArray[np.uint8] | None:
        """The index to be stored; ``None`` where it is as fast to build as to read."""
        faiss = _faiss()

        flat = isinstance(self._index, faiss.IndexFlat)
        return None if flat else faiss.serialize_index(self._index)

    def _parameters(self, k: int, rows: NDArray[np.int64] | None) -> Any:
        faiss = _faiss()

        choice: dict[str, Any] = {}
        if rows is not None:
            allowed = np.zeros(len(self._vectors), dtype=bool)
            allowed[rows] = True
            choice["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if isinstance(self._index, faiss.IndexFlat):
            return faiss.SearchParameters(**choice)
        if isinstance(self._index, faiss.IndexIVF):
            probed = max(_LEAST_PROBED, self._index.nlist // _PROBED)
            return faiss.SearchParametersIVF(nprobe=probed, **choice)
        return faiss.SearchParametersHNSW(efSearch=max(_SEARCH_CANDIDATES, 2 * k), **choice)

    def _best(
        self, states: NDArray[np.float32], k: int, found: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The k of the found rows with the largest exact product; -1 where fewer were found."""
        result = np.full((len(states), k), -1, dtype=np.int64)
        for best, state, candidates in zip(result, states, found, strict=True):
            rows = np.sort(candidates[candidates >= 0])
            values = self._vectors.float32(rows) @ state
            order = np.argsort(-values, kind="stable")[:k]
            best[: len(order)] = rows[order]
        return result

    def _exact(
        self, states: NDArray[np.float32], k: int, rows: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        candidates = np.arange(len(self._vectors)) if rows is None else rows
        values = states @ self._vectors.float32(candidates).T
        return candidates[np.argsort(-values, axis=1, kind="stable")[:, :k]]


def _learned(vectors: StoredVectors) -> Any:
    """An empty IVF-PQ index whose lists and codes were learned from some of the vectors."""
    faiss = _faiss()
    count, dimension = vectors.shape
    lists = int(count**0.5)
    parts = next(n for n in (dimension // 8, dimension // 4, 1) if n and dimension % n == 0)
    random = np.random.default_rng(0)
    sample = random.choice(count, min(count, _TRAINING * lists), replace=False)
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFPQ(quantizer, dimension, lists, parts, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(vectors.float32(np.sort(sample))))
    return index


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
