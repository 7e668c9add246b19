"""Saves that are cut short, several writers, and readers in other threads and processes."""

from __future__ import annotations

import builtins
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, vectors_of

from qrag_retriever import storage
from qrag_retriever.errors import IndexFormatError
from qrag_retriever.index import ChunkIndex

FILES = 4  # of one generation


def make(*texts: str) -> ChunkIndex:
    return ChunkIndex.from_texts(texts, model=FakeModel())


def texts_in(folder: Path) -> list[str]:
    snapshot = ChunkIndex.load(folder, model=FakeModel(), verify=True).snapshot()
    texts = [chunk.text for chunk in snapshot.chunks]
    assert np.array_equal(snapshot.embeddings, vectors_of(texts))
    return texts


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

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (os, "unlink"),
        (Path, "open"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (builtins, "open"),
        (storage._Checked, "write"),
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
    assert {"replace", "fsync", "open", "write"} <= set(done)
    commit = outcomes.index(["new", "newer", "newest"])
    assert 10 < commit < len(outcomes)
    assert outcomes == [old] * commit + [["new", "newer", "newest"]] * (len(outcomes) - commit)


def test_an_ordinary_error_leaves_no_half_written_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.iterdir())

    def full(self: Any, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage._Checked, "write", full)
    with pytest.raises(OSError, match="No space"):
        make("new").save(folder)
    assert sorted(folder.iterdir()) == before


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_model import FakeModel
from qrag_retriever.index import ChunkIndex

model = FakeModel()
indexes = [ChunkIndex.from_texts([f"{name} {i}" for i in range(50)], model=model) for name in "ab"]
while True:
    for index in indexes:
        index.save(sys.argv[2])
        print("saved", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.parametrize("saves", [1, 2, 5, 6])
def test_a_writer_that_is_killed_leaves_a_whole_index(tmp_path: Path, saves: int) -> None:
    arguments = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path / "index")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        for _ in range(saves):
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"saved\n"
        writer.kill()
    texts = texts_in(tmp_path / "index")
    assert texts in ([f"{name} {i}" for i in range(50)] for name in "ab")
    make("next").save(tmp_path / "index")  # the lock died with its owner
    assert texts_in(tmp_path / "index") == ["next"]


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
                index.save(tmp_path)
        assert set.union(*(read.result() for read in reads)) == {"a", "b"}


@pytest.mark.skipif(os.name != "posix", reason="no lock elsewhere")
def test_a_second_writer_waits_for_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, second = storage._sync_folder, threading.Thread(target=make("b").save, args=[folder])

    def start_second(path: Path) -> None:  # all files of the first are written, none is committed
        monkeypatch.setattr(storage, "_sync_folder", original)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        original(path)

    monkeypatch.setattr(storage, "_sync_folder", start_second)
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


@pytest.mark.parametrize("stage", ["stat", "map", "header"])
def test_a_reader_overtaken_by_a_writer_reads_the_new_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    owner, name = {
        "stat": (storage, "_read_manifest"),
        "map": (storage, "_map"),
        "header": (np, "load"),
    }[stage]
    original, overtaken = getattr(owner, name), []

    def overtake(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not overtaken:
            overtaken.append(True)
            make("newer").save(folder)
        return result

    monkeypatch.setattr(owner, name, overtake)
    assert texts_in(folder) == ["newer"]


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
    assert loaded.row_of(loaded.snapshot().chunks[1].id) == 1
    assert np.array_equal(loaded.snapshot().embeddings, vectors_of(texts[0]))
    loaded.save(folder)
    assert texts_in(folder) == ["first", "second", "third"]


def loaded_texts(start: int) -> list[str]:
    return [LOADED.snapshot().chunks[row % len(LOADED)].text for row in range(start, start + 200)]


LOADED: ChunkIndex


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_share_a_loaded_index(tmp_path: Path) -> None:
    global LOADED  # noqa: PLW0603 (fork passes it on)
    texts = [f"text {i}" * 50 for i in range(300)]
    make(*texts).save(tmp_path)
    LOADED = ChunkIndex.load(tmp_path, model=FakeModel())
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        results = [pool.submit(loaded_texts, start) for start in range(0, 300, 50)]
        assert loaded_texts(0) == texts[:200]
        for start, result in zip(range(0, 300, 50), results, strict=True):
            assert result.result() == (texts * 2)[start : start + 200]
