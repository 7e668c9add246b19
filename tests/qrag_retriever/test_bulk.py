from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stores import ENGINES, IDS

from qrag_retriever import ChunkIndex, QRAGModel
from qrag_retriever.bulk import ChunkEmbedder, StoreWriter, embed_dataset, fill_store, index_of
from qrag_retriever.errors import (
    FingerprintMismatchError,
    InvalidInputError,
    MissingDependencyError,
)

TEXTS = [f"the {colour} cup fell {n} times" for n in range(12) for colour in ("red", "blue")]


class Rows:
    """A dataset of one or more batches, as `index_of` reads it."""

    def __init__(self, *batches: dict[str, Any]) -> None:
        self.batches = batches
        self.context: Any = None

    def iter_batches(self, batch_format: str) -> Any:
        assert batch_format == "numpy"
        return iter(self.batches)


class Store:
    """Keeps what is added, by id."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[str, dict[str, Any]]] = {}

    def add_texts(self, texts: list[str], metadatas: list[dict[str, Any]], ids: list[str]) -> None:
        self.kept |= {i: (t, m) for i, t, m in zip(ids, texts, metadatas, strict=True)}


@pytest.fixture(scope="module")
def folder(tiny_model: QRAGModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save_pretrained(tmp_path_factory.mktemp("bulk") / "model")


def test_a_worker_embeds_as_the_model_does(tiny_model: QRAGModel, folder: Path) -> None:
    batch = ChunkEmbedder(str(folder), "cpu")({"text": np.array(TEXTS), "page": np.arange(24)})
    np.testing.assert_allclose(batch["embedding"], tiny_model.encode_actions(TEXTS), atol=1e-6)
    assert batch["page"].tolist() == list(range(24))


def test_an_index_of_batches_is_the_index_of_the_texts(tiny_model: QRAGModel) -> None:
    embeddings = tiny_model.encode_actions(TEXTS)
    parts = [
        {
            "text": np.array(TEXTS[part]),
            "page": np.arange(24)[part],
            "embedding": np.array([*embeddings[part], None], dtype=object)[:-1],
        }
        for part in (slice(0, 10), slice(10, 24))
    ]
    index = index_of(Rows(*parts), tiny_model)
    pages = [{"page": page} for page in range(24)]
    expected = ChunkIndex.from_texts(TEXTS, pages, model=tiny_model)
    assert list(index.snapshot().chunks) == list(expected.snapshot().chunks)
    np.testing.assert_allclose(index.snapshot().embeddings, embeddings, atol=1e-6)
    numbered = index_of(Rows({**parts[0], "id": np.arange(10)}), tiny_model)
    assert [chunk.id for chunk in numbered.snapshot().chunks] == list(map(str, range(10)))


def test_batches_in_another_order_are_put_in_order(tiny_model: QRAGModel) -> None:
    embeddings = tiny_model.encode_actions(TEXTS)
    mixed = np.random.default_rng(0).permutation(24)
    parts = [
        {
            "id": np.array([f"chunk {i}" for i in some]),
            "text": np.array([TEXTS[i] for i in some]),
            "number": some,
            "embedding": np.array([*embeddings[some], None], dtype=object)[:-1],
        }
        for some in (mixed[:7], mixed[7:])
    ]
    index = index_of(Rows(*parts), tiny_model, order_by="number")
    assert [chunk.text for chunk in index.snapshot().chunks] == TEXTS
    assert [chunk.id for chunk in index.snapshot().chunks] == [f"chunk {i}" for i in range(24)]
    assert [chunk.metadata["number"] for chunk in index.snapshot().chunks] == list(range(24))
    np.testing.assert_allclose(index.snapshot().embeddings, embeddings, atol=1e-6)
    with pytest.raises(InvalidInputError, match="lacks page"):
        index_of(Rows(*parts), tiny_model, order_by="page")


def test_a_model_with_positions_needs_the_order(tiny_model: QRAGModel) -> None:
    rows = Rows({"text": np.array(TEXTS), "embedding": tiny_model.encode_actions(TEXTS)})
    rows.context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=False))
    assert tiny_model.config.positions != "none"
    with pytest.raises(InvalidInputError, match="order_by"):
        index_of(rows, tiny_model)
    rows.context.execution_options.preserve_order = True
    assert len(index_of(rows, tiny_model)) == 24


def test_a_state_in_document_order_needs_the_order(tmp_path: Path, tiny_model: QRAGModel) -> None:
    config = tiny_model.config.replace(positions="none", state_order="document")
    model = QRAGModel(tiny_model.state_encoder, tiny_model.action_encoder, config)
    rows = Rows({"text": np.array(TEXTS), "embedding": model.encode_actions(TEXTS)})
    rows.context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=False))
    with pytest.raises(InvalidInputError, match="state_order='document'"):
        index_of(rows, model)


def test_embeddings_of_another_model_are_refused(tiny_model: QRAGModel) -> None:
    embeddings = tiny_model.encode_actions(TEXTS)
    assert len(index_of(Rows({"text": np.array(TEXTS), "embedding": embeddings}), tiny_model)) == 24
    for wrong in (embeddings * 1.1, embeddings[::-1], embeddings[:, 1:]):
        with pytest.raises(FingerprintMismatchError, match="not this model's"):
            index_of(Rows({"text": np.array(TEXTS), "embedding": wrong}), tiny_model)


def test_what_a_worker_refuses_is_told_as_it_is(tiny_model: QRAGModel) -> None:
    class Failing(Rows):
        def iter_batches(self, batch_format: str) -> Any:
            inner = InvalidInputError("A row has no id.")
            wrapped = RuntimeError("a worker's stack")
            wrapped.cause = inner  # type: ignore[attr-defined]
            raise wrapped

    with pytest.raises(InvalidInputError, match=r"^A row has no id\.$"):
        index_of(Failing(), tiny_model)


def test_a_batch_written_twice_is_there_once() -> None:
    store = Store()
    writer = StoreWriter(lambda: store)
    batch = {"id": np.array([3, 4]), "text": np.array(["a", "b"]), "page": np.array([7, 8])}
    for _ in range(2):
        assert writer(batch)["id"].tolist() == [3, 4]
    assert store.kept == {"3": ("a", {"page": 7}), "4": ("b", {"page": 8})}
    assert type(store.kept["3"][1]["page"]) is int


@pytest.mark.parametrize("engine", ["qdrant", "milvus", "postgres", "chroma"])
def test_a_real_database_holds_what_was_written_last(
    engine: str, tiny_model: QRAGModel, tmp_path: Path
) -> None:
    store = ENGINES[f"langchain-{engine}"].fill(tiny_model, tmp_path, [])
    writer = StoreWriter(lambda: store)
    for texts in (["one", "two"], ["one", "three"]):
        writer({"id": np.array(IDS[:2]), "text": np.array(texts), "page": np.array([1, 2])})
    found = store.similarity_search("two", k=10)
    assert sorted((d.page_content, int(d.metadata["page"])) for d in found) == [
        ("one", 1),
        ("three", 2),
    ]


def test_what_is_missing_is_told(tiny_model: QRAGModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="has the columns text and lacks embedding"):
        index_of(Rows({"text": np.array(["a"])}), tiny_model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for call in (lambda: embed_dataset(None, "m"), lambda: fill_store(None, Store)):
        with pytest.raises(MissingDependencyError, match=r"qrag-retriever\[ray\]"):
            call()


def test_two_workers_of_which_one_is_killed(
    tiny_model: QRAGModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    died = folder.parent / "died"

    class DiesOnce(ChunkEmbedder):
        """Kills its process at its first batch, unless that has happened before."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    ray.init(num_cpus=4, include_dashboard=False)
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        monkeypatch.setattr("qrag_retriever.bulk.ChunkEmbedder", DiesOnce)
        rows = [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)]
        dataset = embed_dataset(ray.data.from_items(rows), folder, workers=2, batch_size=4)
        index = index_of(dataset, tiny_model)
    finally:
        ray.shutdown()
    assert died.exists()
    assert [chunk.text for chunk in index.snapshot().chunks] == TEXTS
    expected = tiny_model.encode_actions(TEXTS)
    np.testing.assert_allclose(index.snapshot().embeddings, expected, atol=1e-6)


