"""Vector stores of real engines against the local index over the same chunks."""

from __future__ import annotations

import pytest
from corpus import QUERIES, QUERY, make_model, shared_model
from stores import ENGINES, items_for

from qrag_retriever import QRAGRetriever
from qrag_retriever.index import ChunkIndex

PLAIN = shared_model()
RELATIVE = make_model("relative", truncate_positions=True)
RELEASED = make_model(
    "relative",
    truncate_positions=True,
    position_step=20.0,
    position_span=18.0,
    position_endpoint=True,
    state_order="retrieval",
)
SETTINGS = [
    {"k": 5},
    {"k": 20},
    {"k": 4, "beams": 3},
    {"k": 6, "chunks_per_step": 2},
    {"k": 9, "q_threshold": 0.5},
]


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param], items_for(request.param)


@pytest.fixture(params=ENGINES, scope="module")
def filled(request, tmp_path_factory):
    """A store with all chunks, and its engine; all models here make the same embeddings."""
    own = ENGINES[request.param]
    folder = tmp_path_factory.mktemp("store")
    return own.fill(PLAIN, folder, items_for(request.param)), own, items_for(request.param)


def local(items, model, **settings):
    return QRAGRetriever(index=ChunkIndex.from_documents(items, model=model), **settings)


def check(found, expected):
    assert found.chunk_ids == expected.chunk_ids
    assert found.stopped == expected.stopped
    for step, other in zip(found, expected, strict=True):
        assert (step.step, step.text) == (other.step, other.text)
        assert step.metadata == other.metadata
        assert step.index in (-1, other.index)
        assert step.q_value == pytest.approx(other.q_value, abs=1e-4)
        assert step.position == pytest.approx(other.position, abs=1e-9)
        assert [r.chunk_id for r in step.runners_up] == [r.chunk_id for r in other.runners_up]
        for one, two in zip(step.runners_up, other.runners_up, strict=True):
            assert one.q_value == pytest.approx(two.q_value, abs=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("model", [PLAIN, RELATIVE, RELEASED], ids=["none", "relative", "released"])
def test_the_trajectory_of_the_local_index(filled, model, settings):
    store, _, items = filled
    retriever = QRAGRetriever.from_vector_store(store, model=model, number_key="number", **settings)
    oracle = local(items, model, **settings)
    for query in QUERIES:
        check(retriever.search(query), oracle.search(query))
    left_out = [items[2], items[5]]
    ids = [getattr(item, "id", None) or item.node_id for item in left_out]
    check(retriever.search(QUERY, exclude_ids=ids), oracle.search(QUERY, exclude_ids=ids))
    for one, two in zip(retriever.search_batch(QUERIES), oracle.search_batch(QUERIES), strict=True):
        check(one, two)
