"""What the retriever returns to LlamaIndex and tells it, and how it is made and stored there."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from corpus import IDS, QUERIES, QUERY, TEXTS, make_index, make_model, model_copy_in
from llama_index.core import (
    MockEmbedding,
    StorageContext,
    SummaryIndex,
    VectorStoreIndex,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.events.retrieval import (
    RetrievalEndEvent,
    RetrievalStartEvent,
)
from llama_index.core.schema import MetadataMode, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters
from llama_index_helpers import INDEX, MODEL, NODES, contents, ids, instrumented

from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.llama_index import QRAGRetriever, QRAGStepEvent


def make(**settings) -> QRAGRetriever:
    return QRAGRetriever(INDEX, **settings)


# results


@pytest.mark.parametrize("settings", [{}, {"similarity_top_k": 5}, {"k": 4, "beams": 3}], ids=repr)
async def test_nodes_are_the_steps_of_the_search(settings):
    retriever = make(**settings)
    trajectory = retriever.search(QUERY)
    expected = [(NODES[step.index], step.q_value) for step in trajectory]
    for query in (QUERY, QueryBundle(QUERY), QueryBundle("q", custom_embedding_strs=["x"])):
        found = contents(retriever.retrieve(query))
        assert found == contents(await retriever.aretrieve(query))
        if not isinstance(query, QueryBundle) or query.query_str == QUERY:
            assert found == expected


def test_a_node_comes_back_with_all_it_had():
    for found in make(k=9).retrieve(QUERY):
        original = NODES[IDS.index(found.node.node_id)]
        assert type(found.node) is TextNode
        assert found.node == original
        assert found.node is not original
        for mode in MetadataMode:
            assert found.node.get_content(mode) == original.get_content(mode)
        assert found.node.ref_doc_id == "book"


def test_nodes_are_new_on_every_call():
    retriever = make()
    expected = contents(make().retrieve(QUERY))
    for found in retriever.retrieve(QUERY):
        found.node.metadata["written"] = True
        found.node.relationships.clear()
        found.node.excluded_embed_metadata_keys.append("written")
        found.node.set_content("written")
        found.score = 0.0
    assert contents(retriever.retrieve(QUERY)) == expected


def test_the_encoder_reads_what_a_node_wants_to_be_embedded(monkeypatch):
    model, read = make_model(), []
    encode = model.encode_actions
    monkeypatch.setattr(
        model, "encode_actions", lambda texts, **more: read.extend(texts) or encode(texts, **more)
    )
    QRAGRetriever.from_defaults(nodes=NODES, model=model)
    assert read == [node.get_content(MetadataMode.EMBED) for node in NODES]
    assert "tenant: a" in read[0]
    assert "number" not in read[0]


def test_threads_at_once_get_what_one_gets():
    retriever = make()
    expected = {query: retriever.retrieve(query) for query in QUERIES}
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        query = QUERIES[number % len(QUERIES)]
        return [(query, retriever.retrieve(query)) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for query, found in itertools.chain(*pool.map(work, range(8))):
            assert ids(found) == ids(expected[query])
            # searches that share an encoder pass may differ in the last digit
            scores = [node.score for node in expected[query]]
            assert [node.score for node in found] == pytest.approx(scores, rel=1e-4, abs=1e-4)


async def test_the_event_loop_goes_on_during_a_search(monkeypatch):
    model = make_model()
    retriever = QRAGRetriever(make_index(model))
    encode, encoding, go_on = model.encode_states, threading.Event(), threading.Event()

    def wait_for_the_other(states):
        encoding.set()
        assert go_on.wait(60), "the event loop stood still"
        return encode(states)

    async def other():
        while not encoding.is_set():
            await asyncio.sleep(0.001)
        go_on.set()

    monkeypatch.setattr(model, "encode_states", wait_for_the_other)
    await asyncio.gather(retriever.aretrieve(QUERY), other())
    assert go_on.is_set()


# events


@pytest.mark.parametrize("settings", [{}, {"beams": 3}], ids=repr)
async def test_every_step_is_an_event(settings):
    retriever = make(**settings)
    expected = [
        (QUERY, step.step, step.chunk_id, step.index, step.q_value, step.position)
        for step in retriever.search(QUERY)
    ]
    for awaited in (False, True):
        with instrumented() as (events, spans):
            await retriever.aretrieve(QUERY) if awaited else retriever.retrieve(QUERY)
        assert [type(event) for event in events] == [
            RetrievalStartEvent,
            *[QRAGStepEvent] * 3,
            RetrievalEndEvent,
        ]
        steps = events[1:-1]
        assert [
            (e.query, e.step, e.chunk_id, e.index, e.q_value, e.position) for e in steps
        ] == expected
        assert {event.class_name() for event in steps} == {"QRAGStepEvent"}
        [span] = {event.span_id.rsplit("-", 5)[0] for event in steps}
        assert span.startswith("QRAGRetriever")
        assert len([name for name in spans if "retrieve" in name]) == len(spans)


async def test_the_callback_manager_hears_of_each_retrieval():
    debug = LlamaDebugHandler(print_trace_on_end=False)
    retriever = make(callback_manager=CallbackManager([debug]))
    for awaited in (False, True):
        debug.flush_event_logs()
        await retriever.aretrieve(QUERY) if awaited else retriever.retrieve(QUERY)
        [(start, end)] = debug.get_event_pairs(CBEventType.RETRIEVE)
        assert start.payload["query_str"] == QUERY
        assert ids(end.payload["nodes"]) == retriever.search(QUERY).chunk_ids


def test_no_event_without_a_retrieval():
    with instrumented() as (events, spans):
        make().search(QUERY)
    assert (events, spans) == ([], [])


# constructors


def vector_store_index():
    return VectorStoreIndex(nodes=NODES, embed_model=MockEmbedding(embed_dim=4))


def docstore():
    store = SimpleDocumentStore()
    store.add_documents(NODES)
    return store


@pytest.mark.parametrize(
    "source",
    [
        lambda: {"index": INDEX},
        lambda: {"index": vector_store_index(), "model": MODEL},
        lambda: {"index": SummaryIndex(nodes=NODES), "embed_model": MODEL},
        lambda: {"nodes": NODES, "model": MODEL},
        lambda: {"docstore": docstore(), "model": MODEL},
    ],
    ids=["ChunkIndex", "VectorStoreIndex", "SummaryIndex", "nodes", "docstore"],
)
def test_from_defaults(source):
    retriever = QRAGRetriever.from_defaults(**source(), similarity_top_k=4)
    assert contents(retriever.retrieve(QUERY)) == contents(make(k=4).retrieve(QUERY))


@pytest.mark.parametrize("kind", [VectorStoreIndex, SummaryIndex])
def test_from_defaults_searches_what_an_index_holds(kind):
    shared = StorageContext.from_defaults()
    index, _ = (
        kind(some, storage_context=shared, embed_model=MockEmbedding(embed_dim=4))
        for some in (NODES[:5], NODES[5:])
    )
    index.delete_nodes([NODES[2].node_id])
    retriever = QRAGRetriever.from_defaults(index, model=MODEL, similarity_top_k=9)
    assert sorted(ids(retriever.retrieve(QUERY))) == sorted(
        node.node_id for number, node in enumerate(NODES[:5]) if number != 2
    )


def test_an_index_of_another_kind_is_not_guessed_at():
    index = SimpleNamespace(docstore=docstore(), index_struct=object())
    with pytest.raises(InvalidInputError, match=r"SimpleNamespace holds is not known; give nodes="):
        QRAGRetriever.from_defaults(index, model=MODEL)


def test_from_defaults_takes_the_path_of_the_model(tmp_path):
    path = model_copy_in(tmp_path, "relative")
    for source in ({"index": INDEX, "model": path}, {"index": INDEX, "embed_model": path}):
        retriever = QRAGRetriever.from_defaults(**source)
        assert ids(retriever.retrieve(QUERY)) == ids(make().retrieve(QUERY))
    retriever = QRAGRetriever.from_defaults(nodes=NODES, embed_model=path)
    assert ids(retriever.retrieve(QUERY)) == ids(make().retrieve(QUERY))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "exactly one of index, nodes and docstore; 0"),
        ({"index": INDEX, "nodes": NODES}, "exactly one of index, nodes and docstore; 2"),
        ({"index": NODES}, "list holds no nodes"),
        ({"docstore": "folder"}, "str holds no nodes"),
        ({"nodes": []}, "no nodes"),
        ({"docstore": SimpleDocumentStore()}, "no nodes"),
        ({"nodes": NODES, "embed_model": MockEmbedding(embed_dim=4)}, "not MockEmbedding"),
        ({"nodes": NODES, "model": MODEL, "embed_model": "other"}, "one setting under two names"),
    ],
)
def test_from_defaults_says_what_it_needs(source, message):
    with pytest.raises(InvalidInputError, match=message):
        QRAGRetriever.from_defaults(**source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kk": 3}, "'kk'"),
        ({"k": 0}, "k=0"),
        ({"k": 2, "similarity_top_k": 3}, "one setting under two names"),
        ({"filter": {"a": 1}, "filters": {"a": 2}}, "one setting under two names"),
        ({"model": 3}, "QRAGModel"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        QRAGRetriever(INDEX, **settings)


def test_an_index_of_another_model_is_refused():
    with pytest.raises(FingerprintMismatchError):
        QRAGRetriever(INDEX, make_model(scale=0.25))


def test_both_names_of_a_setting_are_one():
    retriever = make(similarity_top_k=4, k=4)
    assert (retriever.k, retriever.similarity_top_k) == (4, 4)
    retriever.similarity_top_k = 2
    retriever.filters = {"tenant": "b"}
    assert (retriever.k, retriever.filter) == (2, {"tenant": "b"})
    assert len(retriever.retrieve(QUERY)) == 2


def test_metadata_filters_let_nothing_else_through():
    filters = MetadataFilters(
        filters=[
            MetadataFilter(key="tenant", value="b"),
            MetadataFilter(key="number", value=2, operator=FilterOperator.GT),
        ]
    )
    retriever = QRAGRetriever.from_defaults(INDEX, similarity_top_k=9, filters=filters)
    assert sorted(ids(retriever.retrieve(QUERY))) == ["fact-3", "fact-5", "fact-7"]


# storage and copies


def test_persist(tmp_path, monkeypatch):
    retriever = QRAGRetriever.from_defaults(nodes=NODES, model=MODEL, similarity_top_k=4, beams=2)
    retriever.persist(tmp_path / "saved")
    expected = contents(retriever.retrieve(QUERY))
    for loaded in (
        QRAGRetriever.from_persist_dir(tmp_path / "saved"),
        QRAGRetriever.from_persist_dir(str(tmp_path / "saved"), model=MODEL),
    ):
        monkeypatch.setattr(type(loaded.model), "encode_actions", None)  # nothing embedded again
        assert (loaded.similarity_top_k, loaded.beams) == (4, 2)
        assert contents(loaded.retrieve(QUERY)) == expected
        monkeypatch.undo()
    loaded = QRAGRetriever.from_persist_dir(tmp_path / "saved", similarity_top_k=2)
    assert len(loaded.retrieve(QUERY)) == 2


def test_adding_and_deleting_nodes():
    retriever = QRAGRetriever.from_defaults(nodes=NODES[:5], model=MODEL, similarity_top_k=9)
    assert retriever.add_nodes(NODES[5:]) == IDS[5:]
    assert contents(retriever.retrieve(QUERY)) == contents(make(k=9).retrieve(QUERY))
    assert retriever.delete(IDS[5:])
    shorter = QRAGRetriever(ChunkIndex.from_documents(NODES[:5], model=MODEL), k=9)
    assert contents(retriever.retrieve(QUERY)) == contents(shorter.retrieve(QUERY))


def test_copies_share_the_corpus(tmp_path):
    retriever = make(k=4, filter={"tenant": "a"})
    for twin in (copy.copy(retriever), copy.deepcopy(retriever), copy.deepcopy([retriever])[0]):
        assert twin is not retriever
        assert (twin.index, twin.model) == (retriever.index, retriever.model)
        assert contents(twin.retrieve(QUERY)) == contents(retriever.retrieve(QUERY))
        twin.k = 1
    assert retriever.k == 4


def test_pickling(tmp_path):
    retriever = make(k=4)
    twin = pickle.loads(pickle.dumps(retriever))
    assert contents(twin.retrieve(QUERY)) == contents(retriever.retrieve(QUERY))
    retriever.persist(tmp_path / "saved")
    pickled = pickle.dumps(retriever)
    assert TEXTS[0].encode() not in pickled
    assert contents(pickle.loads(pickled).retrieve(QUERY)) == contents(retriever.retrieve(QUERY))


def test_prompts():
    assert make().get_prompts() == {}


async def test_what_a_query_transform_wants_embedded_is_read():
    retriever = make()
    bundle = QueryBundle(QUERY, custom_embedding_strs=["The milk is in Paris.", QUERIES[1]])
    expected = contents(retriever.retrieve("\n".join(bundle.custom_embedding_strs)))
    assert expected != contents(retriever.retrieve(QUERY))
    assert contents(retriever.retrieve(bundle)) == expected
    assert contents(await retriever.aretrieve(bundle)) == expected
