"""Saves that are cut short, several writers, and readers in other threads and processes."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, vectors_of
from stored_index import make, texts_in

from qrag_retriever import storage
from qrag_retriever.errors import IndexFormatError
from qrag_retriever.index import ChunkIndex

FILES = 2  # of one generation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("first", "second", "third").save(tmp_path / "index")
    return tmp_path / "index"


class Killed(BaseException):
    """Like a kill: no handler of ordinary errors sees it."""


def operations(monkeypatch: pytest.MonkeyPatch, fatal: int) -> list[str]:
    """Make the `fatal`-th file operation, and all after it, fail; returns those done."""
    done: list[str] = []

    def deadly(name: str, operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) >= fatal:
                raise Killed
            done.append(name)
            return operation(*args, **kwargs)

        return call

    class Connection(sqlite3.Connection):
        executescript = deadly("executescript", sqlite3.Connection.executescript)
        execute = deadly("execute", sqlite3.Connection.execute)
        commit = deadly("commit", sqlite3.Connection.commit)

        def executemany(self, query: str, rows: Any) -> Any:
            insert = deadly("insert", lambda row: row)
            return super().executemany(query, map(insert, rows))

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3,
        "connect",
        deadly("connect", lambda *args, **kw: connect(*args, **kw, factory=Connection)),
    )
    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (Path, "open"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (builtins, "open"),
        (np, "save"),
    ):
        monkeypatch.setattr(owner, name, deadly(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("old", [None, ["old", "older"]])
def test_a_save_cut_short_anywhere_leaves_the_old_or_the_new_index(
    tmp_path: Path, old: list[str] | None
) -> None:
    index = make("new", "newer", "newest")
    outcomes = []
    for fatal in range(1000):
        folder = tmp_path / str(fatal)
        if old is not None:
            make(*old).save(folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            done = operations(monkeypatch, fatal)
            try:
                index.save(folder)
                complete = True
            except Killed:
                complete = False
        if old is None and not (folder / "manifest.json").exists():
            outcomes.append(None)
            with pytest.raises(IndexFormatError, match="There is no index"):
                ChunkIndex.load(folder, model=FakeModel())
        else:
            outcomes.append(texts_in(folder))
        make("next").save(folder)
        assert texts_in(folder) == ["next"]
        assert len(list(folder.glob("*-*"))) == FILES
        if complete:
            break
    assert {"connect", "insert", "commit", "save", "open", "fsync", "replace"} <= set(done)
    commit = outcomes.index(["new", "newer", "newest"])
    assert done.count("insert") == 3
    assert 15 < commit < len(outcomes)
    assert outcomes == [old] * commit + [["new", "newer", "newest"]] * (len(outcomes) - commit)


@pytest.mark.parametrize("kind", ["chunks", "embeddings"])
def test_an_ordinary_error_leaves_no_half_written_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    connect = sqlite3.connect

    class Small(sqlite3.Connection):
        def executescript(self, script: str) -> Any:
            return super().executescript(script + "PRAGMA max_page_count = 50;")

    def full(path: Path, array: Any, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if kind == "chunks":
        monkeypatch.setattr(sqlite3, "connect", lambda *a, **kw: connect(*a, **kw, factory=Small))
    else:
        monkeypatch.setattr(np, "save", full)
    index = make(*(str(n) * 200 for n in range(3000)))
    with pytest.raises(OSError, match=r"cannot be written.*disk is full|No space"):
        index.save(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_model import FakeModel
from qrag_retriever.index import ChunkIndex

model = FakeModel()
texts = [[f"{name} {i}" for i in range(3000)] for name in "ab"]
indexes = [ChunkIndex.from_texts(some, model=model) for some in texts]
while True:
    for index in indexes:
        index.save(sys.argv[2], overwrite=True)  # each undoes what the other saved
        print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize(
    ("files", "count"), [("*", 0), ("chunks-*", 2), ("embeddings-*", 2), ("*.tmp", 1)]
)
def test_a_writer_that_is_killed_leaves_a_whole_index(
    tmp_path: Path, saves: int, files: str, count: int
) -> None:
    folder = tmp_path / "index"
    arguments = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        for _ in range(saves):
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"saved\n"
        while len([*folder.glob(files)]) < count:  # a later save has come so far
            assert writer.poll() is None
        writer.kill()
    texts = texts_in(folder)
    assert texts in ([f"{name} {i}" for i in range(3000)] for name in "ab")
    make("next").save(folder)  # the lock died with its owner
    assert texts_in(folder) == ["next"]
    assert len(list(folder.glob("*-*"))) == FILES


def read_many(folder: str) -> set[str]:
    """Load again and again; the names of the indexes seen, each of which was whole."""
    names = set()
    for _ in range(60):
        texts = texts_in(Path(folder))
        name = texts[0].split()[0]
        assert texts == [f"{name} {i}" for i in range(len(texts))]
        names.add(name)
    return names


def test_readers_in_other_processes_always_see_a_whole_index(tmp_path: Path) -> None:
    indexes = [make(*(f"{name} {i}" for i in range(40))) for name in "ab"]
    indexes[0].save(tmp_path)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        reads = [pool.submit(read_many, str(tmp_path)) for _ in range(2)]
        while not all(read.done() for read in reads):
            for index in indexes:
                index.save(tmp_path, overwrite=True)
        assert set.union(*(read.result() for read in reads)) == {"a", "b"}


@pytest.mark.skipif(os.name != "posix", reason="no lock elsewhere")
def test_a_second_writer_waits_for_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, second = storage.sync_folder, threading.Thread(target=make("b").save, args=[folder])

    def start_second(path: Path) -> None:  # all files of the first are written, none is committed
        monkeypatch.setattr(storage, "sync_folder", original)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        original(path)

    monkeypatch.setattr(storage, "sync_folder", start_second)
    make("a").save(folder)
    second.join()
    assert texts_in(folder) == ["b"]


def test_cleaning_up_removes_nothing_it_is_not_sure_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, reads = Path.read_bytes, []

    def read_once(self: Path) -> bytes:
        reads.append(self)
        if len(reads) > 1:
            raise PermissionError(13, "Permission denied")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_once)
        make("new").save(folder)
    assert len(reads) == 2
    assert texts_in(folder) == ["new"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Path, "stat"),
        (storage, "_crc32"),
        (np, "load"),
        (storage, "StoredChunks"),
        (sqlite3, "connect"),
    ],
)
def test_a_reader_overtaken_by_a_writer_reads_the_new_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    original, overtaken = getattr(owner, name), []
    newer = make("newer")

    def overtake(*args: Any, **kwargs: Any) -> Any:
        if not overtaken:
            overtaken.append(True)
            newer.save(folder)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, overtake)
    assert texts_in(folder) == ["newer"]
    assert overtaken


def test_a_loaded_index_outlives_its_files(folder: Path) -> None:
    loaded = ChunkIndex.load(folder, model=FakeModel())
    make("other").save(folder)
    texts: list[list[str]] = []
    thread = threading.Thread(
        target=lambda: texts.append([chunk.text for chunk in loaded.snapshot().chunks])
    )
    thread.start()
    thread.join()
    assert texts == [["first", "second", "third"]]
    assert loaded.snapshot().row_of(loaded.snapshot().chunks[1].id) == 1
    assert np.array_equal(loaded.snapshot().embeddings, vectors_of(texts[0]))
    loaded.save(folder, overwrite=True)
    assert texts_in(folder) == ["first", "second", "third"]


def loaded_texts(start: int) -> list[str]:
    chunks = LOADED.snapshot().chunks
    texts = [chunks[row % len(chunks)].text for row in range(start, start + 200)]
    assert chunks._process == os.getpid()  # whose connection it is; SQLite forbids a parent's
    return texts


LOADED: ChunkIndex


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("replaced", [False, True])
def test_forked_processes_share_a_loaded_index(tmp_path: Path, replaced: bool) -> None:
    global LOADED  # noqa: PLW0603 (fork passes it on)
    texts = [f"text {i}" * 50 for i in range(300)]
    make(*texts).save(tmp_path)
    LOADED = ChunkIndex.load(tmp_path, model=FakeModel())
    assert loaded_texts(0) == texts[:200]
    if replaced:
        make("other").save(tmp_path)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        results = [pool.submit(loaded_texts, start) for start in range(0, 300, 50)]
        assert loaded_texts(0) == texts[:200]
        for start, result in zip(range(0, 300, 50), results, strict=True):
            assert result.result() == (texts * 2)[start : start + 200]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_may_come_while_threads_read_and_save(tmp_path: Path) -> None:
    global LOADED  # noqa: PLW0603
    make(*map(str, range(5000))).save(tmp_path / "index")
    LOADED = ChunkIndex.load(tmp_path / "index", model=FakeModel())
    done = threading.Event()

    def keep(busy: Any) -> None:
        while not done.is_set():
            busy()

    def read_by_row() -> None:
        assert loaded_texts(100) == [str(n) for n in range(100, 300)]

    tasks = [read_by_row, lambda: [*LOADED.snapshot().chunks], lambda: LOADED.save(tmp_path / "o")]
    threads = [threading.Thread(target=keep, args=[task]) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = multiprocessing.get_context("fork").Process(target=read_by_row)
            child.start()
            child.join(30)
            child.kill()
            assert child.exitcode == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()
