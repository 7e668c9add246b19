"""Vector stores of real engines against the local index over the same chunks."""

from __future__ import annotations

import copy
import pickle
import uuid

import faiss
import numpy as np
import pytest
from corpus import QUERIES, QUERY, TEXTS, make_model, shared_model
from langchain_core.documents import Document
from llama_index.core import VectorStoreIndex
from stores import ENGINES, documents, in_llama_index, items_for

from qrag_retriever import QRAGEmbedding, QRAGRetriever, langchain, llama_index
from qrag_retriever.errors import (
    ConfigError,
    FingerprintMismatchError,
    InvalidInputError,
    QRAGError,
    VectorStoreError,
)
from qrag_retriever.filters import compile_filter
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
CASES = [
    pytest.param(PLAIN, {"k": 12, "runners_up": 5}, id="none"),
    pytest.param(PLAIN, {"k": 4, "beams": 3}, id="beams"),
    pytest.param(PLAIN, {"k": 9, "chunks_per_step": 2, "q_threshold": 1.9}, id="threshold"),
    pytest.param(RELATIVE, {"k": 5}, id="relative"),
    pytest.param(RELEASED, {"k": 3, "beams": 2}, id="released"),
]


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param], items_for(request.param)


@pytest.fixture(params=ENGINES, scope="module")
def filled(request, tmp_path_factory):
    """A store with all chunks, and its engine; all models here make the same embeddings."""
    own, items = ENGINES[request.param], items_for(request.param)
    return own.fill(PLAIN, tmp_path_factory.mktemp("store"), items), own, items


def over(store, model=PLAIN, **settings):
    return QRAGRetriever.from_vector_store(store, model=model, **settings)


def local(items, model=PLAIN, **settings):
    return QRAGRetriever(index=ChunkIndex.from_documents(items, model=model), **settings)


def id_of(item):
    return getattr(item, "id", None) or item.node_id


def check(found, expected):
    assert found.chunk_ids == expected.chunk_ids
    assert found.stopped == expected.stopped
    for step, other in zip(found, expected, strict=True):
        assert (step.step, step.text) == (other.step, other.text)
        assert step.metadata == other.metadata
        assert step.q_value == pytest.approx(other.q_value, abs=1e-4)
        assert step.position == pytest.approx(other.position, abs=1e-9)
        assert [r.chunk_id for r in step.runners_up] == [r.chunk_id for r in other.runners_up]
        for one, two in zip(step.runners_up, other.runners_up, strict=True):
            assert one.q_value == pytest.approx(two.q_value, abs=1e-4)


@pytest.mark.parametrize(("model", "settings"), CASES)
def test_the_trajectory_of_the_local_index(filled, model, settings):
    store, _, items = filled
    settings = dict(settings)
    call = {"runners_up": settings.pop("runners_up", 3)}
    retriever = over(store, model, number_key="number", **settings)
    oracle = local(items, model, **settings)
    for query in QUERIES if model is PLAIN else [QUERY]:
        found, expected = retriever.search(query, **call), oracle.search(query, **call)
        check(found, expected)
        assert [step.index for step in found] == [step.index for step in expected]
    ids = [id_of(items[2]), *expected.chunk_ids[:2]]
    found = retriever.search_batch(QUERIES[:2], exclude_ids=ids)
    for one, two in zip(found, oracle.search_batch(QUERIES[:2], exclude_ids=ids), strict=True):
        check(one, two)
        assert not set(one.chunk_ids) & set(ids)


async def test_both_roles_in_every_way(filled):
    store, _, items = filled
    retriever, oracle = over(store, k=4), local(items, k=4)
    ids = oracle.search(QUERY).chunk_ids
    assert [found.id for found in retriever.invoke(QUERY)] == ids
    assert [found.id for found in await retriever.ainvoke(QUERY)] == ids
    assert [found.node.node_id for found in retriever.retrieve(QUERY)] == ids
    assert [found.node.node_id for found in await retriever.aretrieve(QUERY)] == ids
    assert [found.id for [found] in retriever.stream(QUERY)] == ids
    found = [[item.id for item in own] for own in await retriever.abatch(QUERIES)]
    assert found == [oracle.search(query).chunk_ids for query in QUERIES]
    assert copy.deepcopy(retriever).search(QUERY).chunk_ids == ids
    alone = langchain.QRAGRetriever.from_vector_store(store, embed_model=PLAIN, k=4)
    assert [found.id for found in alone.invoke(QUERY)] == ids
    alone = llama_index.QRAGRetriever.from_vector_store(store, model=PLAIN, similarity_top_k=4)
    assert [found.node.node_id for found in alone.retrieve(QUERY)] == ids


