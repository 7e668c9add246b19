"""Saved indexes that are damaged, incomplete, or of something else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stored_index import database, file_of, make

from qrag_retriever.errors import (
    FingerprintMismatchError,
    IndexFormatError,
)
from qrag_retriever.index import ChunkIndex

KINDS = ("chunks", "embeddings")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("first", "second", "third").save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "flipped", "header"])
def test_damaged_files_are_found(folder: Path, kind: str, damage: str) -> None:
    path = file_of(folder, kind)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(data) - 5
        path.write_bytes(
            {
                "truncated": data[:-1],
                "longer": data + b"\0",
                "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
                "header": b"#" * 12 + data[12:],
            }[damage]
        )
    with pytest.raises(IndexFormatError, match=r"damaged: .*build the index again"):
        ChunkIndex.load(folder, model=FakeModel(), verify=damage == "flipped")


@pytest.mark.parametrize("kind", ["chunks", "embeddings", "scales", "ann"])
def test_verifying_reads_every_file(tmp_path: Path, kind: str) -> None:
    texts = [f"{n} apples" for n in range(40)]
    ChunkIndex.from_texts(texts, model=FakeModel(), ann="hnsw", dtype="int8").save(tmp_path)
    path = file_of(tmp_path, kind)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IndexFormatError, match=rf"{path.name} does not match its checksum"):
        ChunkIndex.load(tmp_path, model=FakeModel(), verify=True)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("metadata", "'{'"),
        ("metadata", "'[]'"),
        ("metadata", "x'ff'"),
        ("metadata", "CAST(x'ff' AS TEXT)"),
        ("text", "CAST(x'ff' AS TEXT)"),
        ("text", "x'61'"),
        ("embed_text", "x'61'"),
        ("id", "''"),
        ("node", "'{'"),
        ("node", "'3'"),
        ("node", "'{}'"),
        ("node", """'{"class": "TextNode", "data": 3}'"""),
        ("node", """'{"class": "TextNode", "data": {"text_resource": 3}}'"""),
    ],
)
def test_a_corrupt_chunk_is_an_error_when_it_is_read(folder: Path, column: str, value: str) -> None:
    with database(folder) as connection:
        connection.execute(f"UPDATE chunks SET {column} = {value} WHERE row = 0")
    snapshot = ChunkIndex.load(folder, model=FakeModel()).snapshot()
    assert snapshot.chunks[1].text == "second"
    for read in (lambda: snapshot.chunks[0], lambda: list(snapshot.chunks)):
        with pytest.raises(IndexFormatError, match=r"damaged: chunks-.*build the index again"):
            read()
    if column == "metadata":
        with pytest.raises(IndexFormatError, match=r"damaged: chunks-"):
            snapshot.select({"n": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("DELETE FROM chunks WHERE row = 2", "holds 2 chunks instead of 3"),
        ("UPDATE chunks SET row = 3 WHERE row = 2", "holds 4 chunks instead of 3"),
        ("ALTER TABLE chunks RENAME TO others", "no such table"),
        ("DELETE FROM chunks WHERE row = 1", "missing between 0 and 2"),
        ("ALTER TABLE chunks RENAME COLUMN text TO content", "no such column"),
    ],
)
def test_a_database_of_something_else_is_found(folder: Path, change: str, message: str) -> None:
    with database(folder) as connection:
        connection.execute(change)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["chunks"]["size"] = file_of(folder, "chunks").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexFormatError, match=rf"damaged: chunks-.*{message}.*build the index"):
        list(ChunkIndex.load(folder, model=FakeModel()).snapshot().chunks)


def test_an_id_that_leads_nowhere_is_found(folder: Path) -> None:
    with database(folder) as connection:
        connection.execute("UPDATE chunks SET row = -1 WHERE row = 1")
    snapshot = ChunkIndex.load(folder, model=FakeModel()).snapshot()
    before = make("first", "second", "third").snapshot().chunks
    assert snapshot.row_of(before[2].id) == 2
    with pytest.raises(IndexFormatError, match=r"damaged: chunks-.*is in row -1"):
        snapshot.row_of(before[1].id)


@settings(deadline=None, max_examples=100)
@example(place=3871, damage=b"\x80", by_id=False)  # a byte of the schema
@given(
    place=st.integers(0),
    damage=st.binary(min_size=1, max_size=64) | st.just(bytes(4096)),
    by_id=...,
)
def test_damage_anywhere_is_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, damage: bytes, by_id: bool
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = ChunkIndex.from_texts([f"{n} " * 300 for n in range(60)], model=FakeModel())
    index.save(folder)
    path = file_of(folder, "chunks")
    data = bytearray(path.read_bytes())
    assert len(data) > 10 * 4096
    place %= len(data) - len(damage) + 1
    changed = data[place : place + len(damage)] != damage
    data[place : place + len(damage)] = damage
    path.write_bytes(data)
    with contextlib.nullcontext() if not changed else pytest.raises(IndexFormatError):
        ChunkIndex.load(folder, model=FakeModel(), verify=True)
    with contextlib.suppress(IndexFormatError):
        snapshot = ChunkIndex.load(folder, model=FakeModel()).snapshot()
        if by_id:
            found = {snapshot.chunks.find(chunk.id) for chunk in index.snapshot().chunks}
            assert found <= {None, *range(60)}
        else:
            assert len(list(snapshot.chunks)) == len(list(snapshot.chunks.metadatas())) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not describe a qrag-index"),
        ({"format_version": 2}, "version 2; this release reads 1"),
        ({"count": 2}, r"does not hold float32 \(2, 8\)"),
        ({"dimension": 4}, r"does not hold float32 \(3, 4\)"),
        ({"count": "3"}, "incomplete"),
        ({"ann": "annoy"}, "incomplete"),
        ({"files": {}}, "incomplete"),
        (
            {"files": {kind: {"name": "../x", "size": 1, "crc32": 1} for kind in KINDS}},
            "incomplete",
        ),
    ],
)
def test_a_wrong_manifest_is_found(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(IndexFormatError, match=message):
        ChunkIndex.load(folder, model=FakeModel())


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_not_json_is_found(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(IndexFormatError, match=r"manifest\.json"):
        ChunkIndex.load(folder, model=FakeModel())


def test_no_index_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(IndexFormatError, match="There is no index"):
            ChunkIndex.load(path, model=FakeModel())


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(FingerprintMismatchError, match=r"fingerprint fake; .* has other"):
        ChunkIndex.load(folder, model=FakeModel(fingerprint="other"))
    with pytest.raises(IndexFormatError, match="8 dimensions, the model of 4"):
        ChunkIndex.load(folder, model=FakeModel(dimension=4))
