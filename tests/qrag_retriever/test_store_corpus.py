"""Search over a store, with one made here that can be told to go wrong."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from corpus import IDS, METADATAS, QUERIES, QUERY, TEXTS, make_index, make_model, shared_model
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQueryResult,
)

from qrag_retriever import QRAGEmbeddings, QRAGRetriever
from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import (
    ConfigError,
    FingerprintMismatchError,
    InvalidInputError,
    QRAGError,
    VectorStoreError,
)
from qrag_retriever.index import ChunkIndex
from qrag_retriever.vector_stores import corpus as store_corpus
from qrag_retriever.vector_stores.mapping import LangChainChroma, LangChainPostgres
from qrag_retriever.vector_stores.milvus import LangChainMilvus, LlamaIndexMilvus
from qrag_retriever.vector_stores.store import Request, Store

PLAIN = shared_model()
RELATIVE = make_model("relative", truncate_positions=True)
CHUNKS = [
    Chunk(id_, text, metadata) for id_, text, metadata in zip(IDS, TEXTS, METADATAS, strict=True)
]


class Memory(Store):
    """Chunks and vectors in memory, searched by a slow loop."""

    kind = "Memory"

    def __init__(self, chunks=CHUNKS, vectors=None, score=lambda v, q: float(v @ q)):
        super().__init__("number")
        self.chunks = list(chunks)
        self.vectors = PLAIN.encode_actions(TEXTS) if vectors is None else vectors
        self.score = score
        self.ascending = False
        self.lost, self.error, self.searches = 0, None, 0

    def _narrowed(self, filter):
        return copy.copy(self)

    def _search(self, requests):
        if self.error is not None:
            raise self.error
        self.searches += 1
        return [self.nearest(request) for request in requests]

    def nearest(self, request):
        low, high = request.numbers or (0, len(self.chunks))
        hits = [
            self.hit(chunk, self.score(vector, request.vector))
            for chunk, vector in zip(self.chunks, self.vectors, strict=True)
            if request.numbers is None or low <= chunk.metadata["number"] < high
        ]
        hits.sort(key=lambda hit: hit.score if self.ascending else -hit.score)
        return hits[: max(request.limit - self.lost, 0)]

    def _count(self, numbers):
        low, high = numbers or (-1, 1 << 60)
        return sum(low <= chunk.metadata["number"] < high for chunk in self.chunks)


@pytest.fixture
def over(monkeypatch):
    monkeypatch.setattr(store_corpus, "open_store", lambda store, number_key: store)
    return lambda store, model=PLAIN, **settings: QRAGRetriever.from_vector_store(
        store, model=model, **settings
    )


def cosine(vector, query):
    return float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query))


def distance(vector, query):
    return float(np.linalg.norm(vector - query))


@pytest.mark.parametrize("model", [PLAIN, RELATIVE], ids=["none", "relative"])
@pytest.mark.parametrize(
    "convention", [(1, 0), (-1, 0), (-1, 1)], ids=["ip", "negative ip", "one minus ip"]
)
def test_conventions(over, model, convention):
    sign, offset = convention
    store = Memory(score=lambda vector, query: offset + sign * float(vector @ query))
    store.ascending = sign < 0
    oracle = QRAGRetriever(index=make_index(model), k=4)
    for query in QUERIES:
        found, expected = over(store, model, k=4).search(query), oracle.search(query)
        assert found.chunk_ids == expected.chunk_ids
        q_values = [step.q_value for step in expected]
        assert [step.q_value for step in found] == pytest.approx(q_values, abs=1e-5)


@pytest.mark.parametrize(
    ("score", "metric"),
    [
        (cosine, "cosine"),
        (lambda v, q: 1 - cosine(v, q), "cosine"),
        (lambda v, q: (1 + cosine(v, q)) / 2, "cosine"),
        (distance, "Euclidean"),
        (lambda v, q: distance(v, q) ** 2, "Euclidean"),
        (lambda v, q: -distance(v, q), "Euclidean"),
    ],
)
def test_metrics_that_are_no_inner_product(over, score, metric):
    with pytest.raises(VectorStoreError, match=f"is the {metric}.*inner product"):
        over(Memory(score=score))


def test_another_model(over):
    for vectors in (
        make_model(scale=0.505).encode_actions(TEXTS),
        PLAIN.encode_actions(TEXTS)[::-1],
    ):
        with pytest.raises(FingerprintMismatchError, match="filled by another model"):
            over(Memory(vectors=vectors))
    manhattan = Memory(score=lambda vector, query: -float(abs(vector - query).sum()))
    with pytest.raises(FingerprintMismatchError, match="another metric, or compressed vectors"):
        over(manhattan)
    halved = PLAIN.encode_actions(TEXTS).astype(np.float16).astype(np.float32)
    over(Memory(vectors=halved))  # stores may keep half precision
    with pytest.raises(FingerprintMismatchError):
        QRAGRetriever(index=over(Memory()).index, model=make_model(scale=0.25))


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("n", [1, 8, 500])
def test_runs_of_equal_positions(over, monkeypatch, n, k):
    vectors = np.random.default_rng(n).normal(size=(n, PLAIN.dimension)).astype(np.float32)
    chunks = [Chunk(str(row), f"text {row}", {"number": row}) for row in range(n)]
    monkeypatch.setattr(store_corpus, "score_to_q", lambda store, model: float)
    oracle = QRAGRetriever(
        index=ChunkIndex.from_embeddings(chunks, vectors, model=RELATIVE), k=k, beams=2
    )
    order = np.random.default_rng(0).permutation(n)
    store = Memory([chunks[row] for row in order], vectors[order])
    retriever = over(store, RELATIVE, k=k, beams=2)
    for query in QUERIES:
        found, expected = retriever.search(query), oracle.search(query)
        assert found.chunk_ids == expected.chunk_ids
        assert [step.position for step in found] == [step.position for step in expected]
        assert found.stopped == expected.stopped


def test_one_search_a_step_for_all_queries_and_beams(over):
    for model in (PLAIN, RELATIVE):
        retriever = over(store := Memory(), model, k=3, beams=2)
        monitored = retriever.index._store
        monitored.searches = 0
        seen = []
        narrowed = monitored.narrowed
        monitored.narrowed = lambda own, n=narrowed, s=seen: s.append(n(own)) or s[-1]
        retriever.search_batch(QUERIES)
        assert [view.searches for view in seen] == [3]
        assert store.searches == 0  # a search looks at a view of its own


def test_states_in_document_order(over):
    model = make_model(state_order="document")
    oracle = QRAGRetriever(index=make_index(model), k=5)
    for query in QUERIES:
        found = over(Memory(), model, k=5).search(query)
        assert found.chunk_ids == oracle.search(query).chunk_ids
    nameless = Memory()
    nameless.number_key = None
    with pytest.raises(ConfigError, match="give the key as number_key"):
        over(nameless, model)
    found = over(nameless, k=5).search(QUERY)
    assert found.chunk_ids == over(Memory(), k=5).search(QUERY).chunk_ids
    assert [step.index for step in found] == [-1] * 5


@pytest.mark.parametrize("model", [PLAIN, RELATIVE], ids=["none", "relative"])
def test_excluded_ids(over, model):
    oracle = QRAGRetriever(index=make_index(model), k=3)
    best = oracle.search(QUERY, k=5).chunk_ids
    for ids in (best[:1], best[:4]):
        found = over(Memory(), model, k=3).search(QUERY, exclude_ids=[*ids, "elsewhere"])
        assert found.chunk_ids == oracle.search(QUERY, exclude_ids=ids).chunk_ids
        assert not set(found.chunk_ids) & set(ids)


def test_equal_chunks_come_in_document_order(over):
    chunks = [
        *CHUNKS,
        *(Chunk(f"again-{c.id}", c.text, {"number": 9 + i}) for i, c in enumerate(CHUNKS)),
    ]
    oracle = QRAGRetriever(index=ChunkIndex.from_documents(chunks, model=PLAIN), k=6)
    vectors = PLAIN.encode_actions(TEXTS)
    store = Memory(chunks[::-1], np.concatenate([vectors, vectors])[::-1])
    found = over(store, k=6).search(QUERY, runners_up=18)  # so that all are seen together
    assert found.chunk_ids == oracle.search(QUERY).chunk_ids


def repeated(model, seed):
    """A document of few sentences, its index, and a store whose order is another."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, random.integers(1, len(TEXTS) + 1), random.integers(9, 300))
    chunks = [Chunk(str(n), TEXTS[row], {"number": n}) for n, row in enumerate(rows.tolist())]
    vectors = PLAIN.encode_actions(TEXTS)[rows]
    order = random.permutation(len(rows))
    store = Memory([chunks[n] for n in order], vectors[order])
    return ChunkIndex.from_embeddings(chunks, vectors, model=model), store