def test_filters_add_up_and_never_widen(filled):
    store, own, items = filled
    oracle = local(items, k=20)
    tenant = over(store, k=20, filter=own.where(tenant="a"))
    expected = oracle.search(QUERY, filter={"tenant": "a"})
    assert (len(expected), expected.n_candidates) == (20, 24)
    check(tenant.search(QUERY), expected)
    check(
        tenant.search(QUERY, filter=own.where(book="two")),
        oracle.search(QUERY, filter={"tenant": "a", "book": "two"}),
    )
    nothing = tenant.search(QUERY, filter=own.where(tenant="b"))
    assert (len(nothing), nothing.stopped) == (0, "exhausted")
    check(
        over(store, k=20).search(QUERY, filter=own.where(tenant="b", book="two")),
        oracle.search(QUERY, filter={"tenant": "b", "book": "two"}),
    )
    # a filter that was set on the retriever later, too
    late = over(store, k=20)
    late.filter = own.where(tenant="a")
    check(late.search(QUERY), expected)
    check(late.search(QUERY, filter=None), expected)
    check(
        late.search(QUERY, filter=own.where(book="two")),
        oracle.search(QUERY, filter={"tenant": "a", "book": "two"}),
    )
    twin = copy.copy(tenant)
    assert {step.metadata["tenant"] for step in twin.search(QUERY)} == {"a"}


def hostile(name):
    """Filters that would let other tenants in, were they not added to the store's own."""
    if name in ("langchain-postgres", "langchain-chroma", "langchain-faiss"):
        return [{"$or": [{"tenant": "b"}, {"number": {"$gte": 0}}]}, {"number": {"$gte": 0}}]
    if name == "langchain-milvus":
        return ['tenant == "b" or number >= 0', "number >= 0", '(tenant == "b") or (tenant != "")']
    if name == "langchain-qdrant":
        from qdrant_client import models

        tenant = models.FieldCondition(key="metadata.tenant", match=models.MatchValue(value="b"))
        every = models.FieldCondition(key="metadata.number", range=models.Range(gte=0))
        return [models.Filter(should=[tenant, every]), models.Filter(must_not=[tenant])]
    from llama_index.core.vector_stores import FilterCondition, FilterOperator
    from llama_index.core.vector_stores import MetadataFilter as Test
    from llama_index.core.vector_stores import MetadataFilters as Tests

    b, every = Test(key="tenant", value="b"), Test(key="number", value=0, operator=">=")
    return [
        Tests(filters=[b, every], condition=FilterCondition.OR),
        Tests(filters=[b], condition=FilterCondition.NOT),
        Tests(filters=[every, Test(key="tenant", value=None)]),
        Tests(filters=[every, Test(key="tenant", value="x\\' or tenant != '")]),
        Tests(filters=[Test(key="tenant", value="b", operator=FilterOperator.NE)]),
        Tests(filters=[Test(key="tenant", value="' or tenant like '", operator="text_match")]),
    ]


def test_no_filter_lets_another_tenant_in(filled, request):
    store, own, _ = filled
    tenant = over(store, k=20, filter=own.where(tenant="a"))
    found = 0
    for own_filter in hostile(request.node.callspec.id):
        passes = compile_filter(own_filter) if own.portable else lambda chunk: True
        try:
            steps = tenant.search(QUERY, filter=own_filter).steps
        except QRAGError:
            continue
        found += len(steps)
        assert {step.metadata["tenant"] for step in steps} <= {"a"}
        assert all(passes(step.chunk) for step in steps)
    assert found  # some of these filters are in order


def test_positions_within_one_document(filled, request):
    store, own, items = filled
    retriever = over(store, RELATIVE, k=4, number_key="place", filter=own.where(book="two"))
    expected = local(items, RELATIVE, k=4).search(QUERY, filter={"book": "two"})
    found = retriever.search(QUERY)
    check(found, expected)
    assert found.n_candidates == 18
    assert len({step.position for step in found}) > 1


