"""What a search asks of a vector store, whichever it is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from qrag_retriever.errors import InvalidInputError, QRAGError, VectorStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from qrag_retriever.chunk import Chunk


class Request(NamedTuple):
    """The chunks of largest inner product with a vector.

    Attributes:
        vector: float32 ``[d]``.
        limit: How many.
        numbers: The first of the chunk numbers to consider and the one behind the last; ``None``:
            all chunks.
        needed: How many must be found where there are as many numbers; ``None``: ``limit``.
    """

    vector: NDArray[np.float32]
    limit: int
    numbers: tuple[int, int] | None = None
    needed: int | None = None


class Hit(NamedTuple):
    """A chunk found.

    Attributes:
        chunk: The chunk.
        number: Its number among the chunks that pass the filter, if that is known.
        score: The store's own score.
        row: Its number among all chunks, where that is another.
    """

    chunk: Chunk
    number: int | None
    score: float
    row: int | None = None


class Store(ABC):
    """A vector store, of which some chunks may be seen.

    Args:
        number_key: Key of the metadata under which a chunk's number in its document stands.

    Attributes:
        kind: What it is called in messages.
        numbered: Whether chunk numbers are known.
        takes_index: Whether it is made from the LlamaIndex index that holds the store, for the
            store alone has no texts.
    """

    kind: str
    takes_index = False

    def __init__(self, number_key: str | None) -> None:
        self.number_key = number_key

    @property
    def numbered(self) -> bool:
        """Whether chunk numbers are known."""
        return self.number_key is not None

    def narrowed(self, filter: Any) -> Self:
        """The same store, of which only chunks that also pass one more filter are seen.

        Args:
            filter: In the store's own language; ``None``: no further filter.

        Raises:
            InvalidInputError: If it is empty, or of a type that this store would not obey.
        """
        try:
            return self._narrowed(filter)
        except QRAGError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"{self.kind} does not understand the filter {filter!r}: {_reason(error)}. Write "
                "it in the store's own language."
            ) from error

    def search(self, requests: Sequence[Request]) -> list[list[Hit]]:
        """What is found for each request, at least one, best first.

        Raises:
            VectorStoreError: If the store fails, or returns what cannot be used.
        """
        size = len(requests[0].vector)
        with self._own_errors(f"failed in a search with vectors of {size} dimensions"):
            found = self._search(requests)
        for request, hits in zip(requests, found, strict=True):
            self._check(request, hits)
        return found

    def count(self, numbers: tuple[int, int] | None = None) -> int:
        """How many chunks may be seen, all or those with such numbers.

        Raises:
            VectorStoreError: If the store fails.
        """
        with self._own_errors("failed to count chunks"):
            return self._count(numbers)

    @abstractmethod
    def _narrowed(self, filter: Any) -> Self: ...

    @abstractmethod
    def _search(self, requests: Sequence[Request]) -> list[list[Hit]]: ...

    @abstractmethod
    def _count(self, numbers: tuple[int, int] | None) -> int: ...

    def hit(self, chunk: Chunk, score: float) -> Hit:
        """A hit whose number stands in the chunk's metadata."""
        if self.number_key is None:
            return Hit(chunk, None, score)
        number = chunk.metadata.get(self.number_key)
        if isinstance(number, bool) or not isinstance(number, int):
            raise VectorStoreError(
                f"{self.kind}: chunk {chunk.id!r} has {number!r} under {self.number_key!r}; give "
                "every chunk its number in the document there, an integer from 0."
            )
        return Hit(chunk, number, score)

    def _check(self, request: Request, hits: Sequence[Hit]) -> None:
        """Refuse what no store that does its work returns."""
        ids = [hit.chunk.id for hit in hits]
        if len(set(ids)) < len(ids):
            twice = next(chunk_id for chunk_id in ids if ids.count(chunk_id) > 1)
            raise VectorStoreError(
                f"{self.kind} returned two chunks with the id {twice!r}; ids must be unique."
            )
        needed = request.limit if request.needed is None else request.needed
        if request.numbers is None:
            if len(hits) < needed and len(hits) < (there := min(needed, self.count())):
                raise VectorStoreError(
                    f"{self.kind} returned {len(hits)} chunks of {there} that it holds and that "
                    "pass the filter: its approximate index looks at too few (raise its ef or "
                    "nprobe, or how many it scans), or ids stand in it twice."
                )
            return
        low, high = request.numbers
        numbers = {hit.number for hit in hits}
        if len(numbers) < len(hits) or any(n is None or not low <= n < high for n in numbers):
            raise VectorStoreError(
                f"{self.kind} returned the chunk numbers {sorted(numbers, key=str)} where different"
                f" ones from {low} to {high - 1} were asked for. Each chunk of a document must have"
                " a number of its own; with several documents in one store, filter for one."
            )
        wanted = min(needed, high - low)
        if len(hits) < wanted:
            raise VectorStoreError(
                f"{self.kind} returned {len(hits)} of {wanted} chunks with numbers from {low} to "
                f"{high - 1}. Either the numbers have gaps, or the store changed during the search,"
                " or its approximate index looks at too few chunks (raise its ef or nprobe)."
            )

    @contextlib.contextmanager
    def _own_errors(self, failed: str) -> Iterator[None]:
        try:
            yield
        except QRAGError:
            raise
        except Exception as error:
            raise VectorStoreError(
                f"{self.kind} {failed}: {_reason(error)}. See that it is reachable, that the "
                f"collection is there and that this model filled it{self._filter_hint()}."
            ) from error

    def _filter_hint(self) -> str:
        """What else to look at, where there are filters."""
        return ""


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