@pytest.mark.parametrize("settings", [{"k": 6}, {"k": 6, "chunks_per_step": 2, "runners_up": 1}])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model", [PLAIN, RELATIVE], ids=["none", "relative"])
def test_sentences_that_stand_in_a_document_many_times(over, model, seed, settings):
    index, store = repeated(model, seed)
    settings = dict(settings)
    call = {"runners_up": settings.pop("runners_up", 3)}
    oracle = QRAGRetriever(index=index, **settings)
    for query in QUERIES:
        expected = oracle.search(query, **call)
        found = over(store, model, **settings).search(query, **call)
        assert found.chunk_ids == expected.chunk_ids
        for step, other in zip(found, expected, strict=True):
            assert [r.chunk_id for r in step.runners_up] == [r.chunk_id for r in other.runners_up]
    ids = [*expected.chunk_ids[:2], "elsewhere"]
    found = over(store, model, **settings).search(QUERY, exclude_ids=ids)
    assert found.chunk_ids == oracle.search(QUERY, exclude_ids=ids[:2]).chunk_ids


@pytest.mark.parametrize("most", [16, 1000])
def test_how_many_equal_chunks_are_asked_for(over, monkeypatch, most):
    monkeypatch.setattr(store_corpus, "_MOST", most)
    chunks = [Chunk(str(n), TEXTS[0], {"number": n}) for n in range(99, -1, -1)]
    store = Memory(chunks, np.repeat(PLAIN.encode_actions(TEXTS[:1]), 100, axis=0))
    limits = []
    store.nearest = lambda request: limits.append(request.limit) or Memory.nearest(store, request)
    retriever = over(store, k=1)
    limits.clear()
    [found] = retriever.search(QUERY, runners_up=3)
    assert limits == ([5, 16] if most == 16 else [5, 20, 80, 320])
    assert found.chunk.id == ("84" if most == 16 else "0")