def test_numbers_that_are_not_those_of_one_document(filled, request):
    store, own, items = filled
    if "faiss" in request.node.callspec.id:  # counts its own rows
        found = over(store, RELATIVE, filter=own.where(tenant="a")).search(QUERY)
        expected = local(items, RELATIVE).search(QUERY, filter={"tenant": "a"})
        check(found, expected)
        assert [step.index for step in found] == [step.index for step in expected]
        return
    gaps = over(store, RELATIVE, number_key="number", filter=own.where(tenant="a"))
    with pytest.raises(
        VectorStoreError, match="of the 24 chunks that may be seen, 12 have a number from 0 to 23"
    ):
        gaps.search(QUERY)
    two_books = over(store, RELATIVE, number_key="place")
    with pytest.raises(VectorStoreError, match="a number of its own"):
        two_books.search(QUERY)
    with pytest.raises(VectorStoreError, match="under 'page'"):
        over(store, RELATIVE, number_key="page")
    with pytest.raises(ConfigError, match="number_key"):
        over(store, RELATIVE)


def test_models_that_need_a_query_for_each_chunk(filled):
    for positions in ({"positions": "absolute"}, {"positions": "relative"}):
        with pytest.raises(ConfigError, match="rotated query of its own"):
            over(filled[0], make_model(**positions), number_key="number")


def test_filters_that_are_none_or_of_another_kind(filled):
    store, own, _ = filled
    for wrong in (own.where(), 3, ["tenant"]):
        with pytest.raises(InvalidInputError):
            over(store, filter=wrong)
        with pytest.raises(InvalidInputError):
            over(store).search(QUERY, filter=wrong)


def with_empty_parts(name):
    """Filters that let all tenants pass, and do not look so."""
    if name == "langchain-milvus":
        return ["", " "]
    if name == "langchain-qdrant":
        from qdrant_client import models

        empty, least = models.Filter(), models.MinShould(conditions=[models.Filter()], min_count=1)
        a = models.FieldCondition(key="metadata.tenant", match=models.MatchValue(value="a"))
        every = models.FieldCondition(key="metadata.number", range=models.Range())
        nested = models.Nested(key="metadata", filter=empty)
        return [
            empty,
            models.Filter(must=[]),
            models.Filter(must=[empty]),
            models.Filter(must=empty),
            models.Filter(should=[a, empty]),
            models.Filter(must=[models.Filter(must=[empty])], must_not=[]),
            models.Filter(min_should=least),
            models.Filter(min_should=models.MinShould(conditions=[a], min_count=0)),
            models.Filter(must=[every]),
            models.Filter(must_not=[models.FieldCondition(key="metadata.tenant")]),
            models.Filter(must=[models.NestedCondition(nested=nested)]),
        ]
    if name.startswith("langchain"):
        return [{}, {"$and": [{}]}, {"$or": [{"tenant": "a"}, {}]}, {"$not": {}}, {"tenant": {}}]
    from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

    empty, a = MetadataFilters(filters=[]), MetadataFilter(key="tenant", value="a")
    return [empty, MetadataFilters(filters=[empty]), MetadataFilters(filters=[a, empty])]


@pytest.mark.parametrize("name", ["llama-index-qdrant", "llama-index-milvus"])
def test_llama_index_filters_for_a_document(name, tmp_path):
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo

    items, wanted = items_for(name), {"story": set(), "other": set()}
    for number, item in enumerate(items):
        document = ("story", "other")[number % 2]
        item.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
        wanted[document].add(id_of(item))
    own = ENGINES[name]
    store = own.fill(PLAIN, tmp_path, items)
    for key in ("doc_id", "ref_doc_id"):
        for document, ids in wanted.items():
            found = over(store, k=9, filter=own.where(**{key: document})).search(QUERY)
            assert len(found) == 9
            assert set(found.chunk_ids) <= ids


def test_filters_with_empty_parts(filled, request):
    store, _, _ = filled
    for empty in with_empty_parts(request.node.callspec.id):
        with pytest.raises(InvalidInputError):
            over(store, filter=empty)
        with pytest.raises(InvalidInputError):
            over(store).search(QUERY, filter=empty)


def test_what_the_caller_does_to_a_filter_later_changes_nothing(filled, request):
    store, own, items = filled
    if not own.portable:  # these filters are values
        return
    if request.node.callspec.id.startswith("langchain"):
        values = ["a"]
        mine = {"tenant": {"$in": values}}
    else:
        from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

        mine = MetadataFilters(filters=[MetadataFilter(key="tenant", value=["a"], operator="in")])
        values = mine.filters[0].value
    tenant = over(store, k=20, filter=mine)
    for later in (["a", "b"], ["b"]):
        values[:] = later
        check(tenant.search(QUERY), local(items, k=20).search(QUERY, filter={"tenant": "a"}))


