from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, vectors_of
from langchain_core.documents import Document
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode

from qrag_retriever import index as index_module
from qrag_retriever import vectors as vectors_module
from qrag_retriever.chunk import Chunk
from qrag_retriever.chunk_store import MemoryChunks
from qrag_retriever.errors import FingerprintMismatchError, IndexFormatError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.vectors import StoredVectors


def test_equal_texts_are_kept_in_order_and_embedded_once() -> None:
    model = FakeModel()
    index = ChunkIndex.from_texts(["a", "b", "a", "a"], model=model)
    assert [chunk.text for chunk in index.snapshot().chunks] == ["a", "b", "a", "a"]
    assert model.encoded == ["a", "b"]
    other = ChunkIndex.from_texts(["a", "b", "a", "a"], model=model)
    assert [c.id for c in other.snapshot().chunks] == [c.id for c in index.snapshot().chunks]
    index.add(["a"])
    assert len(index) == 5
    assert model.encoded == ["a", "b"] * 2


@pytest.mark.parametrize("make", [ChunkIndex.from_texts, ChunkIndex.from_documents])
def test_an_index_of_nothing_is_refused(make: Any) -> None:
    for nothing in ([], iter(())):
        with pytest.raises(InvalidInputError, match="no chunks; give at least one"):
            make(nothing, model=FakeModel())


def test_an_emptied_index_goes_on(tmp_path: Path) -> None:
    index = ChunkIndex.from_texts(["a"], ids=["1"], model=FakeModel())
    index.delete(["1"])
    index = pickle.loads(pickle.dumps(index))
    index.save(tmp_path)
    index = ChunkIndex.load(tmp_path, model=FakeModel())
    assert len(index) == 0
    index.add(["b"])
    assert [chunk.text for chunk in index.snapshot().chunks] == ["b"]


def test_mixed_items_are_embedded_as_their_frameworks_say() -> None:
    model = FakeModel()
    node = TextNode(text="n", metadata={"title": "T", "no": 1}, excluded_embed_metadata_keys=["no"])
    index = ChunkIndex.from_documents(["t", Document("d", id="d"), node], model=model)
    assert model.encoded == ["t", "d", "title: T\n\nn"]
    assert index.snapshot().row_of("d") == 1
    assert index.snapshot().chunks[2].text == "n"


def test_texts_swapped_between_chunks_are_not_embedded_again() -> None:
    model = FakeModel()
    index = ChunkIndex.from_texts(["a", "b"], ids=["1", "2"], model=model)
    index.add(["b", "a", "a"], ids=["1", "2", "3"])
    assert np.array_equal(index.snapshot().embeddings, vectors_of(["b", "a", "a"]))
    assert model.encoded == ["a", "b"]


def test_changed_metadata_or_relationships_replace_without_embedding() -> None:
    model = FakeModel()
    node = TextNode(id_="n", text="t", metadata={"a": 1}, excluded_embed_metadata_keys=["a"])
    index = ChunkIndex.from_documents([node], model=model)
    embeddings = index.snapshot().embeddings
    node.metadata["a"] = 2
    index.add([node])
    assert index.snapshot().chunks[0].metadata == {"a": 2}
    node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="doc")
    index.add([node])
    assert index.snapshot().chunks[0].source.ref_doc_id == "doc"
    assert index.snapshot().version == 3
    index.add([node])
    assert index.snapshot().version == 3
    assert len(model.encoded) == 1
    assert np.shares_memory(embeddings, index.snapshot().embeddings)


