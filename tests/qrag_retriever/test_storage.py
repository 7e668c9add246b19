from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import IndexNode, TextNode
from stored_index import database, make, texts_in
from test_chunk import NODES

from qrag_retriever.chunk import Chunk
from qrag_retriever.chunk_store import StoredChunks
from qrag_retriever.errors import (
    IndexFormatError,
    InvalidInputError,
)
from qrag_retriever.index import ChunkIndex
from qrag_retriever.nodes import node_from_chunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("first", "second", "third").save(tmp_path / "index")
    return tmp_path / "index"


def test_all_kinds_of_items_come_back_without_embedding(tmp_path: Path) -> None:
    items = [
        "text",
        "",
        "NUL \0, separator \u2028, emoji 😀",
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
    assert loaded.snapshot().select({"a": 1}).tolist() == []
    loaded.add(["a"])
    loaded.save(tmp_path)
    assert texts_in(tmp_path) == ["a"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CHUNKS = st.lists(
    st.builds(
        Chunk, TEXTS.filter(bool), TEXTS, st.dictionaries(TEXTS, JSON, max_size=3), embed_text=TEXTS
    ),
    unique_by=lambda chunk: chunk.id,
    max_size=12,
)
BOUND = st.none() | st.integers(-15, 15)


@settings(deadline=None)
@given(
    chunks=CHUNKS,
    places=st.tuples(BOUND, BOUND, BOUND.filter(lambda step: step != 0)),
    others=st.lists(st.text(max_size=3) | st.integers() | st.none()),
    at_once=st.sampled_from([1, 2, 5, 1000]),
)
def test_a_saved_index_is_read_as_a_list_is(
    tmp_path_factory: pytest.TempPathFactory,
    chunks: list[Chunk],
    places: tuple[int | None, int | None, int | None],
    others: list[Any],
    at_once: int,
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = ChunkIndex(FakeModel())
    index.add(chunks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("qrag_retriever.chunk_store._AT_ONCE", at_once)
        index.save(folder)
        stored = ChunkIndex.load(folder, model=FakeModel(), verify=True).snapshot().chunks
        assert isinstance(stored, StoredChunks)
        assert len(stored) == len(chunks)
        assert list(stored) == list(reversed(stored))[::-1] == chunks
        assert list(stored.metadatas()) == [chunk.metadata for chunk in chunks]
        assert stored[slice(*places)] == chunks[slice(*places)]
        for row in range(-len(chunks), len(chunks)):
            assert stored[row] == chunks[row]
        for row in (len(chunks), -len(chunks) - 1):
            with pytest.raises(IndexError):
                stored[row]
        ids = {chunk.id: row for row, chunk in enumerate(chunks)}
        assert [stored.find(id_) for id_ in [*ids, *others]] == [*map(ids.get, [*ids, *others])]


def test_a_filter_does_not_ask_for_one_chunk_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(*map(str, range(2500))).save(tmp_path)
    index = ChunkIndex.load(tmp_path, model=FakeModel())
    queries, read = [], StoredChunks._read

    def count(self: StoredChunks, query: str, *values: Any) -> Any:
        queries.append(query)
        return read(self, query, *values)

    monkeypatch.setattr(StoredChunks, "_read", count)
    assert index.snapshot().select({"n": {"$gte": 2400}}).tolist() == list(range(2400, 2500))
    assert len(queries) == 3
    assert not any("text" in query for query in queries)
    assert index.snapshot().select(lambda chunk: chunk.metadata["n"] >= 2400).tolist()[0] == 2400
    assert len(queries) == 6


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk("culprit", "\udc80"),
        Chunk("culprit", "text", embed_text="a \ud800"),
        Chunk("culprit", "text", {"a": ["\udfff"]}),
        Chunk("culprit", "text", {"\udfff": 1}),
        Chunk("culprit\udfff", "text"),
    ],
)
def test_text_that_is_not_unicode_is_named_and_nothing_written(folder: Path, chunk: Chunk) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    index = make("x", "y")
    index.add([chunk])
    for target in (folder, folder.parent / "other"):
        with pytest.raises(InvalidInputError, match=r"'culprit.*not valid Unicode.*Clean the text"):
            index.save(target)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not (folder.parent / "other").exists()


def test_a_chunk_that_is_too_long_is_named_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qrag_retriever.chunk_store._MOST_BYTES", 20)
    index = ChunkIndex.from_texts(["é" * 10], ids=["long"], model=FakeModel())
    with pytest.raises(InvalidInputError, match=r"'long' cannot be saved: it has 26 bytes.*20"):
        index.save(tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("a?mode=memory&b#c%20 'é\"")
    make("a").save(folder)
    loaded = ChunkIndex.load(folder, model=FakeModel())
    monkeypatch.chdir("/")
    assert [chunk.text for chunk in loaded.snapshot().chunks] == ["a"]
    assert sorted(path.name[:5] for path in (tmp_path / folder).iterdir()) == [
        ".lock",
        "chunk",
        "embed",
        "manif",
    ]
    assert len(list(tmp_path.iterdir())) == 1


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
    with pytest.raises(InvalidInputError, match=f"'culprit' cannot be saved: .*{where}") as told:
        index.save(folder)
    assert str(told.value).count("cannot be saved") == 1
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
    with database(folder) as connection:
        connection.execute("UPDATE chunks SET node = replace(node, 'test_chunk.', 'test_gone_.')")
    chunks = ChunkIndex.load(folder, model=FakeModel()).snapshot().chunks
    with pytest.raises(IndexFormatError, match=r"test_gone_\.AnnotatedNode.*Import"):
        chunks[0]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "chunks-1.sqlite"])
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
    assert loaded.snapshot().select({"n": {"$gte": 3}}).tolist() == [3, 4]
