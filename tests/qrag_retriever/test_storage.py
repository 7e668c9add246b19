from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, vectors_of
from langchain_core.documents import Document
from llama_index.core.schema import IndexNode, TextNode
from test_chunk import NODES

from qrag_retriever.chunk import Chunk
from qrag_retriever.chunk_store import StoredChunks
from qrag_retriever.errors import (
    FingerprintMismatchError,
    IndexFormatError,
    InvalidInputError,
)
from qrag_retriever.index import ChunkIndex
from qrag_retriever.nodes import node_from_chunk

KINDS = ("chunks", "offsets", "ids", "embeddings")


def make(*texts: str) -> ChunkIndex:
    return ChunkIndex.from_texts(texts, [{"n": n} for n in range(len(texts))], model=FakeModel())


def texts_in(folder: Path) -> list[str]:
    snapshot = ChunkIndex.load(folder, model=FakeModel(), verify=True).snapshot()
    texts = [chunk.text for chunk in snapshot.chunks]
    assert np.array_equal(snapshot.embeddings, vectors_of(texts))
    return texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("first", "second", "third").save(tmp_path / "index")
    return tmp_path / "index"


def file_of(folder: Path, kind: str) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    return folder / manifest["files"][kind]["name"]


def test_all_kinds_of_items_come_back_without_embedding(tmp_path: Path) -> None:
    items = [
        "text",
        "",
        "lone surrogate \udc80, separator \u2028, emoji 😀",
        Document("d", id="d", metadata={"deep": {"a": [1, 2.5, None, True, "é"]}}),
        *NODES,
    ]
    model = FakeModel()
    index = ChunkIndex.from_documents(items, model=model)
    index.save(str(tmp_path / "new" / "folder"))
    model.encoded.clear()
    loaded = ChunkIndex.load(str(tmp_path / "new" / "folder"), model=model)
    before, after = index.snapshot(), loaded.snapshot()
    assert isinstance(after.chunks, StoredChunks)
    assert list(after.chunks) == list(before.chunks)
    assert [node_from_chunk(chunk) for chunk in after.chunks] == [
        node_from_chunk(chunk) for chunk in before.chunks
    ]
    assert np.array_equal(after.embeddings, before.embeddings)
    assert not after.embeddings.flags.writeable
    loaded.add(items[3:])
    assert loaded.snapshot() is after
    loaded.add(["one more"])
    assert model.encoded == ["one more"]
    assert len(loaded) == len(items) + 1


def test_an_empty_index_can_be_saved(tmp_path: Path) -> None:
    ChunkIndex(FakeModel()).save(tmp_path)
    loaded = ChunkIndex.load(tmp_path, model=FakeModel(), verify=True)
    assert len(loaded) == 0
    assert loaded.select({"a": 1}).tolist() == []
    loaded.add(["a"])
    loaded.save(tmp_path)
    assert texts_in(tmp_path) == ["a"]


def test_chunks_with_equal_digests_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrag_retriever.chunk_store._digest", lambda id_: np.uint64(len(id_)))
    index = ChunkIndex.from_texts([*"abcd"], ids=["x", "yy", "z", "ww"], model=FakeModel())
    index.save(tmp_path)
    chunks = ChunkIndex.load(tmp_path, model=FakeModel()).snapshot().chunks
    found = [chunks.find(id_) for id_ in ("x", "yy", "z", "ww", "v", "vv", "vvv", "")]
    assert found == [0, 1, 2, 3, None, None, None, None]


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ({"date": object()}, r"metadata\['date'\] is a object"),
        ({"a": {"b": [1, {2}]}}, r"metadata\['a'\]\['b'\] is a set"),
        ({"a": np.float32(1)}, r"metadata\['a'\] is a float32"),
        ({3: "a"}, "key 3 in metadata is a int"),
    ],
)
def test_metadata_that_is_not_json_is_named_and_nothing_written(
    folder: Path, metadata: dict[Any, Any], where: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    index = make("x", "y")
    index.add([Chunk("culprit", "z", metadata)])
    with pytest.raises(InvalidInputError, match=f"'culprit' cannot be saved: .*{where}"):
        index.save(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InvalidInputError):
        index.save(folder.parent / "other")
    assert not (folder.parent / "other").exists()


def test_tuples_are_saved_as_lists(tmp_path: Path) -> None:
    index = ChunkIndex.from_texts(["a"], [{"box": (1, 2)}], model=FakeModel())
    index.save(tmp_path)
    loaded = ChunkIndex.load(tmp_path, model=FakeModel())
    assert loaded.snapshot().chunks[0].metadata == {"box": [1, 2]}


def test_a_node_with_a_live_object_cannot_be_saved(tmp_path: Path) -> None:
    node = IndexNode(text="t", index_id="i", obj=object())
    index = ChunkIndex.from_documents([node], model=FakeModel())
    with pytest.raises(InvalidInputError, match="object_map"):
        index.save(tmp_path)


def test_a_node_of_an_unknown_class_says_what_to_import(folder: Path) -> None:
    index = ChunkIndex.from_documents([NODES[-1]], model=FakeModel())
    index.save(folder)
    path = file_of(folder, "chunks")
    path.write_bytes(path.read_bytes().replace(b"test_chunk.", b"test_gone_."))
    chunks = ChunkIndex.load(folder, model=FakeModel()).snapshot().chunks
    with pytest.raises(IndexFormatError, match=r"test_gone_\.AnnotatedNode.*Import"):
        chunks[0]


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
    seen_at_load = damage != "flipped" and not (damage == "header" and kind == "chunks")
    with pytest.raises(IndexFormatError, match=r"damaged: .*build the index again"):
        ChunkIndex.load(folder, model=FakeModel(), verify=not seen_at_load)


def test_a_corrupt_record_is_an_error_when_it_is_read(folder: Path) -> None:
    path = file_of(folder, "chunks")
    first = path.read_bytes().index(b"\n")
    path.write_bytes(b"\0" * first + path.read_bytes()[first:])
    chunks = ChunkIndex.load(folder, model=FakeModel()).snapshot().chunks
    assert chunks[1].text == "second"
    with pytest.raises(IndexFormatError, match="Record 0"):
        chunks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not describe a qrag-index"),
        ({"format_version": 2}, "version 2; this release reads 1"),
        ({"count": 2}, r"does not hold int64 \(3,\)"),
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


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "chunks-1.jsonl"])
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"name": "a web app"}')
    with pytest.raises(InvalidInputError, match="left as it is"):
        make("a").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(InvalidInputError, match="left as it is"):
        make("a").save(tmp_path / name)


def test_a_filter_on_a_loaded_index_needs_no_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [TextNode(text=str(n), metadata={"n": n}) for n in range(5)]
    ChunkIndex.from_documents(nodes, model=FakeModel()).save(tmp_path)
    loaded = ChunkIndex.load(tmp_path, model=FakeModel())
    monkeypatch.delattr("qrag_retriever.chunk_store.node_from_record")
    assert loaded.select({"n": {"$gte": 3}}).tolist() == [3, 4]