class Narrow(Memory):
    """As an approximate index that never finds more than so many chunks."""

    most = 5

    def nearest(self, request):
        return super().nearest(request)[: self.most]


def test_a_store_that_finds_no_more_than_are_needed(over):
    rows = [0] * 40 + [1] * 40
    chunks = [Chunk(str(n), TEXTS[row], {"number": n}) for n, row in enumerate(rows)]
    retriever = over(Narrow(chunks, PLAIN.encode_actions(TEXTS)[rows]), RELATIVE, k=2)
    assert len(retriever.search(QUERY, runners_up=3)) == 2
    retriever.index._store.most = 3
    with pytest.raises(VectorStoreError, match="returned 3 of 4 chunks"):
        retriever.search(QUERY, runners_up=3)


def test_a_store_that_cuts_lists_short_is_no_exhausted_one(over):
    retriever = over(Narrow(CHUNKS, PLAIN.encode_actions(TEXTS)), k=4)
    retriever.index._store.most = 7
    assert len(retriever.search(QUERY)) == 4
    retriever.index._store.most = 6
    with pytest.raises(VectorStoreError, match=r"returned 6 chunks of 7 .* too few"):
        retriever.search(QUERY)
    retriever.index._store.most = 0
    with pytest.raises(VectorStoreError, match="returned 0 chunks of 1 "):
        over(retriever.index._store)
    few = over(Memory(CHUNKS[:3], PLAIN.encode_actions(TEXTS[:3])), k=9).search(QUERY)
    assert (len(few), few.stopped) == (3, "exhausted")


