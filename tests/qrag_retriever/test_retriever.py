"""One object that is a retriever in both frameworks."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from corpus import (
    IDS,
    METADATAS,
    QUERIES,
    QUERY,
    TEXTS,
    make_index,
    make_model,
    model_copy_in,
    shared_model,
)
from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_core.retrievers import BaseRetriever as LangChainBase
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_helpers import Recorder, steps_of
from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexBase
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import IndexNode, MetadataMode, TextNode
from llama_index_helpers import instrumented

import qrag_retriever
from qrag_retriever import QRAGModel, QRAGRetriever, langchain, llama_index
from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.index import ChunkIndex

MODEL = shared_model("relative")
INDEX = make_index(MODEL)


def make(**settings) -> QRAGRetriever:
    return QRAGRetriever(index=INDEX, **settings)


def of_documents(documents):
    return [(document.id, document.page_content, document.metadata) for document in documents]


def of_nodes(nodes):
    return [
        (node.node.node_id, node.node.get_content(MetadataMode.NONE), node.node.metadata)
        for node in nodes
    ]


def test_it_is_a_retriever_of_both():
    assert isinstance(make(), LangChainBase)
    assert isinstance(make(), LlamaIndexBase)
    assert isinstance(make(), langchain.QRAGRetriever)
    assert qrag_retriever.QRAGRetriever is QRAGRetriever
    assert not issubclass(langchain.QRAGRetriever, LlamaIndexBase)
    assert not issubclass(llama_index.QRAGRetriever, LangChainBase)


async def test_both_roles_find_the_same():
    for settings in ({}, {"k": 5}, {"beams": 3}, {"filter": {"tenant": "b"}}, {"q_threshold": 1.7}):
        retriever = make(**settings)
        expected = of_documents(retriever.invoke(QUERY))
        assert of_documents(await retriever.ainvoke(QUERY)) == expected
        assert of_nodes(retriever.retrieve(QUERY)) == expected
        assert of_nodes(await retriever.aretrieve(QUERY)) == expected
        steps = retriever.search(QUERY).steps
        assert [(step.chunk_id, step.text, step.metadata) for step in steps] == expected


def test_each_role_alone_finds_the_same():
    expected = of_documents(make(k=4).invoke(QUERY))
    assert of_documents(langchain.QRAGRetriever(index=INDEX, k=4).invoke(QUERY)) == expected
    assert of_nodes(llama_index.QRAGRetriever(INDEX, k=4).retrieve(QUERY)) == expected


async def test_both_roles_at_once():
    retriever = make()
    chain = retriever | RunnableLambda(len)
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
    assert chain.invoke(QUERY) == 3
    answer = await engine.aquery(QUERY)
    assert of_nodes(answer.source_nodes) == of_documents(retriever.invoke(QUERY))


def test_threads_in_both_roles():
    retriever = make()
    expected = {query: of_documents(retriever.invoke(query)) for query in QUERIES}
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        query = QUERIES[number % 3]
        if number % 2:
            return of_documents(retriever.invoke(query)) == expected[query]
        return of_nodes(retriever.retrieve(query)) == expected[query]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


async def test_each_role_tells_its_own_framework_alone():
    recorder, debug = Recorder(), LlamaDebugHandler(print_trace_on_end=False)
    retriever = make(callback_manager=CallbackManager([debug]))
    config = {"callbacks": [recorder]}
    with instrumented() as (events, spans):
        retriever.invoke(QUERY, config)
        await retriever.ainvoke(QUERY, config)
        retriever.batch([QUERY], config)
        await retriever.abatch([QUERY], config)
        list(retriever.stream(QUERY, config))
        async for _ in retriever.astream(QUERY, config):
            pass
        retriever.search(QUERY)
    assert (events, spans, debug.get_event_pairs(CBEventType.RETRIEVE)) == ([], [], [])
    assert recorder.of("step") == steps_of(retriever.search(QUERY)) * 6

    recorder.events.clear()
    bound = retriever.with_config(callbacks=[recorder])
    with instrumented() as (events, spans):
        bound.retrieve(QUERY)
        await bound.aretrieve(QUERY)
    assert recorder.events == []
    steps = [event for event in events if isinstance(event, llama_index.QRAGStepEvent)]
    assert [event.chunk_id for event in steps] == retriever.search(QUERY).chunk_ids * 2
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 2
    assert not any("relevant_documents" in span for span in spans)


def test_none_of_llama_index_own_settings_is_the_default():
    retriever = make(callback_manager=None, object_map=None)
    assert retriever.retrieve(QUERY)
    with pytest.raises(InvalidInputError, match="give a CallbackManager"):
        make(callback_manager=5)


def test_prompts_as_both_read_them():
    assert make().get_prompts() == {}
    assert list((make() | RunnableLambda(len)).get_prompts()) == []
    engine = RetrieverQueryEngine.from_args(make(), llm=MockLLM())
    assert engine.get_prompts()  # those of the answer; the retriever adds none


def test_the_hooks_of_llama_index_are_there_without_its_constructor(capsys):
    retriever = make()
    assert isinstance(retriever.callback_manager, CallbackManager)
    assert (retriever.object_map, retriever.verbose, retriever._verbose) == ({}, False, False)
    assert make().object_map is not retriever.object_map
    pointer = IndexNode(id_="pointer", text="Pointer.", index_id="target")
    behind = TextNode(id_="behind", text="What lies behind.")
    index = ChunkIndex.from_documents([pointer], model=MODEL)
    retriever = QRAGRetriever(index=index, object_map={"target": behind}, verbose=True)
    assert [node.node.node_id for node in retriever.retrieve(QUERY)] == ["behind"]
    assert "Retrieval entering target" in capsys.readouterr().out
    assert [document.id for document in retriever.invoke(QUERY)] == ["pointer"]


async def test_retrievers_within_retrievers():
    inner = make(k=2)
    for node in (
        IndexNode(id_="pointer", text="Pointer.", index_id="target", obj=inner),
        IndexNode(id_="pointer", text="Pointer.", index_id="target"),
    ):
        index = ChunkIndex.from_documents([node], model=MODEL)
        outer = QRAGRetriever(index=index, object_map={"target": inner})
        expected = of_nodes(inner.retrieve(QUERY))
        assert of_nodes(outer.retrieve(QUERY)) == expected
        assert of_nodes(await outer.aretrieve(QUERY)) == expected


def test_nothing_that_is_dumped_holds_the_corpus():
    retriever = make()
    node = IndexNode(text="Pointer.", index_id="target", obj=retriever)
    for shown in (
        repr(retriever),
        str(retriever.model_dump()),
        str(dumpd(retriever)),
        str(node.dict()),
        str(node.to_dict()),
        node.to_json(),
    ):
        assert not any(text in shown for text in TEXTS)
        assert not any(name in shown for name in ("ChunkIndex", "callback_manager", "object_map"))


def test_copies_and_pickles():
    retriever = make(k=4, object_map={"a": 1}, verbose=True, tags=["own"])
    for twin in (copy.copy(retriever), copy.deepcopy(retriever)):
        assert (twin.index, twin.model) == (INDEX, MODEL)
        assert (twin.k, twin.object_map, twin.verbose) == (4, {"a": 1}, True)
    for twin in (copy.copy(retriever), copy.deepcopy(retriever), pickled(retriever)):
        assert type(twin) is QRAGRetriever
        assert of_nodes(twin.retrieve(QUERY)) == of_documents(retriever.invoke(QUERY))
        assert of_documents(twin.invoke(QUERY)) == of_documents(retriever.invoke(QUERY))


def pickled(retriever):
    return pickle.loads(pickle.dumps(retriever))


def test_configurable_fields_keep_both_roles():
    retriever = make(callback_manager=CallbackManager([]), object_map={"a": 1})
    configurable = retriever.configurable_fields(k=ConfigurableField(id="k"))
    assert len(configurable.invoke(QUERY, {"configurable": {"k": 2}})) == 2
    bound = retriever.with_config(tags=["bound"])
    assert of_nodes(bound.retrieve(QUERY)) == of_documents(retriever.invoke(QUERY))
    assert bound.search(QUERY) == retriever.search(QUERY)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"kk": 2}, InvalidInputError),
        ({"k": 0}, InvalidInputError),
        ({"k": 2, "similarity_top_k": 3}, InvalidInputError),
        ({"model": make_model(scale=0.25)}, FingerprintMismatchError),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, error):
    with pytest.raises(error):
        make(**settings)


def test_a_retriever_equals_itself_alone():
    retriever = make()
    assert retriever != make()
    assert len({retriever, make(), retriever}) == 2


def test_from_mixed_items_and_the_path_of_a_model(tmp_path):
    path = model_copy_in(tmp_path, "relative")
    retriever = QRAGRetriever.from_texts(TEXTS, METADATAS, IDS, model=path, k=4)
    assert of_documents(retriever.invoke(QUERY)) == of_documents(make(k=4).invoke(QUERY))
    half = 4
    items = [
        *(
            Document(text, id=id_, metadata=metadata)
            for text, id_, metadata in zip(TEXTS[:half], IDS, METADATAS, strict=False)
        ),
        *(
            TextNode(text=text, id_=id_, metadata=m, excluded_embed_metadata_keys=list(m))
            for text, id_, m in zip(TEXTS[half:], IDS[half:], METADATAS[half:], strict=True)
        ),
    ]
    mixed = QRAGRetriever.from_documents(items, embed_model=path, similarity_top_k=4)
    assert of_documents(mixed.invoke(QUERY)) == of_nodes(retriever.retrieve(QUERY))
    assert of_nodes(mixed.retrieve(QUERY)) == of_nodes(retriever.retrieve(QUERY))
    nodes = QRAGRetriever.from_defaults(nodes=items[half:], model=path, similarity_top_k=2)
    assert len(nodes.invoke(QUERY)) == 2


def test_storage_under_both_names(tmp_path):
    retriever = make(k=4)
    retriever.save_local(tmp_path / "one")
    retriever.persist(tmp_path / "two")
    for loaded in (
        QRAGRetriever.from_persist_dir(tmp_path / "one"),
        QRAGRetriever.load_local(tmp_path / "two"),
        llama_index.QRAGRetriever.from_persist_dir(tmp_path / "one"),
    ):
        assert of_nodes(loaded.retrieve(QUERY)) == of_documents(retriever.invoke(QUERY))


def test_without_a_model_it_is_that_of_the_package():
    retriever = QRAGRetriever.from_texts(TEXTS, k=2)
    assert retriever.model.fingerprint == QRAGModel.from_pretrained("multihop-en").fingerprint
    assert "football" in retriever.invoke("football")[0].page_content


@pytest.mark.parametrize("change", ["weights", "settings"])
def test_a_model_that_changed_does_not_search_what_it_did_not_make(change, tmp_path):
    model = make_model()
    retriever = QRAGRetriever.from_texts(TEXTS, model=model)
    retriever.save_local(tmp_path)
    if change == "weights":
        with torch.no_grad():
            next(model.action_encoder.parameters()).add_(0.1)
    else:
        model.config = model.config.replace(chunk_prompt="chunk: ")
    with pytest.raises(FingerprintMismatchError, match="as it was then, or make the index again"):
        retriever.invoke(QUERY)
    with pytest.raises(FingerprintMismatchError, match="include_model=False"):
        retriever.save_local(tmp_path)
    kept = QRAGRetriever.load_local(tmp_path)
    assert len(kept.invoke(QUERY)) == kept.k
    retriever.save_local(tmp_path / "index alone", include_model=False)
    assert QRAGRetriever.load_local(tmp_path / "index alone", model=kept.model).invoke(QUERY)


def test_what_is_searched_first_is_no_matter_to_a_changed_model():
    model = make_model()
    QRAGRetriever.from_texts(TEXTS, model=model).invoke(QUERY)
    next(model.action_encoder.parameters()).data.add_(0.1)  # which torch does not count
    assert QRAGRetriever.from_texts(TEXTS, model=model).invoke(QUERY)
