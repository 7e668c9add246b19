from __future__ import annotations

import numpy as np
import pytest
from corpus import make_model
from fake_model import FakeModel

from qrag_retriever import QRAGRetriever
from qrag_retriever.ann import AnnIndex
from qrag_retriever.errors import ConfigError, IndexFormatError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.vectors import StoredVectors

COUNT, DIMENSION = 3000, 64


def exact(states: np.ndarray, corpus: np.ndarray, k: int, rows: np.ndarray | None) -> np.ndarray:
    rows = np.arange(len(corpus)) if rows is None else rows
    return rows[np.argsort(-(states @ corpus[rows].T), axis=1)[:, :k]]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return sum(hits) / expected.size


@pytest.fixture(scope="module")
def corpus() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((40, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module")
def hnsw(corpus: np.ndarray) -> AnnIndex:
    return AnnIndex(StoredVectors(corpus), "hnsw")


def allowed(share: float | None) -> np.ndarray | None:
    if share is None:
        return None
    return np.flatnonzero(np.random.default_rng(2).random(COUNT) < share)


@pytest.mark.parametrize("share", [None, 0.5, 0.003])
def test_flat_equals_exact(corpus: np.ndarray, states: np.ndarray, share: float | None) -> None:
    rows = allowed(share)
    found = AnnIndex(StoredVectors(corpus), "flat").search(states, 10, rows)
    expected = exact(states, corpus, 10, rows)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("share", [None, 0.5, 0.12, 0.05, 0.003])
def test_hnsw_finds_nearly_all_and_nothing_outside_the_allowed_rows(
    corpus: np.ndarray, states: np.ndarray, hnsw: AnnIndex, share: float | None
) -> None:
    rows = allowed(share)
    found = hnsw.search(states, 10, rows)
    expected = exact(states, corpus, 10, rows)
    assert found.shape == expected.shape
    assert rows is None or np.isin(found, rows).all()
    assert recall(found, expected) >= (1 if share and share < 0.1 else 0.95)


def test_hnsw_always_fills_its_answer(corpus: np.ndarray, states: np.ndarray) -> None:
    # allowed rows that no walk from the entry point meets: the far side of two clusters
    split = corpus[:400].copy()
    split[:, 0] += np.where(np.arange(400) < 300, 100, -100)
    rows = np.arange(300, 400)
    states = np.abs(states)
    found = AnnIndex(StoredVectors(split), "hnsw").search(states, 60, rows)
    assert found.shape == (len(states), 60)
    assert np.isin(found, rows).all()
    assert all(len(set(line)) == 60 for line in found.tolist())


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_small_and_empty_requests(kind: str) -> None:
    index = AnnIndex(StoredVectors(np.eye(3, dtype=np.float32)), kind)
    states = np.array([[1, 3, 2]], dtype=np.float32)
    assert index.search(states, 10).tolist() == [[1, 2, 0]]
    assert index.search(states, 10, np.array([0, 2])).tolist() == [[2, 0]]
    assert index.search(states, 10, np.array([], dtype=np.int64)).shape == (1, 0)
    assert index.search(states[:0], 2).shape == (0, 2)


@pytest.mark.parametrize(("shape", "k"), [((1, 4), 1), ((3,), 1), ((1, 3), 0)])
def test_wrong_requests(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(InvalidInputError):
        AnnIndex(StoredVectors(np.eye(3, dtype=np.float32)), "flat").search(
            np.ones(shape, np.float32), k
        )


def test_stored_hnsw_is_the_same_index(
    corpus: np.ndarray, states: np.ndarray, hnsw: AnnIndex
) -> None:
    stored = hnsw.to_bytes()
    again = AnnIndex(StoredVectors(corpus), "hnsw", stored)
    assert np.array_equal(again.search(states, 10), hnsw.search(states, 10))
    with pytest.raises(IndexFormatError, match="over 3000 vectors of 64"):
        AnnIndex(StoredVectors(corpus[:-1]), "hnsw", stored)
    with pytest.raises(IndexFormatError, match="cannot be read"):
        AnnIndex(StoredVectors(corpus), "hnsw", stored[:500])
    assert AnnIndex(StoredVectors(corpus), "flat").to_bytes() is None


@pytest.fixture(scope="module")
def alike() -> np.ndarray:
    """Vectors that vary in few directions, as embeddings do, but enough for lists and codes."""
    random = np.random.default_rng(3)
    directions = random.standard_normal((8, 32))
    return (random.standard_normal((12_000, 8)) @ directions).astype(np.float32)


@pytest.mark.parametrize("share", [None, 0.5, 0.05])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_ivfpq_compares_what_it_finds_exactly(
    alike: np.ndarray, dtype: str, share: float | None
) -> None:
    vectors = StoredVectors.of(alike, dtype)
    states = alike[:40] + np.float32(0.5)
    rows = (
        None if share is None else np.flatnonzero(np.random.default_rng(4).random(12_000) < share)
    )
    index = AnnIndex(vectors, "ivfpq")
    found = index.search(states, 3, rows)
    expected = exact(states, vectors.float32(), 3, rows)
    assert rows is None or np.isin(found, rows).all()
    assert recall(found[:, :1], expected[:, :1]) >= 0.95
    products = np.take_along_axis(states @ vectors.float32().T, found, axis=1)
    assert (np.diff(products, axis=1) <= 1e-3).all()
    stored = index.to_bytes()
    assert stored.nbytes < alike.nbytes / 2
    assert np.array_equal(AnnIndex(vectors, "ivfpq", stored).search(states, 3, rows), found)


def test_positions_and_unknown_kinds_are_refused() -> None:
    for positions in ("relative", "absolute"):
        model = FakeModel(positions=positions)
        with pytest.raises(ConfigError, match=f"positions='none'.*{positions}"):
            ChunkIndex(model, ann="hnsw")
        assert ChunkIndex(model).snapshot().ann is None
    with pytest.raises(ConfigError, match="'none', 'flat', 'hnsw' or 'ivfpq'"):
        ChunkIndex(FakeModel(), ann="annoy")


def test_so_are_positions_that_come_later() -> None:
    model = make_model()
    retriever = QRAGRetriever.from_texts(["a", "b"], model=model, ann="flat")
    model.config = model.config.replace(positions="relative")
    with pytest.raises(ConfigError, match=r"positions='none'.*relative"):
        retriever.search("a")


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_an_index_keeps_its_ann_up_to_date_and_on_disk(kind: str, tmp_path) -> None:
    model = FakeModel()
    texts = [f"text {number}" for number in range(50)]
    index = ChunkIndex.from_texts(texts, ids=texts, model=model, ann=kind)
    before = index.snapshot()
    states = before.embeddings[10:11] * 100

    def best(snapshot) -> str:
        assert snapshot.ann is snapshot.ann
        return snapshot.chunks[int(snapshot.ann.search(states, 1)[0, 0])].id

    expected = [texts[row] for row in np.argsort(-(states @ before.embeddings.T)[0])]
    assert best(before) == expected[0]
    index.delete([expected[0]])
    assert best(index.snapshot()) == expected[1]
    assert best(before) == expected[0]
    index.save(tmp_path / "index")
    assert len(list((tmp_path / "index").glob("ann-*"))) == (kind == "hnsw")
    loaded = ChunkIndex.load(tmp_path / "index", model=model)
    assert loaded.ann == kind
    assert best(loaded.snapshot()) == expected[1]
    loaded.add([expected[0]], ids=[expected[0]])
    assert best(loaded.snapshot()) == expected[0]
    loaded.delete(texts)
    assert loaded.snapshot().ann is None
