"""Small saved indexes, read back or tampered with."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fake_model import FakeModel, vectors_of

from qrag_retriever.index import ChunkIndex


def make(*texts: str) -> ChunkIndex:
    return ChunkIndex.from_texts(texts, [{"n": n} for n in range(len(texts))], model=FakeModel())


def texts_in(folder: Path) -> list[str]:
    snapshot = ChunkIndex.load(folder, model=FakeModel(), verify=True).snapshot()
    texts = [chunk.text for chunk in snapshot.chunks]
    assert np.array_equal(snapshot.embeddings, vectors_of(texts))
    return texts


def file_of(folder: Path, kind: str) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    return folder / manifest["files"][kind]["name"]


@contextlib.contextmanager
def database(folder: Path) -> Iterator[sqlite3.Connection]:
    """The chunks of a saved index, to be tampered with; their size stays as it was."""
    with contextlib.closing(sqlite3.connect(file_of(folder, "chunks"))) as connection, connection:
        yield connection