def test_other_models_dimensions_and_empty_stores(engine, tmp_path, tiny_model):
    own, items = engine
    with pytest.raises(VectorStoreError, match="16"):
        over(own.fill(tiny_model, tmp_path / "c", items[:8]))
    other = make_model(scale=0.25)
    with pytest.raises(FingerprintMismatchError, match="another model"):
        over(own.fill(other, tmp_path / "a", items[:8]))
    # LangChain makes a collection of Milvus with the first chunk
    with pytest.raises((InvalidInputError, VectorStoreError), match=r"no chunks|no collection"):
        over(own.fill(PLAIN, tmp_path / "b", []))


def test_other_metrics_are_refused_with_the_reason(engine, tmp_path):
    own, items = engine
    names = {"cosine": "cosine", "l2": "Euclidean distance"}
    for metric in own.metrics:
        store = own.fill(PLAIN, tmp_path / metric, items[:8], metric)
        with pytest.raises(VectorStoreError, match=f"is the {names[metric]}, and Q is an inner"):
            over(store)


def test_a_store_that_goes_away_in_the_middle(engine, tmp_path):
    own, items = engine
    for model, settings in ((PLAIN, {}), (RELATIVE, {"number_key": "number"})):
        store = own.fill(PLAIN, tmp_path / model.config.positions, items[:8])
        steps = over(store, model, k=4, **settings).stream_search(QUERY)
        next(steps)
        own.drop(store)
        with pytest.raises(VectorStoreError):
            next(steps)


def test_what_a_store_does_not_do(filled):
    retriever = over(filled[0])
    with pytest.raises(InvalidInputError, match="temperature"):
        retriever.search(QUERY, temperature=0.1)
    with pytest.raises(InvalidInputError, match="temperature"):
        retriever.temperature = 0.1
    with pytest.raises(InvalidInputError, match="only reads"):
        retriever.add_texts(["new"])
    with pytest.raises(InvalidInputError, match="no Q-values"):
        retriever.search(QUERY).plot()


@pytest.mark.parametrize("name", ["langchain-qdrant", "langchain-faiss"])
def test_chunks_added_later_are_found(name, tmp_path):
    own, items = ENGINES[name], documents()[:14]
    store = own.fill(PLAIN, tmp_path, items[:10])
    retriever = over(store, k=5)
    check(retriever.search(QUERY), local(items[:10], k=5).search(QUERY))
    store.add_documents(items[10:], ids=[item.id for item in items[10:]])
    check(retriever.search(QUERY), local(items, k=5).search(QUERY))
    kept = [item for item in items if item.id not in retriever.search(QUERY).chunk_ids[:2]]
    store.delete(retriever.search(QUERY).chunk_ids[:2])
    check(retriever.search(QUERY), local(kept, k=5).search(QUERY))


def test_a_llama_index_over_a_store_takes_its_place(tmp_path):
    own, items = ENGINES["llama-index-qdrant"], items_for("llama-index-qdrant")[:8]
    store = own.fill(PLAIN, tmp_path, items)
    index = VectorStoreIndex.from_vector_store(store, embed_model=QRAGEmbedding(PLAIN))
    check(over(index, k=4).search(QUERY), local(items, k=4).search(QUERY))


def test_llama_index_faiss_without_its_texts(tmp_path):
    own, items = ENGINES["llama-index-faiss"], items_for("llama-index-faiss")[:8]
    index = own.fill(PLAIN, tmp_path, items)
    with pytest.raises(VectorStoreError, match="give the VectorStoreIndex"):
        over(index.vector_store)


def test_llama_index_faiss_that_maps_ids(tmp_path):
    module = pytest.importorskip("llama_index.vector_stores.faiss")
    store = module.FaissMapVectorStore(faiss.IndexIDMap2(faiss.IndexFlatIP(PLAIN.dimension)))
    index = in_llama_index(store, PLAIN, items_for("llama-index-faiss")[:8])
    for made in (store, index):
        with pytest.raises(VectorStoreError, match="belongs to which row; use a FaissVectorStore"):
            over(made)


def test_faiss_with_compressed_vectors(tmp_path):
    own, items = ENGINES["langchain-faiss"], documents()
    store = own.fill(PLAIN, tmp_path, [])
    store.index = faiss.index_factory(PLAIN.dimension, "PQ4x2", faiss.METRIC_INNER_PRODUCT)
    store.index.train(PLAIN.encode_actions([item.page_content for item in items]))
    store.add_documents(items, ids=[item.id for item in items])
    with pytest.raises(FingerprintMismatchError, match="another metric, or compressed vectors"):
        over(store)


