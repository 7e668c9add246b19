"""The chunks of an index as immutable sequences, in memory or read from a saved index.

A record is one line of JSON: id, text, metadata and, where they say more, the embedded text and the
node.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import IndexFormatError, InvalidInputError
from qrag_retriever.nodes import is_node, node_from_record, node_to_record

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    from numpy.typing import NDArray


class ChunkSequence(Sequence[Chunk]):
    """Chunks in document order, found by row or by id; never changes."""

    @abstractmethod
    def find(self, id_: str) -> int | None:
        """Row of the chunk with an id, ``None`` if there is none."""

    @abstractmethod
    def metadatas(self) -> Iterator[dict[str, Any]]:
        """The metadata of every chunk in order, without making the chunks."""

    @abstractmethod
    def records(self) -> Iterator[bytes]:
        """Every chunk in order as a line of JSON.

        Raises:
            InvalidInputError: If a chunk holds something that is not JSON.
        """


class MemoryChunks(ChunkSequence):
    """Chunks in memory.

    A sequence made by :meth:`extended` shares its storage with the one it came from, which goes on
    to see its own chunks only. What the shared dicts say is checked against the row they name, so
    an entry for a row beyond this sequence, or one left by an interrupted call, does no harm.
    """

    def __init__(self, chunks: Iterable[Chunk] = ()) -> None:
        self._items: list[Chunk] = []
        self._rows: dict[str, int] = {}
        self._texts: dict[str, int] = {}
        self._count = 0
        self._count = len(self.extended(chunks))

    def extended(self, chunks: Iterable[Chunk]) -> MemoryChunks:
        """A sequence with more chunks at the end; only for the newest of those that share."""
        del self._items[self._count :]
        for chunk in chunks:
            self._rows[chunk.id] = len(self._items)
            self._texts[chunk.embed_text] = len(self._items)
            self._items.append(chunk)
        longer = copy.copy(self)
        longer._count = len(self._items)  # noqa: SLF001 (our own class)
        return longer

    def find(self, id_: str) -> int | None:
        """Row of the chunk with an id, ``None`` if there is none."""
        row = self._rows.get(id_, self._count)
        return row if row < self._count and self._items[row].id == id_ else None

    def find_text(self, embed_text: str) -> int | None:
        """Row of a chunk whose embedding is that of a text, ``None`` if there is none."""
        row = self._texts.get(embed_text, self._count)
        return row if row < self._count and self._items[row].embed_text == embed_text else None

    def metadatas(self) -> Iterator[dict[str, Any]]:
        """The metadata of every chunk in order."""
        return (chunk.metadata for chunk in self)

    def records(self) -> Iterator[bytes]:
        """Every chunk in order as a line of JSON."""
        return map(_record, self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Chunk]:
        return itertools.islice(self._items, self._count)

    @overload
    def __getitem__(self, row: int) -> Chunk: ...
    @overload
    def __getitem__(self, row: slice) -> list[Chunk]: ...
    def __getitem__(self, row: int | slice) -> Chunk | list[Chunk]:
        rows = range(self._count)[row]
        return self._items[rows] if isinstance(rows, int) else [self._items[i] for i in rows]


class StoredChunks(ChunkSequence):
    """Chunks of a saved index, read from mapped files when asked for.

    The maps hold on to their files: threads and forked processes share them, and a writer that
    replaces the index does not disturb them.

    Args:
        lines: All records, one after the other.
        offsets: Where record ``i`` begins and, at ``i + 1``, ends; int64 ``[N + 1]``.
        table: The result of :func:`id_table` for these chunks; uint64 ``[2, N]``.
        path: Where they come from, for error messages.
    """

    def __init__(
        self,
        lines: mmap.mmap | bytes,
        offsets: NDArray[np.int64],
        table: NDArray[np.uint64],
        path: Path,
    ) -> None:
        self._lines = lines
        self._offsets = offsets
        self._table = table
        self._path = path

    def find(self, id_: str) -> int | None:
        """Row of the chunk with an id, ``None`` if there is none."""
        digests, rows = self._table
        digest = _digest(id_)
        for place in range(int(np.searchsorted(digests, digest)), len(digests)):
            if digests[place] != digest:
                break
            row = int(rows[place])
            if self._values(row)["id"] == id_:
                return row
        return None

    def metadatas(self) -> Iterator[dict[str, Any]]:
        """The metadata of every chunk in order, without making the chunks."""
        return (self._values(row)["metadata"] for row in range(len(self)))

    def records(self) -> Iterator[bytes]:
        """Every chunk in order as a line of JSON."""
        return map(self._record, range(len(self)))

    def _record(self, row: int) -> bytes:
        return self._lines[int(self._offsets[row]) : int(self._offsets[row + 1])]

    def _values(self, row: int) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(self._record(row).decode("utf-8", "surrogatepass"))
            if {"id", "text", "metadata"} <= values.keys():
                return values
        except (ValueError, TypeError, AttributeError, IndexError):
            pass
        raise IndexFormatError(
            f"Record {row} of the index in {self._path} is corrupt. Restore the folder from a copy "
            "or build the index again."
        )

    def _chunk(self, row: int) -> Chunk:
        values = self._values(row)
        if "node" in values:
            node = node_from_record(values.pop("node"), values["id"], values["metadata"])
            return Chunk(**values, source=node)
        return Chunk(**values)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[Chunk]:
        return map(self._chunk, range(len(self)))

    @overload
    def __getitem__(self, row: int) -> Chunk: ...
    @overload
    def __getitem__(self, row: slice) -> list[Chunk]: ...
    def __getitem__(self, row: int | slice) -> Chunk | list[Chunk]:
        rows = range(len(self))[row]
        return self._chunk(rows) if isinstance(rows, int) else [self._chunk(i) for i in rows]


def id_table(ids: Iterable[str]) -> NDArray[np.uint64]:
    """What :class:`StoredChunks` finds ids with: sorted digests and the rows they are of."""
    digests = np.fromiter(map(_digest, ids), dtype=np.uint64)
    order = np.argsort(digests, kind="stable")
    return np.stack([digests[order], order.astype(np.uint64)])


def _digest(id_: str) -> np.uint64:
    data = hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(data, "little"))


def _record(chunk: Chunk) -> bytes:
    _require_json(chunk.metadata, chunk.id, "metadata")
    values = {"id": chunk.id, "text": chunk.text, "metadata": chunk.metadata}
    if chunk.embed_text != chunk.text:
        values["embed_text"] = chunk.embed_text
    if is_node(chunk.source):
        values["node"] = node_to_record(chunk.source)
        _require_json(values["node"], chunk.id, "node")
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _require_json(value: object, id_: str, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise InvalidInputError(
                    f"Chunk {id_!r} cannot be saved: the key {key!r} in {where} is a "
                    f"{type(key).__name__}; keys must be strings."
                )
            _require_json(entry, id_, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _require_json(entry, id_, where)
    elif not isinstance(value, (str, int, float, type(None))):  # bool is an int
        raise InvalidInputError(
            f"Chunk {id_!r} cannot be saved: {where} is a {type(value).__name__}. Convert it to "
            "a string, number, bool, None, list or dict."
        )
