"""Embeddings as arrays: checked when they come in, stored small, growing without a copy."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qrag_retriever.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from qrag_retriever.quantized import QuantizedRows

StorageType = Literal["float32", "bfloat16", "float16", "int8"]

# what an array holds; NumPy has no bfloat16, so its bits are kept
ARRAY_TYPES: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.float16,
    "int8": np.int8,
}
_AT_ONCE = 1 << 16  # rows converted together
_LONGEST = "_longest"  # what `StoredVectors.longest` keeps


def check_storage_type(dtype: object) -> None:
    """Refuse a type that embeddings cannot be stored as.

    Raises:
        InvalidInputError: If it is one.
    """
    if dtype not in get_args(StorageType):
        raise InvalidInputError(
            f"dtype={dtype!r} is no type to store embeddings as; give one of "
            f"{', '.join(map(repr, get_args(StorageType)))}."
        )


@dataclasses.dataclass(frozen=True)
class StoredVectors:
    """Embeddings as an index keeps them; never changes.

    Attributes:
        values: ``[N, d]``, of the array type that belongs to ``dtype``.
        dtype: ``"float32"``; ``"bfloat16"`` or ``"float16"``, half its size; or ``"int8"``, a
            quarter: each row as integers from -127 to 127 and a factor.
        scales: The factors, float32 ``[N]``; ``None`` for other types.
    """

    values: NDArray[Any]
    dtype: StorageType = "float32"
    scales: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, vectors: NDArray[np.float32], dtype: StorageType) -> StoredVectors:
        """Store vectors; float32 ones share their memory.

        To store again what :meth:`float32` gives changes nothing.

        Args:
            vectors: float32 ``[N, d]``, finite.
            dtype: The type.

        Raises:
            InvalidInputError: If a number is too large for the type.
        """
        if dtype == "int8":
            values, scales = _to_int8(vectors)
            return cls(values, dtype, scales)
        if dtype == "float16":
            with np.errstate(over="ignore"):
                halves = vectors.astype(np.float16)
            if not np.isfinite(halves).all():
                raise InvalidInputError(
                    "An embedding has numbers too large for float16 (65504); choose "
                    "dtype='bfloat16' or 'int8'."
                )
            return cls(halves, dtype)
        if dtype == "bfloat16":
            import torch

            numbers = torch.from_numpy(np.require(vectors, requirements="W")).bfloat16()
            return cls(numbers.view(torch.uint16).numpy(), dtype)
        return cls(vectors)

    @classmethod
    def checked(
        cls, values: Any, shape: tuple[int, int], what: str, dtype: StorageType
    ) -> StoredVectors:
        """Store vectors that somebody gave, block by block of an array.

        Arguments and errors as `of` and `checked_vectors`.
        """
        if dtype == "float32" or getattr(values, "shape", None) != shape:
            return cls.of(checked_vectors(values, shape, what), dtype)
        firsts = range(0, len(values), _AT_ONCE)
        blocks = ((first, values[first : first + _AT_ONCE]) for first in firsts)
        parts = (
            cls.of(checked_vectors(block, block.shape, what, first), dtype)
            for first, block in blocks
        )
        return cls.gathered(parts, shape, dtype)

    @classmethod
    def gathered(
        cls, parts: Iterable[StoredVectors], shape: tuple[int, int], dtype: StorageType
    ) -> StoredVectors:
        """Vectors that come in parts, in one array of their own.

        Args:
            parts: The parts, of type ``dtype``; one at a time is held.
            shape: ``(N, d)`` of all together.
            dtype: The type.
        """
        values = np.empty(shape, dtype=ARRAY_TYPES[dtype])
        scales = np.empty(shape[0], dtype=np.float32) if dtype == "int8" else None
        first = 0
        for part in parts:
            values[first : first + len(part)] = part.values
            if scales is not None:
                scales[first : first + len(part)] = part.scales
            first += len(part)
        return cls(values, dtype, scales)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, d)``."""
        count, dimension = self.values.shape
        return count, dimension

    def __len__(self) -> int:
        return len(self.values)

    def longest(self) -> float:
        """No vector is longer than this, in the Euclidean norm; all are read once to know it."""
        known: float | None = self.__dict__.get(_LONGEST)
        if known is None:
            rows = _AT_ONCE // 16
            blocks = (self.float32(slice(i, i + rows)) for i in range(0, len(self), rows))
            squares = [np.einsum("nd,nd->n", b, b, dtype=np.float64).max() for b in blocks]
            # NaN, if there is any
            known = self.__dict__[_LONGEST] = float(np.sqrt(np.max(squares, initial=0)))
        return known

    def float32(self, rows: Any = slice(None)) -> NDArray[np.float32]:
        """Vectors in float32, read-only; all of a float32 index without a copy.

        Args:
            rows: Which ones, in any way NumPy takes.
        """
        some = self.values[rows]
        if self.dtype == "bfloat16":
            result: NDArray[np.float32] = (some.astype(np.uint32) << 16).view(np.float32)
        else:
            result = some.astype(np.float32, copy=False)
        if self.scales is not None:
            result *= self.scales[rows][..., None]
        result = result.view()
        result.setflags(write=False)
        return result

    def tensor(self) -> Tensor | QuantizedRows:
        """The vectors as `scoring.score` takes them, over the same memory; not to be written to."""
        import torch

        from qrag_retriever.quantized import QuantizedRows

        _say_once_unheard()
        values = torch.from_numpy(self.values)
        if self.scales is not None:
            return QuantizedRows(values, torch.from_numpy(self.scales))
        return values.view(torch.bfloat16) if self.dtype == "bfloat16" else values

    def take(self, rows: list[int] | slice) -> StoredVectors:
        """The vectors of some rows, in this order."""
        scales = None if self.scales is None else self.scales[rows]
        return StoredVectors(self.values[rows], self.dtype, scales)

    def replaced(self, rows: list[int], by: StoredVectors) -> StoredVectors:
        """The vectors with some rows replaced by others of the same type."""

        def replace(array: NDArray[Any], by: NDArray[Any]) -> NDArray[Any]:
            array = array.copy()
            array[rows] = by
            return array

        return self._joined(by, replace)

    def extended(self, more: StoredVectors) -> StoredVectors:
        """The vectors with more of the same type at the end, in a buffer as `extended` uses."""
        longer = self._joined(more, extended)
        if _LONGEST in self.__dict__:  # those need not be read again
            longer.__dict__[_LONGEST] = max(self.longest(), more.longest())
        return longer

    def _joined(
        self,
        more: StoredVectors,
        join: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]],
    ) -> StoredVectors:
        scales = None
        if self.scales is not None and more.scales is not None:
            scales = join(self.scales, more.scales)
        return StoredVectors(join(self.values, more.values), self.dtype, scales)


