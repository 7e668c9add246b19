"""Embeddings in each storage type: what is lost, and that an index keeps its type."""

from __future__ import annotations

import json
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import QUERY, make_index, shared_model
from fake_model import FakeModel, vectors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from stored_index import file_of

from qrag_retriever import QRAGRetriever
from qrag_retriever.errors import IndexFormatError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.positions import PositionScheme
from qrag_retriever.scoring import score
from qrag_retriever.vectors import StoredVectors

REDUCED = ["bfloat16", "float16", "int8"]
TYPES = ["float32", *REDUCED]
# bytes of a number; its largest error in proportion to itself, for int8 to the row's largest
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
ERROR = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.502 / 127}
TEXTS = [f"text {number}" for number in range(40)]


def number_of(bits: int) -> float:
    """A bfloat16 is the upper half of a float32."""
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def plain(vectors: StoredVectors) -> np.ndarray:
    """What is stored, one number at a time, in float64."""
    if vectors.dtype == "bfloat16":
        numbers = [[number_of(int(bits)) for bits in row] for row in vectors.values]
        return np.array(numbers).reshape(vectors.shape)
    factors = np.ones(len(vectors)) if vectors.scales is None else vectors.scales
    return np.array(
        [
            [float(factor) * float(x) for x in row]
            for row, factor in zip(vectors.values, factors, strict=True)
        ]
    ).reshape(vectors.shape)


numbers = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(8)), elements=numbers))
@pytest.mark.parametrize("dtype", TYPES)
def test_each_type_is_as_exact_as_its_bits(dtype, vectors):
    stored = StoredVectors.of(vectors, dtype)
    kept = stored.float32()
    assert kept.dtype == np.float32
    assert np.array_equal(kept, plain(stored))
    scale = np.abs(vectors)
    if dtype == "int8":
        scale = scale.max(axis=1, keepdims=True, initial=0)
        assert (np.abs(stored.values.astype(int)) <= 127).all()
    assert (np.abs(kept - vectors) <= ERROR[dtype] * scale).all()
    again = StoredVectors.of(kept, dtype)
    assert np.array_equal(again.values, stored.values)
    assert np.array_equal(again.float32(), kept)


def test_numbers_too_large_for_half_precision_are_refused():
    vectors = np.array([[1.0, 70_000.0]], dtype=np.float32)
    with pytest.raises(InvalidInputError, match="bfloat16"):
        StoredVectors.of(vectors, "float16")
    assert StoredVectors.of(vectors, "int8").float32()[0, 1] == pytest.approx(70_000, rel=1e-4)


