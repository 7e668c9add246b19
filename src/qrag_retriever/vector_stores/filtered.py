"""A store that is told in each request which chunks to consider."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qrag_retriever.errors import InvalidInputError, VectorStoreError
from qrag_retriever.vector_stores.store import Hit, Request, Store

if TYPE_CHECKING:
    from typing_extensions import Self

    from qrag_retriever.chunk import Chunk


class FilteredStore(Store):
    """A store with a language for filters, of which all given ones must hold.

    Attributes:
        allowed: What a filter may be, for messages.
    """

    allowed: str

    def __init__(self, number_key: str | None) -> None:
        super().__init__(number_key)
        self.filters: tuple[Any, ...] = ()
        self.guards: tuple[Callable[[Chunk], bool], ...] = ()

    @abstractmethod
    def _translated(self, filter: Any) -> Sequence[Any]:
        """Conditions, all of which must hold; none if the filter, or a part of it, is empty.

        Raises:
            TypeError: If it is of another type.
        """

    @abstractmethod
    def _range(self, low: int, high: int) -> Sequence[Any]:
        """Conditions that let numbers from ``low`` to ``high - 1`` pass."""

    @abstractmethod
    def _joined(self, conditions: Sequence[Any]) -> Any:
        """All of the conditions, at least one, as one filter."""

    def _narrowed(self, filter: Any) -> Self:
        narrowed = copy.copy(self)
        if filter is None:
            return narrowed
        own = copy.deepcopy(filter)  # the caller may write into theirs
        try:
            conditions = self._translated(own)
        except TypeError:
            raise InvalidInputError(
                f"A filter for this {self.kind} store is {self.allowed}, not "
                f"{type(filter).__name__}."
            ) from None
        if not conditions:
            raise InvalidInputError(
                f"The filter {filter!r} or a part of it holds no condition, and so may let "
                "everything pass; give at least one in each part, or None as the filter."
            )
        narrowed.filters = (*self.filters, *conditions)
        if (guard := self._guard(own)) is not None:
            narrowed.guards = (*self.guards, guard)
        return narrowed

    def _guard(self, filter: Any) -> Callable[[Chunk], bool] | None:  # noqa: ARG002
        """A check of every hit once more, where a translation may leave conditions out."""
        return None

    def _where(self, numbers: tuple[int, int] | None) -> Any:
        """Filters and chunk numbers as one filter; ``None``: all chunks."""
        conditions = [*self.filters, *(self._range(*numbers) if numbers else ())]
        return self._joined(conditions) if conditions else None

    def _filter_hint(self) -> str:
        return ", and that it understands the filter" if self.filters else ""

    def _check(self, request: Request, hits: Sequence[Hit]) -> None:
        super()._check(request, hits)
        if not all(passes(hit.chunk) for hit in hits for passes in self.guards):
            raise VectorStoreError(
                f"{self.kind} returned a chunk that the filter excludes: its LlamaIndex store does "
                "not understand all of the filter. Write it with other operators."
            )