def test_llama_indexs_milvus_is_not_asked_what_it_would_mistranslate():
    store = LlamaIndexMilvus(Nameless(), None)
    b = MetadataFilter(key="tenant", value="b")
    begins = MetadataFilter(key="tenant", value="b", operator=FilterOperator.TEXT_MATCH)
    for filters, message in (
        (MetadataFilters(filters=[b], condition=FilterCondition.NOT), "condition NOT"),
        (MetadataFilters(filters=[begins]), "text_match"),
    ):
        for whole in (filters, MetadataFilters(filters=[b, filters])):
            with pytest.raises(InvalidInputError, match=message):
                store.narrowed(whole)


def test_what_fails_is_our_error_with_the_cause(over):
    store = Memory()
    store.error = ConnectionError("no route")
    with pytest.raises(VectorStoreError, match=r"Memory failed in a search .*: no route") as caught:
        over(store)
    assert isinstance(caught.value.__cause__, ConnectionError)
    store.error = AssertionError()
    with pytest.raises(VectorStoreError, match="AssertionError"):
        over(store)


def test_what_cannot_be_right_is_refused(over):
    twice = Memory([*CHUNKS[:-1], Chunk(IDS[0], TEXTS[-1], METADATAS[-1])])
    with pytest.raises(VectorStoreError, match="two chunks with the id 'fact-0'"):
        over(twice).search(QUERY, runners_up=9)
    for wrong in (None, "3", 2.0, True):
        numberless = Memory([*CHUNKS[:-1], Chunk("x", TEXTS[-1], {"number": wrong})])
        with pytest.raises(VectorStoreError, match="every chunk its number"):
            over(numberless).search(QUERY, runners_up=9)
    same = Memory([*CHUNKS[:-1], Chunk("x", TEXTS[-1], METADATAS[3])])
    with pytest.raises(VectorStoreError, match="a number of its own"):
        over(same, RELATIVE).search(QUERY)
    steps = over(renamed := Memory(), RELATIVE).stream_search(QUERY)
    next(steps)
    renamed.chunks[:] = [Chunk(f"new-{c.id}", c.text, c.metadata) for c in CHUNKS]
    with pytest.raises(VectorStoreError, match=r"have the same number .*changed during the search"):
        next(steps)
    steps = over(moved := Memory(), RELATIVE).stream_search(QUERY)
    place = IDS.index(next(steps).chunk.id)
    other = (place + 1) % len(CHUNKS)
    for here, there in ((place, other), (other, place)):
        moved.chunks[here] = Chunk(IDS[here], TEXTS[here], METADATAS[there])
    with pytest.raises(VectorStoreError, match=r"had the number .*changed during the search"):
        list(steps)
    retriever = over(Memory(), RELATIVE)
    retriever.index._store.lost = 1
    with pytest.raises(VectorStoreError, match="returned 0 of 1 chunks"):
        retriever.search(QUERY)
    bad = over(Memory())
    bad.index._store.score = lambda vector, query: float("nan")
    with pytest.raises(QRAGError, match="NaN"):
        bad.search(QUERY)


def test_kinds_that_cannot_serve():
    nodes = [TextNode(text="a")]
    for store, reason in (
        (InMemoryVectorStore(QRAGEmbeddings(PLAIN)), "it computes the cosine"),
        (VectorStoreIndex(nodes, embed_model=MockEmbedding(16)), "it computes the cosine"),
        (VectorStoreIndex(nodes, embed_model=MockEmbedding(16)).vector_store, "the cosine"),
        ({"a": 1}, "A dict cannot serve.*Supported: Chroma"),
    ):
        with pytest.raises(VectorStoreError, match=reason):
            QRAGRetriever.from_vector_store(store, model=PLAIN)