@pytest.mark.parametrize("positions", ["none", "relative", "absolute", "truncated"])
@pytest.mark.parametrize("dtype", REDUCED)
def test_search_scores_what_is_stored(dtype, positions):
    """Against the stored numbers as plain float32, whose scoring has an oracle of its own."""
    random = np.random.default_rng(0)
    stored = StoredVectors.of(random.normal(size=(9000, 24)).astype(np.float32), dtype)
    states = torch.from_numpy(random.normal(size=(3, 24)).astype(np.float32))
    truncated = positions == "truncated"
    scheme = PositionScheme("relative" if truncated else positions, truncate=truncated)
    for rows in (None, np.flatnonzero(random.random(9000) < 0.1), np.arange(100, 8000, 2)):
        found = [[], [3], [7, 300, 12]]
        q = score(states, stored.tensor(), found, scheme, rows=rows)
        exact = torch.from_numpy(plain(stored).astype(np.float32))
        expected = score(states, exact, found, scheme, rows=rows)
        bound = 3e-5 * float(states.norm(dim=1).max() * exact.norm(dim=1).max())
        torch.testing.assert_close(q, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_index_keeps_its_type(tmp_path: Path, dtype):
    model = FakeModel()
    index = ChunkIndex.from_texts(TEXTS[:30], ids=TEXTS[:30], model=model, dtype=dtype)
    index.add(TEXTS[30:], ids=TEXTS[30:])
    index.add(["other", TEXTS[3]], ids=[TEXTS[0], TEXTS[1]])
    index.delete([TEXTS[2]])
    texts = ["other", TEXTS[3], *TEXTS[3:]]
    expected = StoredVectors.of(vectors_of(texts), dtype).float32()
    index.save(tmp_path / "index")
    loaded = ChunkIndex.load(tmp_path / "index", model=model, verify=True)
    for each in (index, loaded, pickle.loads(pickle.dumps(index))):
        assert each.dtype == dtype
        assert each.snapshot().vectors.values.nbytes == len(texts) * 8 * BYTES[dtype]
        assert np.array_equal(each.snapshot().embeddings, expected)
        assert each.fingerprint == model.fingerprint
    assert (
        file_of(tmp_path / "index", "embeddings").stat().st_size
        < len(texts) * 8 * BYTES[dtype] + 200
    )
    loaded.add(["one more"])
    assert loaded.snapshot().vectors.dtype == dtype
    vectors = StoredVectors.of(vectors_of(["one more"]), dtype).float32()
    assert np.array_equal(loaded.snapshot().embeddings, np.concatenate([expected, vectors]))
    assert np.array_equal(index.snapshot().embeddings, expected)


def test_a_snapshot_outlives_later_changes():
    index = ChunkIndex.from_texts(TEXTS[:3], ids=TEXTS[:3], model=FakeModel(), dtype="int8")
    before, expected = index.snapshot(), index.snapshot().embeddings.copy()
    for number in range(3, 9):
        index.add([TEXTS[number]])
    index.delete([TEXTS[0]])
    assert np.array_equal(before.embeddings, expected)


def test_an_index_without_a_type_is_float32(tmp_path: Path):
    ChunkIndex.from_texts(TEXTS, model=FakeModel()).save(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("dtype") == "float32"
    manifest.write_text(json.dumps(content))
    assert ChunkIndex.load(tmp_path, model=FakeModel()).dtype == "float32"
    manifest.write_text(json.dumps({**content, "dtype": "int4"}))
    with pytest.raises(IndexFormatError, match="'int4'; this release reads float32, bfloat16"):
        ChunkIndex.load(tmp_path, model=FakeModel())
    manifest.write_text(json.dumps({**content, "dtype": "int8"}))  # without its factors
    with pytest.raises(IndexFormatError, match="incomplete"):
        ChunkIndex.load(tmp_path, model=FakeModel())


def test_an_unknown_type_is_refused():
    with pytest.raises(InvalidInputError, match="'float32', 'bfloat16', 'float16', 'int8'"):
        ChunkIndex.from_texts(["a"], model=FakeModel(), dtype="int4")


@pytest.mark.parametrize("dtype", REDUCED)
def test_approximate_search_scores_what_is_stored(dtype):
    model = shared_model()
    exact, approximate = (make_index(model, dtype=dtype, ann=ann) for ann in ("none", "hnsw"))
    found = [QRAGRetriever(index=index, k=4).search(QUERY) for index in (exact, approximate)]
    assert [step.chunk for step in found[0]] == [step.chunk for step in found[1]]
    for one, other in zip(*found, strict=True):
        assert math.isclose(one.q_value, other.q_value, rel_tol=1e-4)


@pytest.mark.parametrize("positions", ["none", "relative", "absolute"])
def test_a_retriever_takes_and_keeps_the_type(tmp_path: Path, positions):
    texts = [f"Mary took {number} apples." for number in range(50)]
    model = shared_model(positions)
    retriever = QRAGRetriever.from_texts(texts, model=model, k=3, dtype="int8")
    assert (
        QRAGRetriever.from_documents(texts, model=model, dtype="float16").index.dtype == "float16"
    )
    trajectory = retriever.search(QUERY)
    # the same search over what int8 leaves of the embeddings
    index = ChunkIndex.from_embeddings(texts, retriever.index.snapshot().embeddings, model=model)
    expected = QRAGRetriever(index=index, k=3).search(QUERY)
    assert [step.index for step in trajectory] == [step.index for step in expected]
    retriever.save_local(tmp_path)
    loaded = QRAGRetriever.load_local(tmp_path, model=model)
    assert loaded.index.dtype == "int8"
    assert str(loaded.search(QUERY)) == str(trajectory)