def objects(*values: Any) -> np.ndarray:
    return np.array([*values, None], dtype=object)[:-1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": objects("x", None), "text": objects("one", "two")}, "has no id"),
        ({"id": np.array([1.0, np.nan]), "text": objects("one", "two")}, "column id holds 1.0"),
        ({"id": objects("x", "y"), "text": objects("one", None)}, "column text holds None"),
    ],
)
def test_rows_without_id_or_text_are_refused(columns: dict[str, Any], message: str) -> None:
    store = Store()
    with pytest.raises(InvalidInputError, match=message):
        StoreWriter(lambda: store)(columns)
    assert not store.kept


def test_ids_that_are_missing_are_made_from_the_texts(tiny_model: QRAGModel) -> None:
    batch = {"text": np.array(TEXTS[:2]), "embedding": tiny_model.encode_actions(TEXTS[:2])}
    index = index_of(Rows({**batch, "id": objects("a", None)}), tiny_model)
    made = ChunkIndex.from_texts(TEXTS[:2], model=tiny_model).snapshot().chunks[1].id
    assert [chunk.id for chunk in index.snapshot().chunks] == ["a", made]


@pytest.mark.parametrize(
    "places", [np.array(["2", "10", "1"]), objects(2, None, 1), np.array([2.0, np.nan, 1.0])]
)
def test_what_chunks_are_ordered_by_is_a_number(tiny_model: QRAGModel, places: np.ndarray) -> None:
    texts = TEXTS[:3]
    batch = {"text": np.array(texts), "embedding": tiny_model.encode_actions(texts), "n": places}
    with pytest.raises(InvalidInputError, match="column n must hold a number or a time"):
        index_of(Rows(batch), tiny_model, order_by="n")
    for good in (objects(2, 3, 1), np.array(["2020", "2021", "2019"], dtype="datetime64[ns]")):
        index = index_of(Rows({**batch, "n": good}), tiny_model, order_by="n")
        assert [c.text for c in index.snapshot().chunks] == [texts[i] for i in (2, 0, 1)]


def test_metadata_of_bulk_can_be_saved(tiny_model: QRAGModel, tmp_path: Path) -> None:
    batch = {
        "text": np.array(TEXTS[:2]),
        "embedding": tiny_model.encode_actions(TEXTS[:2]),
        "tags": objects(np.array(["a", "b"]), np.array(["c"])),
        "when": np.array(["NaT", "2021-02-03T04:05"], dtype="datetime64[ns]"),
        "day": objects(np.datetime64("NaT", "D"), np.datetime64("2021-02-03")),
        "days": objects({"first": np.datetime64("2021-02-03")}, None),
    }
    index = index_of(Rows(batch), tiny_model)
    index.save(tmp_path)
    chunks = ChunkIndex.load(tmp_path, model=tiny_model).snapshot().chunks
    assert [chunk.metadata["tags"] for chunk in chunks] == [["a", "b"], ["c"]]
    assert chunks[0].metadata["when"] is None
    assert chunks[1].metadata["when"].startswith("2021-02-03T04:05:00")
    assert [chunk.metadata["day"] for chunk in chunks] == [None, "2021-02-03"]
    assert [chunk.metadata["days"] for chunk in chunks] == [{"first": "2021-02-03"}, None]
