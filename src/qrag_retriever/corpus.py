"""What a search looks for chunks in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.filters import compile_filter
from qrag_retriever.fingerprint import is_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    from qrag_retriever.candidates import Candidates
    from qrag_retriever.model import QRAGModel
    from qrag_retriever.search import SearchOptions


class AllOf(NamedTuple):
    """Two filters in a store's own language, both of which must hold."""

    first: Any
    second: Any


class Corpus(ABC):
    """A `ChunkIndex`, a vector store, or what another retriever finds.

    Attributes:
        model: The model that made the embeddings of the chunks.
        fingerprint: Of the model, when it made them.
        adds_filters: Whether the filter of a call narrows the retriever's own, as an `AllOf`, and
            does not take its place.
    """

    adds_filters = False

    model: QRAGModel
    fingerprint: str

    def is_of(self, model: QRAGModel) -> bool:
        """Whether the chunks' embeddings are those of this model, as it is now."""
        return is_of(self.fingerprint, model)

    def check(self, options: SearchOptions, filter: Any) -> None:  # noqa: ARG002
        """Refuse settings that no search over this corpus could use.

        Raises:
            InvalidInputError: If an option does not go with it, or the filter is malformed.
        """
        if filter is not None:
            compile_filter(filter)

    @abstractmethod
    def candidates(
        self,
        queries: Sequence[str],
        model: QRAGModel,
        options: SearchOptions,
        *,
        filter: Any = None,
        exclude_ids: Collection[str] = (),
    ) -> Sequence[Candidates]:
        """What each query may choose from; the same object for queries that choose from the same.

        Args:
            queries: The queries.
            model: The model that searches.
            options: How it searches.
            filter: Which chunks are candidates.
            exclude_ids: Chunks that are never taken.

        Raises:
            InvalidInputError: If there are no chunks, or the filter is malformed.
        """

    def add(self, *_: Any, **__: Any) -> list[str]:
        """Add chunks, where the corpus is this package's own.

        Raises:
            InvalidInputError: If it is not.
        """
        raise InvalidInputError(self._not_ours("Add chunks to"))

    def delete(self, ids: Iterable[str]) -> None:  # noqa: ARG002
        """Remove chunks; errors as `add`."""
        raise InvalidInputError(self._not_ours("Delete chunks from"))

    def save(self, path: str | Path) -> None:  # noqa: ARG002
        """Write it to a folder; errors as `add`."""
        raise InvalidInputError(self._not_ours("Save"))

    def _not_ours(self, action: str) -> str:
        return (
            f"{self!r} only reads what it is given. {action} what lies behind it, or use a "
            "ChunkIndex, which from_documents makes."
        )
