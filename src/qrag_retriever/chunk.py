"""A chunk, the unit that is retrieved, and how texts, Documents and nodes become chunks."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qrag_retriever.documents import is_document, read_document
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.nodes import is_node, read_node

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://arxiv.org/abs/2511.07328")


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of text that can be retrieved.

    Attributes:
        id: Unique in its index.
        text: What a reader gets; may be empty.
        metadata: What filters look at. All who hold the chunk share it: do not write into it.
        embed_text: What the encoders read; by default the text. A LlamaIndex node puts those of its
            metadata in front of it that are not excluded from embedding.
        source: The node, or the instance of a subclass of Document, that the chunk came from. It
            supplies what a chunk does not know (class, relationships, excluded keys) when the chunk
            is turned back; otherwise ``None``.

    Raises:
        InvalidInputError: If the id is empty, or an attribute has the wrong type.

    Example:
        >>> Chunk("a", "Mary went to the garden.").embed_text
        'Mary went to the garden.'
    """

    id: str
    text: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    embed_text: str = ""
    source: Any = dataclasses.field(default=None, hash=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise InvalidInputError(f"A chunk's id must be a non-empty string; got {self.id!r}.")
        for name, kind in (("text", str), ("embed_text", str), ("metadata", dict)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise InvalidInputError(
                    f"The {name} of chunk {self.id!r} must be a {kind.__name__}; "
                    f"got {type(value).__name__}."
                )
        if not self.embed_text:
            object.__setattr__(self, "embed_text", self.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate(Chunk):
    """A chunk that another retriever found; ``source`` is what it returned, whatever that was."""


def to_chunks(
    items: Iterable[object],
    *,
    metadatas: Iterable[Mapping[str, Any] | None] | None = None,
    ids: Iterable[str | None] | None = None,
    taken: Callable[[str], bool] = lambda _: False,
) -> list[Chunk]:
    """Turn texts, chunks, LangChain Documents and LlamaIndex nodes, also mixed, into chunks.

    An item without an id gets one made from its text and a number that tells equal texts apart: the
    same calls in the same order give the same ids.

    Args:
        items: What to turn into chunks, in document order.
        metadatas: One mapping (or ``None``) per item; only for items that are plain texts.
        ids: One id (or ``None``) per item; takes the place of the item's own.
        taken: Whether an id is in use elsewhere, so that no generated id repeats it.

    Returns:
        One chunk per item. Nothing the caller does to an item later changes its chunk.

    Raises:
        InvalidInputError: If an item is of another type, an id is given twice, or the lengths of
            items, metadatas and ids differ.

    Example:
        >>> [chunk.id for chunk in to_chunks(["first", "second"], ids=["a", "b"])]
        ['a', 'b']
        >>> first, again = to_chunks(["same", "same"])
        >>> first.id == to_chunks(["same"])[0].id, first.id == again.id
        (True, False)
    """
    given = item_list(items)
    metadata_of = per_item("metadatas", metadatas, len(given))
    id_of = [
        _own_id(item, number) if id_ is None else _checked_id(id_)
        for number, (item, id_) in enumerate(
            zip(given, per_item("ids", ids, len(given)), strict=True)
        )
    ]
    used: set[str] = set()
    for id_ in id_of:
        if id_ in used:
            raise InvalidInputError(
                f"The id {id_!r} is given twice in one call; ids must be unique. "
                "Leave ids out to have them made from the texts."
            )
        if id_ is not None:
            used.add(id_)
    names = _IdMaker(lambda name: name in used or taken(name))
    return [
        _chunk(item, id_, metadata, names)
        for item, id_, metadata in zip(given, id_of, metadata_of, strict=True)
    ]


def item_list(items: Iterable[object]) -> list[object]:
    """What to turn into chunks, as a list; see `to_chunks`.

    Raises:
        InvalidInputError: If it is one item and no list.
    """
    one = isinstance(items, (str, bytes, Mapping, Chunk)) or hasattr(items, "metadata")
    if one or not isinstance(items, Iterable):
        raise InvalidInputError(
            f"Give a list of texts, Documents, nodes or chunks; got one {type(items).__name__}."
        )
    return list(items)


def per_item(name: str, values: Iterable[Any] | None, count: int) -> Sequence[Any]:
    """One value for each of ``count`` items, ``None`` where none are given; see `to_chunks`."""
    if values is None:
        return [None] * count
    listed = isinstance(values, Iterable) and not isinstance(values, (str, Mapping))
    entries = list(values) if listed else None
    if entries is None or len(entries) != count:
        raise InvalidInputError(
            f"{name} must be a list with one entry per item: {count} here; "
            f"got {type(values).__name__ if entries is None else len(entries)}."
        )
    return entries


class _IdMaker:
    """Stable ids: made from the text and the smallest number that gives one not taken yet."""

    def __init__(self, taken: Callable[[str], bool]) -> None:
        self._taken = taken
        self._next: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        while True:
            number = self._next.get(digest, 0)
            self._next[digest] = number + 1
            name = str(uuid.uuid5(_NAMESPACE, f"{digest}/{number}"))
            if not self._taken(name):
                return name


def _own_id(item: object, number: int) -> str | None:
    if isinstance(item, str):
        return None
    if isinstance(item, Chunk):
        return item.id
    if is_document(item):
        return item.id or None
    if is_node(item):
        return item.node_id
    raise InvalidInputError(
        f"Item {number} is of type {type(item).__name__}; give str, qrag_retriever Chunk, "
        "LangChain Document or LlamaIndex node."
    )


def _chunk(item: Any, id_: str | None, metadata: Mapping[str, Any] | None, ids: _IdMaker) -> Chunk:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise InvalidInputError(f"metadatas holds {metadata!r}; give a dict, or None, for each.")
    if isinstance(item, str):
        return Chunk(id_ or ids(item), item, copy.deepcopy(dict(metadata or {})))
    if metadata is not None:
        raise InvalidInputError(
            f"metadatas is for plain texts; a {type(item).__name__} brings its own metadata."
        )
    if isinstance(item, Candidate):
        return _chunk(item.source, id_ or item.id, None, ids)
    if isinstance(item, Chunk):
        return dataclasses.replace(item, id=id_ or item.id, metadata=copy.deepcopy(item.metadata))
    if is_document(item):
        return Chunk(id_ or ids(item.page_content), **read_document(item))
    return Chunk(id_ or item.node_id, **read_node(item))


def _checked_id(id_: object) -> str:
    if not isinstance(id_, str) or not id_:
        raise InvalidInputError(f"ids must be non-empty strings (or None); got {id_!r}.")
    return id_