def test_from_embeddings_takes_copies_and_asks_no_model() -> None:
    model = FakeModel()
    vectors = vectors_of(["x", "y"]).astype(np.float64)
    index = ChunkIndex.from_embeddings(["a", Document("b")], vectors, model=model)
    expected = vectors.astype(np.float32)
    vectors[:] = 0
    assert np.array_equal(index.snapshot().embeddings, expected)
    assert model.encoded == []


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.zeros((1, 8)), r"shape \(1, 8\); it must be \(2, 8\)"),
        (np.zeros((2, 7)), r"shape \(2, 7\)"),
        (np.full((2, 8), np.nan), "not finite, the first in row 0"),
        ([["a"] * 8] * 2, "cannot be read as an array"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_wrong_embeddings_are_refused(embeddings: Any, message: str, dtype: Any) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ChunkIndex.from_embeddings(["a", "b"], embeddings, model=FakeModel(), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_embeddings_in_blocks_are_stored_as_at_once(dtype: Any, monkeypatch: Any) -> None:
    texts = [f"text {number}" for number in range(11)]
    vectors = vectors_of(texts)
    monkeypatch.setattr(vectors_module, "_AT_ONCE", 4)
    index = ChunkIndex.from_embeddings(texts, vectors, model=FakeModel(), dtype=dtype)
    monkeypatch.undo()
    stored = StoredVectors.of(vectors, dtype)
    assert np.array_equal(index.snapshot().embeddings, stored.float32())
    vectors[9, 3] = np.inf
    monkeypatch.setattr(vectors_module, "_AT_ONCE", 4)
    with pytest.raises(InvalidInputError, match="first in row 9"):
        ChunkIndex.from_embeddings(texts, vectors, model=FakeModel(), dtype=dtype)


class EncoderError(Exception):
    pass


def out_of_memory(vectors: np.ndarray) -> object:
    raise EncoderError


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (out_of_memory, EncoderError),
        (lambda vectors: vectors[:-1], InvalidInputError),
        (lambda vectors: vectors[:, :-1], InvalidInputError),
        (lambda vectors: vectors * np.inf, InvalidInputError),
        (lambda vectors: None, InvalidInputError),
    ],
)
def test_an_add_that_fails_changes_nothing(spoil: Any, error: type[Exception]) -> None:
    model = FakeModel()
    index = ChunkIndex.from_texts(["a", "b"], ids=["1", "2"], model=model)
    before, chunks = index.snapshot(), list(index.snapshot().chunks)
    model.spoil = spoil
    with pytest.raises(error):
        index.add(["changed", "new", "newer"], ids=["1", "3", "4"])
    assert index.snapshot() is before
    model.spoil = None
    index.add(["newer"], ids=["5"])
    assert list(index.snapshot().chunks) == [*chunks, Chunk("5", "newer")]
    assert np.array_equal(index.snapshot().embeddings, vectors_of(["a", "b", "newer"]))
    for missing in ("3", "4"):
        with pytest.raises(InvalidInputError, match=f"'{missing}'"):
            index.snapshot().row_of(missing)


