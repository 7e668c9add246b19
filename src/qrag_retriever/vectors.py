"""Embeddings as arrays: checked when they come in, and growing without disturbing their readers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qrag_retriever.errors import InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def checked_vectors(values: Any, shape: tuple[int, int], what: str) -> NDArray[np.float32]:
    """A float32 copy of embeddings.

    Args:
        values: The embeddings.
        shape: What their shape must be.
        what: What to call them in an error.

    Raises:
        InvalidInputError: If they are no numbers, have another shape, or are not finite.
    """
    try:
        vectors = np.array(values, dtype=np.float32, order="C")
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{what} cannot be read as an array ({error}).") from error
    if vectors.shape != shape:
        raise InvalidInputError(f"{what} have the shape {vectors.shape}; it must be {shape}.")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise InvalidInputError(
            f"{what} are not finite in {int((~finite).sum())} rows, the first of which is row "
            f"{int(finite.argmin())}; the model overflows or its weights are broken. Load it with "
            "dtype='float32', or train it again with a smaller learning rate."
        )
    return vectors


def extended(vectors: NDArray[np.float32], more: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors with more rows at the end, in a buffer that doubles when it is full.

    The result may share its buffer with ``vectors``. Only rows behind those in use are written, so
    earlier views stay as they are; hence only the latest result may be extended.

    Args:
        vectors: float32 ``[N, d]``.
        more: float32 ``[M, d]``.

    Returns:
        float32 ``[N + M, d]``.
    """
    used, count = len(vectors), len(vectors) + len(more)
    buffer = vectors.base
    if not isinstance(buffer, np.ndarray) or len(buffer) < count:
        buffer = np.empty((max(count, 2 * used), more.shape[1]), dtype=np.float32)
        buffer[:used] = vectors
    buffer[used:count] = more
    return buffer[:count]
