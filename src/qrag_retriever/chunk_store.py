"""The chunks of an index as immutable sequences: in memory, or in SQLite for a saved index."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import mmap
import os
import sqlite3
import tempfile
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import IndexFormatError, InvalidInputError
from qrag_retriever.nodes import is_node, node_from_record, node_to_record

# id, metadata as JSON, text, embed_text unless it is the text, LlamaIndex node if any as JSON
Record = tuple[str, str, str, str | None, str | None]

# metadata goes first: a filter then need not step over long texts to get at it
_COLUMNS = "id, metadata, text, embed_text, node"
# no one reads a new file before it is whole, and one that was cut short is thrown away
_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA temp_store = MEMORY;
CREATE TABLE chunks (
    row INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    metadata TEXT NOT NULL,
    text TEXT NOT NULL,
    embed_text TEXT,
    node TEXT
);
"""
_MOST_BYTES = 900_000_000  # SQLite takes 10**9 in a row, some of which it needs itself
_AT_ONCE = 1000  # rows read or written by one query when there are many

# Whatever SQLite does, closing included, it does under one lock. A fork waits for it: the child
# would never get a lock, ours or one inside SQLite, that another thread held at that moment.
_LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release
    )


class ChunkSequence(Sequence[Chunk]):
    """Chunks in document order, found by row or by id; never changes."""

    @abstractmethod
    def find(self, id_: str) -> int | None:
        """Row of the chunk with an id, ``None`` if there is none."""

    @abstractmethod
    def metadatas(self) -> Iterator[dict[str, Any]]:
        """The metadata of every chunk in order, without making the chunks."""

    @abstractmethod
    def records(self) -> Iterable[Record]:
        """Every chunk in order as :func:`write_chunks` takes it.

        Raises:
            InvalidInputError: If a chunk holds something that cannot be saved.
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

    def records(self) -> Iterable[Record]:
        """Every chunk in order as :func:`write_chunks` takes it."""
        return [_record(chunk) for chunk in self]

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
    """Chunks of a saved index, read from SQLite when asked for.

    The file never changes, a writer that replaces the index makes another one. Threads, processes
    and forked processes read it without locking it, and go on when a writer has removed it.

    Args:
        path: The database that :func:`write_chunks` made.
        count: How many chunks it must hold.

    Raises:
        FileNotFoundError: If there is no such file.
        IndexFormatError: If it holds something else. So do all methods, once they come across it.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._path = path.absolute()
        self._count = count
        with path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._connection = self._connect(self._path)
        self._process = os.getpid()
        ((found,),) = self._read("SELECT ifnull(max(row), -1) + 1 FROM chunks")
        if found != count:
            raise self._damaged(f"it holds {found} chunks instead of {count}")

    def find(self, id_: str) -> int | None:
        """Row of the chunk with an id, ``None`` if there is none."""
        try:
            str.encode(id_)
        except (TypeError, UnicodeEncodeError):  # nothing that could have been saved
            return None
        for (row,) in self._read("SELECT row FROM chunks WHERE id = ?", id_):
            if row not in range(self._count):
                raise self._damaged(f"{id_!r} is in row {row}")
            return int(row)
        return None

    def metadatas(self) -> Iterator[dict[str, Any]]:
        """The metadata of every chunk in order, without making the chunks."""
        rows = range(self._count)
        return (self._parsed(row, text) for row, (text,) in self._select("metadata", rows))

    def records(self) -> Iterable[Record]:
        """Every chunk in order as :func:`write_chunks` takes it."""
        return (record for _, record in self._select(_COLUMNS, range(self._count)))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks(range(self._count))

    @overload
    def __getitem__(self, row: int) -> Chunk: ...
    @overload
    def __getitem__(self, row: slice) -> list[Chunk]: ...
    def __getitem__(self, row: int | slice) -> Chunk | list[Chunk]:
        rows = range(self._count)[row]
        if isinstance(rows, int):
            return next(self._chunks(range(rows, rows + 1)))
        return [*self._chunks(rows)] if rows.step > 0 else [*self._chunks(rows[::-1])][::-1]

    def _chunks(self, rows: range) -> Iterator[Chunk]:
        return itertools.starmap(self._chunk, self._select(_COLUMNS, rows))

    def _chunk(self, row: int, record: Record) -> Chunk:
        id_, metadata_json, text, embed_text, node_json = record
        metadata = self._parsed(row, metadata_json)
        node = None if node_json is None else self._parsed(row, node_json)
        try:
            source = None if node is None else node_from_record(node, id_, metadata)
            return Chunk(id_, text, metadata, embed_text or text, source)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"chunk {row}: {error}") from error

    def _parsed(self, row: int, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (TypeError, ValueError) as error:
            raise self._damaged(f"chunk {row}: {error}") from error
        if not isinstance(value, dict):
            raise self._damaged(f"chunk {row}: {text!r:.50} is not a JSON object")
        return value

    def _select(self, columns: str, rows: range) -> Iterator[tuple[int, Any]]:
        """Rows of the table with their numbers; `rows` must ascend."""
        query = (
            f"SELECT {columns} FROM chunks "  # noqa: S608 (columns are constants)
            "WHERE row BETWEEN ? AND ? AND (row - ?) % ? = 0 ORDER BY row"
        )
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            found = self._read(query, some[0], some[-1], some[0], some.step)
            if len(found) != len(some):
                raise self._damaged(f"chunks are missing between {some[0]} and {some[-1]}")
            yield from zip(some, found, strict=True)

    def _read(self, query: str, *values: str | int) -> list[Any]:
        with _LOCK:
            if self._process != os.getpid():  # a fork must not use its parent's connection
                self._connection = self._connect_again()
                self._process = os.getpid()
            try:
                return self._connection.execute(query, values).fetchall()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise self._damaged(str(error)) from error

    def _connect(self, path: Path) -> sqlite3.Connection:
        try:
            connection = _connect(path, "mode=ro&immutable=1")
        except sqlite3.Error as error:
            path.open("rb").close()  # the usual reasons are an OSError, which says more
            raise self._damaged(str(error)) from error
        weakref.finalize(self, _close, connection)
        return connection

    def _connect_again(self) -> sqlite3.Connection:
        try:
            return self._connect(self._path)
        except FileNotFoundError:  # removed since, but still there for us
            with tempfile.NamedTemporaryFile() as copied:
                copied.write(self._file)
                copied.flush()
                return self._connect(Path(copied.name))

    def _damaged(self, what: str) -> IndexFormatError:
        return damaged(self._path.parent, f"{self._path.name}: {what}")


def write_chunks(path: Path, records: Iterable[Record]) -> None:
    """Make a database of chunks.

    It is on disk, safe from a power failure, only once the caller has synced the file.

    Args:
        path: A file that does not exist.
        records: The chunks in order, see :meth:`ChunkSequence.records`.

    Raises:
        OSError: If that is not possible. What is there then is no database.
    """
    rows = ((row, *record) for row, record in enumerate(records))
    try:
        with contextlib.ExitStack() as stack:
            connection = _connect(path.absolute(), "nolock=1")
            stack.callback(_close, connection)
            with _LOCK:
                connection.executescript(_SCHEMA)
            while some := [*itertools.islice(rows, _AT_ONCE)]:
                with _LOCK:  # not for all of them, readers are waiting
                    connection.executemany("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", some)
            with _LOCK:
                connection.execute("CREATE UNIQUE INDEX ids ON chunks (id)")
                connection.commit()
    except sqlite3.OperationalError as error:
        raise OSError(
            f"{path} cannot be written ({error}). Free some space, or save elsewhere."
        ) from error


def damaged(folder: Path, what: str) -> IndexFormatError:
    """The error for a saved index in which something is wrong."""
    return IndexFormatError(
        f"The index in {folder} is damaged: {what}. Restore the folder from a copy or build the "
        "index again."
    )


def _connect(path: Path, options: str) -> sqlite3.Connection:
    address = f"{path.as_uri()}?{options}"
    with _LOCK:
        return sqlite3.connect(address, uri=True, check_same_thread=False)


def _close(connection: sqlite3.Connection) -> None:
    with _LOCK:
        connection.close()


def _record(chunk: Chunk) -> Record:
    embed_text = None if chunk.embed_text == chunk.text else chunk.embed_text
    node = None
    try:
        _require_json(chunk.metadata, chunk.id, "metadata")
        if is_node(chunk.source):
            values = node_to_record(chunk.source)
            _require_json(values, chunk.id, "node")
            node = _json(values)
        record = (chunk.id, _json(chunk.metadata), chunk.text, embed_text, node)
    except InvalidInputError:
        raise
    except (RecursionError, ValueError) as error:  # holds itself, an integer without end
        raise InvalidInputError(
            f"Chunk {chunk.id!r} cannot be saved: its metadata cannot be written as JSON ({error})."
        ) from error
    try:
        size = sum(len(part.encode()) for part in record if part is not None)
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"Chunk {chunk.id!r} cannot be saved: it is not valid Unicode ({error}). Clean the "
            "text, for example with text.encode('utf-8', 'replace').decode()."
        ) from error
    if size > _MOST_BYTES:
        raise InvalidInputError(
            f"Chunk {chunk.id!r} cannot be saved: it has {size} bytes, more than {_MOST_BYTES}. "
            "Split it."
        )
    return record


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


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
