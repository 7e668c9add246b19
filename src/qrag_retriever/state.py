"""A state as token ids: the query and the chunks found so far, ``[CLS] q [SEP] c … [SEP]``.

Parts are joined as token ids, never as text, so a chunk that contains the separator's text opens no
part of its own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qrag_retriever.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Special tokens and limits of a state.

    Attributes:
        prefix: Special tokens in front of a single text (``[CLS]``).
        suffix: Special tokens behind a single text (``[SEP]``).
        separator: Token between two parts.
        window: Most tokens of a state, special tokens included.
        query_limit: Most tokens of the query, ``prefix`` and ``suffix`` counted in.
        chunk_limit: Most tokens of each chunk, counted in the same way.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: int
    window: int
    query_limit: int | None = None
    chunk_limit: int | None = None

    def build(
        self, query: Sequence[int], chunks: Sequence[Sequence[int]]
    ) -> tuple[list[int], bool]:
        """Join a query and chunks into one input.

        Each part is cut to its own limit first. Only if the whole is still longer than the window
        are its longest parts shortened evenly; the query is never dropped. Where not even one
        token a chunk has room, the first chunks are left out.

        Args:
            query: Token ids of the query, without special tokens.
            chunks: Token ids of the chunks in the order of the state.

        Returns:
            The token ids, at most ``window``, and whether the window made them shorter.
        """
        specials = len(self.prefix) + len(self.suffix)
        most_chunks = (self.window - specials - 1) // 2
        fits = len(chunks) <= most_chunks
        kept = chunks if fits else chunks[len(chunks) - most_chunks :]
        parts = [query[: _content(self.query_limit, specials)]]
        parts += [chunk[: _content(self.chunk_limit, specials)] for chunk in kept]
        lengths = [len(part) for part in parts]
        limits = shorten_evenly(lengths, self.window - specials - len(kept))
        ids = list(self.prefix)
        for number, (part, limit) in enumerate(zip(parts, limits, strict=True)):
            if number:
                ids.append(self.separator)
            ids.extend(part[:limit])
        ids.extend(self.suffix)
        return ids, not fits or limits != lengths


def in_state_order(
    retrieved: Iterable[int], order: str, place: Callable[[int], int] | None = None
) -> list[int]:
    """Retrieved chunks as a state lists them.

    Args:
        retrieved: Their numbers, in the order of retrieval.
        order: ``"document"`` or ``"retrieval"``.
        place: Tells where in the document a chunk is; ``None``: its number does.

    Example:
        >>> in_state_order([5, 2, 9], "document"), in_state_order([5, 2, 9], "retrieval")
        ([2, 5, 9], [5, 2, 9])
    """
    return sorted(retrieved, key=place) if order == "document" else list(retrieved)


def shorten_evenly(lengths: Sequence[int], budget: int) -> list[int]:
    """Cut the longest of several lengths to a common limit until their sum fits.

    Args:
        lengths: Lengths of the parts.
        budget: Most the parts may have together; at least their number.

    Returns:
        New lengths: unchanged below the limit, the limit (for the longest few one more) above it.

    Example:
        >>> shorten_evenly([3, 50, 80], budget=40)
        [3, 18, 19]
    """
    if sum(lengths) <= budget:
        return list(lengths)
    result = [0] * len(lengths)
    left = budget
    by_length = sorted(range(len(lengths)), key=lambda part: (lengths[part], -part))
    for done, part in enumerate(by_length):
        share = left // (len(lengths) - done)
        result[part] = min(lengths[part], share)
        left -= result[part]
    return result


def check_query(query: object) -> None:
    """Refuse a query that is empty, no text or not valid Unicode.

    Raises:
        InvalidInputError: If it is.
    """
    if not isinstance(query, str):
        raise InvalidInputError(f"A query is a str, not {type(query).__name__}.")
    if not query.strip():
        raise InvalidInputError("The query is empty; give a question.")
    _check_unicode(query, "The query")


def check_chunks(texts: Sequence[object]) -> None:
    """Refuse chunks that are no texts or not valid Unicode.

    Raises:
        InvalidInputError: If one is, or a single text stands for the list of them.
    """
    if isinstance(texts, str):
        raise InvalidInputError("Chunks are a list of str, not a single str; put it in a list.")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidInputError(f"A chunk is a str, not {type(text).__name__}.")
        _check_unicode(text, "A chunk")


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[max(error.start - 20, 0) : error.end + 20])
        raise InvalidInputError(
            f"{what} is not valid Unicode ({error.reason} in {shown}), as text taken from a PDF "
            "can be; clean it, for example with text.encode('utf-8', 'replace').decode()."
        ) from error


def _content(limit: int | None, specials: int) -> int | None:
    return None if limit is None else max(limit - specials, 1)