def test_an_interrupted_extension_leaves_no_trace() -> None:
    chunks = MemoryChunks([Chunk("1", "a"), Chunk("2", "b")])

    def interrupted() -> Any:
        yield Chunk("lost", "lost text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunks.extended(interrupted())
    assert list(chunks) == [Chunk("1", "a"), Chunk("2", "b")]
    assert (chunks.find("lost"), chunks.find_text("lost text")) == (None, None)
    longer = chunks.extended([Chunk("3", "c")])
    assert list(longer) == [*chunks, Chunk("3", "c")]
    assert (longer.find("lost"), longer.find_text("lost text")) == (None, None)
    longest = longer.extended([Chunk("lost", "lost text")])
    assert (longest.find("lost"), longest.find_text("lost text")) == (3, 3)
    assert (chunks.find("3"), chunks.find_text("c"), longer.find("lost")) == (None, None, None)


def test_a_model_changed_since_is_refused() -> None:
    model = FakeModel(fingerprint="before")
    index = ChunkIndex.from_texts(["a"], model=model)
    model.fingerprint = "after"
    with pytest.raises(FingerprintMismatchError, match=r"before.*after"):
        index.add(["b"])
    index.delete([index.snapshot().chunks[0].id])
    assert len(index) == 0


def test_delete_is_all_or_nothing() -> None:
    index = ChunkIndex.from_texts(["a", "b", "c"], ids=["1", "2", "3"], model=FakeModel())
    for ids, message in ((["1", "x", "y"], "'x', 'y'; nothing"), ("1", "list of ids")):
        with pytest.raises(InvalidInputError, match=message):
            index.delete(ids)
    version = index.snapshot().version
    index.delete([])
    assert (len(index), index.snapshot().version) == (3, version)
    index.delete(["3", "1", "3"])
    assert [chunk.id for chunk in index.snapshot().chunks] == ["2"]


def test_embeddings_are_read_only() -> None:
    index = ChunkIndex.from_texts(["a"], model=FakeModel())
    with pytest.raises(ValueError, match="read-only"):
        index.snapshot().embeddings[0] = 0


def test_a_snapshot_keeps_what_a_later_change_replaces_or_removes() -> None:
    index = ChunkIndex.from_texts(["a", "b"], ids=["1", "2"], model=FakeModel())
    before = index.snapshot()
    index.add(["changed", "new"], ids=["1", "3"])
    between = index.snapshot()
    index.delete(["2"])
    for snapshot, texts in ((before, ["a", "b"]), (between, ["changed", "b", "new"])):
        assert [chunk.text for chunk in snapshot.chunks] == texts
        assert np.array_equal(snapshot.embeddings, vectors_of(texts))
        assert snapshot.row_of("2") == 1


def test_appending_copies_the_corpus_only_when_the_buffer_is_full() -> None:
    index = ChunkIndex.from_texts(["0"], model=FakeModel())
    buffers = [index.snapshot().embeddings]
    for number in range(1, 64):
        index.add([str(number)])
        if not np.shares_memory(buffers[-1], index.snapshot().embeddings):
            buffers.append(index.snapshot().embeddings)
    assert len(buffers) == 7  # 1, 2, 4, … 64 rows


def test_snapshots_stay_whole_while_another_thread_changes_the_index() -> None:
    index = ChunkIndex.from_texts(["start"], ids=["start"], model=FakeModel())
    problems: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            snapshot = index.snapshot()
            chunks, embeddings = list(snapshot.chunks), snapshot.embeddings.copy()
            if not np.array_equal(embeddings, vectors_of([chunk.text for chunk in chunks])):
                problems.append(f"version {snapshot.version}: embeddings of other texts")
            if snapshot.row_of(chunks[-1].id) != len(chunks) - 1:
                problems.append(f"version {snapshot.version}: row of another chunk")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(150):
        index.add([f"{number} a", f"{number} b"], ids=[f"{number}a", f"{number}b"])
        if number % 5 == 1:
            index.add([f"{number} changed"], ids=[f"{number - 1}a"])
        if number % 7 == 1:
            index.delete([f"{number - 1}b"])
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []


def test_two_threads_adding_and_deleting_lose_nothing() -> None:
    index = ChunkIndex.from_texts([f"old {n}" for n in range(100)], model=FakeModel())
    ids = [chunk.id for chunk in index.snapshot().chunks]
    threads = [
        threading.Thread(target=lambda: [index.add([f"new {n}"]) for n in range(100)]),
        threading.Thread(target=lambda: [index.delete([id_]) for id_ in ids]),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [chunk.text for chunk in index.snapshot().chunks] == [f"new {n}" for n in range(100)]


def test_two_threads_adding_lose_nothing() -> None:
    index = ChunkIndex(FakeModel())
    threads = [
        threading.Thread(target=lambda name=name: [index.add([name]) for _ in range(50)])
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [chunk.text for chunk in index.snapshot().chunks]
    assert sorted(texts) == ["a"] * 50 + ["b"] * 50
    assert np.array_equal(index.snapshot().embeddings, vectors_of(texts))


def test_what_is_added_may_change_the_index_while_it_is_read() -> None:
    index = ChunkIndex.from_texts(["1", "2", "3"], ids=["1", "2", "3"], model=FakeModel())

    def fresh() -> Iterator[str]:
        index.delete(["1"])
        yield "4"
        thread = threading.Thread(target=lambda: index.add(["5"]), daemon=True)
        thread.start()
        thread.join(60)  # nobody waits for whoever waits for him
        assert not thread.is_alive()
        yield "6"

    index.add(fresh())
    texts = [chunk.text for chunk in index.snapshot().chunks]
    assert texts == ["2", "3", "5", "4", "6"]
    assert np.array_equal(index.snapshot().embeddings, vectors_of(texts))


def test_two_threads_saving_leave_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ChunkIndex.from_texts(["1", "2", "3"], model=FakeModel())
    writing, write = threading.Event(), index_module.write_index

    def slowly(*arguments: Any) -> str:
        if not writing.is_set():
            writing.set()
            time.sleep(0.3)
        return write(*arguments)

    monkeypatch.setattr(index_module, "write_index", slowly)
    thread = threading.Thread(target=index.save, args=[tmp_path / "index"])
    thread.start()
    writing.wait()
    index.delete([index.snapshot().chunks[0].id])
    index.save(tmp_path / "index")
    thread.join()
    assert len(ChunkIndex.load(tmp_path / "index", model=index.model)) == 2
    with ThreadPoolExecutor(3) as pool:  # none takes another one's save for a stranger's
        list(pool.map(index.save, [tmp_path / "index"] * 9))


def test_select_keeps_results_of_filters_until_the_index_changes() -> None:
    index = ChunkIndex.from_texts(["a", "b"], [{"x": 1}, {"x": 2}], model=FakeModel())
    assert index.snapshot().select(None) is None
    rows = index.snapshot().select({"x": {"$gte": 1}})
    assert rows.dtype == np.int64
    assert rows.tolist() == [0, 1]
    assert index.snapshot().select({"x": {"$gte": 1}}) is rows
    assert index.snapshot().select({"x": 3}).tolist() == []
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    index.add(["c"], metadatas=[{"x": 1}])
    assert index.snapshot().select({"x": {"$gte": 1}}).tolist() == [0, 1, 2]


def test_select_asks_a_function_every_time() -> None:
    index = ChunkIndex.from_texts(["a", "b"], model=FakeModel())
    wanted = "a"

    def passes(chunk: Chunk) -> bool:
        return chunk.text == wanted

    assert index.snapshot().select(passes).tolist() == [0]
    wanted = "b"
    assert index.snapshot().select(passes).tolist() == [1]


def test_select_remembers_no_more_than_a_few_filters() -> None:
    snapshot = ChunkIndex.from_texts(["a"], [{"x": 1}], model=FakeModel()).snapshot()
    first = snapshot.select({"x": 1})
    for number in range(20):
        snapshot.select({"x": {"$ne": number}})
    assert snapshot.select({"x": 1}) is not first
    assert len(snapshot._selections) <= 8


def test_copies_are_the_index_itself() -> None:
    index = ChunkIndex.from_texts(["a"], model=FakeModel())
    assert copy.copy(index) is index
    assert copy.deepcopy({"index": index})["index"] is index


def test_a_pickle_of_a_saved_index_holds_its_path_only(tmp_path: Path) -> None:
    index = ChunkIndex.from_texts(["a secret text"], model=FakeModel())
    assert b"a secret text" in pickle.dumps(index)
    index.save(tmp_path / "index")
    index.model.encoded.clear()
    dumped = pickle.dumps(index)
    assert b"a secret text" not in dumped
    assert pickle.loads(dumped).snapshot().chunks[0].text == "a secret text"
    index.add(["more"])
    again = pickle.loads(pickle.dumps(index))
    assert list(again.snapshot().chunks) == list(index.snapshot().chunks)


def test_a_pickle_remembers_the_model_that_embedded_it() -> None:
    index = ChunkIndex.from_texts(["old"], model=FakeModel())
    index.fingerprint = "of the model before it was trained further"
    again = pickle.loads(pickle.dumps(index))
    with pytest.raises(FingerprintMismatchError):
        again.add(["new"])


def test_who_saves_second_does_not_undo_who_saved_first(tmp_path: Path) -> None:
    model, folder = FakeModel(), tmp_path / "index"
    ChunkIndex.from_texts(["first"], model=model).save(folder)
    mine, theirs = (ChunkIndex.load(folder, model=model) for _ in range(2))
    theirs.add(["theirs"])
    theirs.save(folder)
    theirs.add(["more"])
    theirs.save(folder)  # one's own saves are no surprise
    mine.add(["mine"])
    with pytest.raises(InvalidInputError, match="saved by someone else"):
        mine.save(folder)
    assert len(ChunkIndex.load(folder, model=model)) == 3
    mine.save(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="saved by someone else"):
        mine.save(folder)  # to have saved elsewhere in the meantime changes nothing
    mine.save(folder, overwrite=True)
    assert [chunk.text for chunk in ChunkIndex.load(folder, model=model).snapshot().chunks] == [
        "first",
        "mine",
    ]


@pytest.mark.parametrize("loaded", [False, True])
def test_who_saved_once_does_not_undo_what_others_saved_later(tmp_path: Path, loaded: bool) -> None:
    model, folder = FakeModel(), tmp_path / "index"
    mine = ChunkIndex.from_texts(["first"], model=model)
    mine.save(folder)
    if loaded:
        mine = ChunkIndex.load(folder, model=model)
        mine.save(folder)
    theirs = ChunkIndex.load(folder, model=model)
    theirs.add(["theirs"])
    theirs.save(folder)
    mine.add(["mine"])
    with pytest.raises(InvalidInputError, match=r"saved by someone else.*overwrite=True"):
        mine.save(folder)
    assert len(ChunkIndex.load(folder, model=model)) == 2
    # who never knew the folder replaces what is there
    ChunkIndex.from_texts(["new"], model=model).save(folder)
    assert len(ChunkIndex.load(folder, model=model)) == 1


def test_an_update_tells_one_from_true() -> None:
    index = ChunkIndex.from_texts(["a"], [{"n": 1}], ["id"], model=FakeModel())
    index.add(["a"], metadatas=[{"n": True}], ids=["id"])
    assert index.snapshot().chunks[0].metadata["n"] is True
    for _ in range(2):  # what cannot be compared is taken to be another
        index.add(["a"], metadatas=[{"n": np.arange(2)}], ids=["id"])
    assert index.snapshot().chunks[0].metadata["n"].tolist() == [0, 1]


def test_metadata_that_hold_themselves_cannot_be_saved(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    index = ChunkIndex.from_texts(["a"], model=FakeModel())
    index.snapshot().chunks[0].metadata.update(metadata)
    with pytest.raises(InvalidInputError, match="cannot be written as JSON"):
        index.save(tmp_path / "index")


def test_a_pickle_never_loads_an_index_that_was_saved_later(tmp_path: Path) -> None:
    model = FakeModel()
    first = ChunkIndex.from_texts(["the first"], model=model)
    first.save(tmp_path / "index")
    dumped = pickle.dumps(first)
    ChunkIndex.from_texts(["the second"], model=model).save(tmp_path / "index")
    with pytest.raises(IndexFormatError, match="since this one was pickled"):
        pickle.loads(dumped)
    again = pickle.loads(pickle.dumps(first))
    assert [chunk.text for chunk in again.snapshot().chunks] == ["the first"]


@pytest.mark.parametrize("ids", ["a", None, [[]], [3]])
def test_what_is_deleted_is_a_list_of_ids(ids: Any) -> None:
    index = ChunkIndex.from_texts(["the first"], ids=["a"], model=FakeModel())
    with pytest.raises(InvalidInputError, match="id"):
        index.delete(ids)
    assert len(index) == 1


def test_repr_and_errors_show_no_texts() -> None:
    index = ChunkIndex.from_texts(["a secret text"], model=FakeModel())
    assert repr(index) == "ChunkIndex(1 chunks, dimension=8, ann='none')"
    assert repr(index.snapshot()) == "Snapshot(1 chunks, version=1)"


def test_slices_of_chunks_are_lists(tmp_path: Path) -> None:
    index = ChunkIndex.from_texts(["a", "b", "c"], model=FakeModel())
    index.save(tmp_path / "index")
    for one in (index, ChunkIndex.load(tmp_path / "index", model=index.model)):
        chunks = one.snapshot().chunks
        assert [chunk.text for chunk in chunks[::-2]] == ["c", "a"]
        assert chunks[-1].text == "c"
        with pytest.raises(IndexError):
            chunks[3]