class Idless:
    """A store of LangChain whose documents have no ids."""

    col = True
    _primary_field = "pk"

    def found(self, vector, k, **_):
        return [(Document("text", metadata={"number": 0}), 1.0)]

    similarity_search_with_score_by_vector = found
    similarity_search_by_vector_with_relevance_scores = found


@pytest.mark.parametrize("kind", [LangChainChroma, LangChainPostgres, LangChainMilvus])
def test_documents_without_an_id(kind):
    store = kind(Idless(), None)
    with pytest.raises(VectorStoreError, match=r"without an id|without its primary key"):
        store.search([Request(np.ones(4, dtype=np.float32), 3)])


class Nameless:
    """As LlamaIndex's Milvus where entities hold no node: it makes one up for each hit."""

    collection_name = "chunks"
    client = SimpleNamespace(query=lambda *_, **__: [{"count(*)": len(TEXTS)}])

    def query(self, query, string_expr):
        q_values = PLAIN.encode_actions(TEXTS) @ np.array(query.query_embedding, dtype=np.float32)
        best = np.argsort(-q_values)[: query.similarity_top_k].tolist()
        return VectorStoreQueryResult(
            nodes=[TextNode(text=TEXTS[row]) for row in best],
            similarities=q_values[best].tolist(),
            ids=[1000 + row for row in best],
        )


def test_nodes_whose_ids_are_made_up(over):
    store = LlamaIndexMilvus(Nameless(), None)
    expected = QRAGRetriever(index=make_index(PLAIN), k=9).search(QUERY)
    ids = [f"100{step.index}" for step in expected]
    assert over(store, k=9).search(QUERY).chunk_ids == ids
    assert [found.node.node_id for found in over(store, k=9).retrieve(QUERY)] == ids
    found = over(store, k=4).search(QUERY, exclude_ids=ids[:2])
    assert not set(found.chunk_ids) & set(ids[:2])


@pytest.mark.parametrize("kind", [LangChainChroma, LangChainPostgres])
def test_mappings_with_empty_parts(kind):
    store = kind(Idless(), None)
    a = {"tenant": "a"}
    for filled in (a, {"tenant": {"$in": ["a"]}}, {"$and": [a, {"$or": [a, a]}]}, {"$not": a}):
        assert store.narrowed(filled).filters == (filled,)
    for empty in (
        {},
        {"$and": [{}]},
        {"$and": []},
        {"$or": [a, {}]},
        {"$and": [a, {"$or": [{"$and": [{}]}]}]},
        {"$not": {}},
        {"tenant": {}},
        {**a, "$or": ()},
    ):
        with pytest.raises(InvalidInputError, match="a part of it holds no condition"):
            store.narrowed(empty)


class Client:
    """As much of Milvus as it takes to see the filter it is given."""

    client = property(lambda self: self)
    collection_name = "c"

    def query(self, name, filter, output_fields):
        self.filter = filter
        return [{"count(*)": 0}]


def test_expressions_cannot_leave_their_brackets():
    client = Client()
    with pytest.raises(InvalidInputError, match="not a field name"):
        LangChainMilvus(client, "number) or (1 == 1")
    tenant = LangChainMilvus(client, "number").narrowed('tenant == "a"')
    narrowed = tenant.narrowed('(x == ")\\"" or y == \'(\') and z in ["(", \'"\']')
    narrowed.count((2, 5))
    assert client.filter == (
        '(tenant == "a") and ((x == ")\\"" or y == \'(\') and z in ["(", \'"\'])'
        " and (number >= 2 and number < 5)"
    )
    for expression in (
        'x == 1) or (tenant == "b"',
        ") or (1 == 1",
        "x == 1)",
        "(x == 1",
        'x == "',
        "x == 'a\\'",
        '")" == ")") or ("(" == "("',
    ):
        with pytest.raises(InvalidInputError, match="do not match"):
            tenant.narrowed(expression)