@pytest.mark.parametrize("name", ["langchain-qdrant", "langchain-faiss"])
def test_sentences_that_stand_in_a_document_many_times(name, tmp_path):
    numbers = np.random.default_rng(7).integers(0, 6, 300).tolist()
    items = [
        Document(TEXTS[number], id=str(uuid.UUID(int=place)), metadata={"number": place})
        for place, number in enumerate(numbers)
    ]
    store = ENGINES[name].fill(PLAIN, tmp_path, items)
    # Qdrant's local mode takes a second for the searches of a step with positions
    for model in (PLAIN,) if "qdrant" in name else (PLAIN, RELATIVE, RELEASED):
        retriever, oracle = over(store, model, number_key="number", k=12), local(items, model, k=12)
        for query in QUERIES:
            check(retriever.search(query), oracle.search(query))


@pytest.mark.parametrize("model", [PLAIN, RELATIVE], ids=["none", "relative"])
def test_a_retriever_can_be_pickled_where_its_store_can(model, tmp_path):
    own, items = ENGINES["langchain-faiss"], documents()
    store = own.fill(PLAIN, tmp_path, items)
    retriever = over(store, model, k=4, filter={"tenant": "a"})
    again = pickle.loads(pickle.dumps(retriever))
    check(again.search(QUERY), retriever.search(QUERY))


@pytest.mark.parametrize("kind", ["HNSW32,Flat", "IVF2,Flat"])
def test_approximate_faiss_indexes(kind, tmp_path):
    own, items = ENGINES["langchain-faiss"], documents()
    store = own.fill(PLAIN, tmp_path, [])
    vectors = PLAIN.encode_actions([item.page_content for item in items])
    store.index = faiss.index_factory(PLAIN.dimension, kind, faiss.METRIC_INNER_PRODUCT)
    store.index.train(vectors)
    if "IVF" in kind:
        store.index.nprobe = 2
    store.add_documents(items, ids=[item.id for item in items])
    for model, chosen in ((PLAIN, None), (RELATIVE, None), (RELATIVE, {"book": "two"})):
        check(
            over(store, model).search(QUERY, filter=chosen),
            local(items, model).search(QUERY, filter=chosen),
        )


def test_an_approximate_index_that_finds_too_few_is_no_short_list(tmp_path):
    import faiss

    own, rng = ENGINES["langchain-faiss"], np.random.default_rng(0)
    items = [Document(f"text {i}", id=str(i), metadata={"i": i}) for i in range(600)]
    store = own.fill(PLAIN, tmp_path, [])
    store.index = faiss.index_factory(PLAIN.dimension, "HNSW4", faiss.METRIC_INNER_PRODUCT)
    store.index.hnsw.efSearch = 1
    store.add_documents(items, ids=[item.id for item in items])
    picked = rng.choice(600, 3, replace=False).tolist()
    with pytest.raises(VectorStoreError, match="looks at too few"):
        over(store).search(QUERY, filter={"i": {"$in": picked}})
    with pytest.raises(VectorStoreError, match="looks at too few"):
        over(store, filter={"i": {"$in": picked}})


def test_points_that_hold_no_node(tmp_path):
    own, items = ENGINES["llama-index-qdrant"], items_for("llama-index-qdrant")[:8]
    store = own.fill(PLAIN, tmp_path, [])
    models = pytest.importorskip("qdrant_client").models
    vectors = PLAIN.encode_actions([item.text for item in items]).tolist()
    store.client.upsert(
        store.collection_name,
        [
            models.PointStruct(id=number, vector=vector, payload={"text": item.text})
            for number, (vector, item) in enumerate(zip(vectors, items, strict=True))
        ],
    )
    expected = [str(step.index) for step in local(items, k=8).search(QUERY)]
    assert over(store, k=8).search(QUERY).chunk_ids == expected


def test_points_without_a_text(tmp_path):
    own, items = ENGINES["langchain-qdrant"], documents()[:8]
    store = own.fill(PLAIN, tmp_path, items)
    retriever = over(store, k=8)
    store.client.delete_payload(store.collection_name, ["page_content"], points=[items[3].id])
    with pytest.raises(VectorStoreError, match="without a text under 'page_content'"):
        retriever.search(QUERY)