def checked_vectors(
    values: Any, shape: tuple[int, ...], what: str, first: int = 0
) -> NDArray[np.float32]:
    """A float32 copy of embeddings.

    Args:
        values: The embeddings.
        shape: What their shape must be.
        what: What to call them in an error.
        first: Number of their first row, in an error.

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
            f"{what} are not finite, the first in row {first + int(finite.argmin())}; the model "
            "overflows or its weights are broken. Load it with dtype='float32', or train it again "
            "with a smaller learning rate."
        )
    return vectors


def extended(array: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
    """An array with more rows at the end, in a buffer that doubles when it is full.

    The result may share its buffer with ``array``. Only rows behind those in use are written, so
    earlier views stay as they are; hence only the latest result may be extended.

    Args:
        array: ``[N, …]``.
        more: ``[M, …]`` of the same type.

    Returns:
        ``[N + M, …]``.
    """
    used, count = len(array), len(array) + len(more)
    buffer = array.base
    if not isinstance(buffer, np.ndarray) or len(buffer) < count:
        buffer = np.empty((max(count, 2 * used), *more.shape[1:]), dtype=more.dtype)
        buffer[:used] = array
    buffer[used:count] = more
    return buffer[:count]


def _to_int8(vectors: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers and one factor a row, block by block."""
    values = np.empty(vectors.shape, dtype=np.int8)
    scales = np.zeros(len(vectors), dtype=np.float32)
    for first in range(0, len(vectors), _AT_ONCE):
        block = vectors[first : first + _AT_ONCE]
        largest = np.abs(block).max(axis=1, initial=0)
        # The factor is rounded up to 17 bits: its product with an integer of 7 is then exact in
        # float32, and to quantise that again gives the same.
        bits = (largest / np.float32(127)).view(np.uint32)
        scale = ((bits + 0x7F) & ~np.uint32(0x7F)).view(np.float32)
        divisor = np.where(scale > 0, scale, 1)[:, None]
        values[first : first + len(block)] = np.rint(block / divisor)
        scales[first : first + len(block)] = scale
    return values, scales


@functools.cache
def _say_once_unheard() -> None:
    """Let torch tell, as it does once, that an array is read-only: nothing writes into tensors."""
    import torch

    array = np.zeros(1)
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)
