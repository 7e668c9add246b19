"""Selection among what another retriever finds, against an index over the same candidates."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
from corpus import IDS, METADATAS, QUERIES, QUERY, TEXTS, make_model, shared_model
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainBase
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexBase
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from pydantic import Field

from qrag_retriever import (
    QRAGDocumentCompressor,
    QRAGEmbedding,
    QRAGEmbeddings,
    QRAGNodePostprocessor,
    QRAGRetriever,
    langchain,
    llama_index,
)
from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.second_stage import EmbeddingCache, SecondStage

MODEL = shared_model()


class Passage(Document):
    page: int = 0


class Finder(LangChainBase):
    """Finds the same documents for every query, as many as it is asked for."""

    documents: list[Document]
    k: int = 4

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents[: self.k]


class NodeFinder(LlamaIndexBase):
    def __init__(self, nodes):
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=node, score=0.5) for node in self.nodes]


def documents():
    return [
        Passage(page_content=text, id=id_, metadata=dict(metadata), page=number)
        for number, (text, id_, metadata) in enumerate(zip(TEXTS, IDS, METADATAS, strict=True))
    ]


def nodes():
    made = [
        TextNode(text=text, id_=id_, metadata=dict(m), excluded_embed_metadata_keys=list(m))
        for text, id_, m in zip(TEXTS, IDS, METADATAS, strict=True)
    ]
    made[2].relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    return made


def expected(items, query=QUERY, **settings):
    index = ChunkIndex.from_documents(items, model=MODEL)
    return QRAGRetriever(index=index, **settings).search(query).chunk_ids


async def test_over_a_langchain_retriever():
    base = Finder(documents=documents()[::-1])
    for settings in ({}, {"k": 5}, {"beams": 3}, {"filter": {"tenant": "b"}}):
        retriever = QRAGRetriever.from_retriever(base, model=MODEL, **settings)
        for query in QUERIES:
            ids = expected(base.documents, query, **settings)
            assert [found.id for found in retriever.invoke(query)] == ids
            assert [found.id for found in await retriever.ainvoke(query)] == ids
            assert [found.node.node_id for found in retriever.retrieve(query)] == ids
            assert [found.node.node_id for found in await retriever.aretrieve(query)] == ids
        several = [[found.id for found in own] for own in retriever.batch(QUERIES)]
        assert several == [expected(base.documents, query, **settings) for query in QUERIES]
        again = [[found.id for found in own] for own in await retriever.abatch(QUERIES)]
        assert again == several
        steps = [found.id for [found] in retriever.stream(QUERY)]
        assert steps == [found.id for [found] in [step async for step in retriever.astream(QUERY)]]


async def test_over_a_llama_index_retriever():
    base = NodeFinder(nodes())
    retriever = QRAGRetriever.from_retriever(base, model=MODEL, k=4)
    ids = expected(base.nodes, k=4)
    assert [found.node.node_id for found in retriever.retrieve(QUERY)] == ids
    assert [found.node.node_id for found in await retriever.aretrieve(QUERY)] == ids
    assert [found.id for found in await retriever.ainvoke(QUERY)] == ids
    alone = llama_index.QRAGRetriever.from_retriever(base, model=MODEL, similarity_top_k=4)
    assert [found.node.node_id for found in alone.retrieve(QUERY)] == ids
    alone = langchain.QRAGRetriever.from_retriever(base, model=MODEL, k=4)
    assert [found.id for found in alone.invoke(QUERY)] == ids


def test_what_was_found_comes_out_as_it_was():
    given = documents()
    given[3].id = None
    base = Finder(documents=given)
    found = QRAGRetriever.from_retriever(base, model=MODEL, k=9, score_key="q").invoke(QUERY)
    assert len(found) == 9
    before = {document.page_content: document for document in documents()}
    for document in found:
        assert isinstance(document.metadata.pop("q"), float)
        same = before[document.page_content]
        same.id = None if document.page_content == TEXTS[3] else same.id
        assert document == same  # class, id, page and metadata
    assert all("q" not in document.metadata for document in given)

    given = nodes()
    out = QRAGRetriever.from_retriever(NodeFinder(given), model=MODEL, k=9).retrieve(QUERY)
    by_id = {node.node_id: node for node in given}
    assert [found.node for found in out] == [by_id[found.node.node_id] for found in out]
    assert any(found.node.relationships for found in out)
    assert not any(found.node is by_id[found.node.node_id] for found in out)


def test_an_index_of_what_was_found():
    given = documents()[:3]
    for document in given:
        document.id = None
    for base in (Finder(documents=given), NodeFinder(nodes()[:3]), RunnableLambda(lambda q: TEXTS)):
        found = QRAGRetriever.from_retriever(base, model=MODEL, k=3).search(QUERY)
        index = ChunkIndex.from_documents([step.chunk for step in found], model=MODEL)
        documents_again = QRAGRetriever(index=index, k=3).invoke(QUERY)
        assert sorted(d.id for d in documents_again) == sorted(found.chunk_ids)
        assert {d.page_content for d in documents_again} == {step.text for step in found}


def test_so_many_candidates_are_asked_for():
    base = Finder(documents=documents())
    for count in (1, 6, 9):
        retriever = QRAGRetriever.from_retriever(base, model=MODEL, candidates=count, k=9)
        ids = {found.id for found in retriever.invoke(QUERY)}
        assert ids == set(IDS[:count])
    assert base.k == 4
    function = RunnableLambda(lambda query: documents())
    retriever = QRAGRetriever.from_retriever(function, model=MODEL, candidates=5, k=9)
    assert {found.id for found in retriever.invoke(QUERY)} == set(IDS[:5])

    store = InMemoryVectorStore(QRAGEmbeddings(MODEL))
    store.add_documents(documents())
    retriever = QRAGRetriever.from_retriever(store.as_retriever(), model=MODEL, candidates=7, k=9)
    assert len(retriever.invoke(QUERY)) == 7
    own = VectorStoreIndex(nodes(), embed_model=QRAGEmbedding(MODEL)).as_retriever()
    retriever = QRAGRetriever.from_retriever(own, model=MODEL, candidates=7, k=9)
    assert len(retriever.retrieve(QUERY)) == 7
    assert own.similarity_top_k == 2

    class Fixed(NodeFinder):
        @property
        def similarity_top_k(self):
            return len(self.nodes)

    retriever = QRAGRetriever.from_retriever(Fixed(nodes()[:5]), model=MODEL, candidates=7, k=9)
    assert len(retriever.retrieve(QUERY)) == 5


def test_a_runnable_with_a_configuration_is_asked_for_as_many():
    for base in (
        Finder(documents=documents()).with_config(tags=["x"]),
        QRAGRetriever.from_texts(TEXTS, ids=IDS, model=MODEL, k=2).with_config(tags=["x"]),
    ):
        retriever = QRAGRetriever.from_retriever(base, model=MODEL, candidates=7, k=9)
        assert len(retriever.invoke(QUERY)) == 7
    fallback = Finder(documents=documents()).with_fallbacks([Finder(documents=documents())])
    retriever = QRAGRetriever.from_retriever(fallback, model=MODEL, candidates=7, k=9)
    assert len(retriever.invoke(QUERY)) == 4  # it cannot be told


async def test_a_batch_asks_the_base_at_once():
    waiting, most = 0, 0

    class Slow(LangChainBase):
        def _get_relevant_documents(self, query, *, run_manager):
            return documents()

        async def _aget_relevant_documents(self, query, *, run_manager):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            await asyncio.sleep(0.01)
            waiting -= 1
            return documents()

        def batch(self, inputs, *args, **kwargs):
            asked.append(list(inputs))
            return super().batch(inputs, *args, **kwargs)

    asked = []
    retriever = QRAGRetriever.from_retriever(Slow(), model=MODEL, k=2)
    alone = [retriever.invoke(query) for query in QUERIES]
    assert await retriever.abatch(QUERIES) == alone
    assert most == len(QUERIES)
    assert retriever.batch(QUERIES) == alone
    assert asked == [QUERIES]


def test_no_candidates_and_repeated_ones():
    empty = QRAGRetriever.from_retriever(Finder(documents=[]), model=MODEL)
    trajectory = empty.search(QUERY)
    assert (len(trajectory), trajectory.stopped, trajectory.n_candidates) == (0, "exhausted", 0)
    assert empty.batch([]) == []
    twice = Finder(documents=[*documents()[:2], *documents()[:2]])
    trajectory = QRAGRetriever.from_retriever(twice, model=MODEL, k=9).search(QUERY)
    assert sorted(trajectory.chunk_ids) == IDS[:2]
    both = RunnableLambda(lambda query: documents() if query == QUERY else [])
    first, second = QRAGRetriever.from_retriever(both, model=MODEL).batch([QUERY, "Other?"])
    assert (len(first), len(second)) == (3, 0)


def test_excluded_ids_may_be_unknown_to_the_base():
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=MODEL, k=9)
    ids = retriever.search(QUERY, exclude_ids=["elsewhere", IDS[2]]).chunk_ids
    assert sorted(ids) == [id_ for id_ in IDS if id_ != IDS[2]]


class Runs(BaseCallbackHandler):
    """The retrievals that callbacks hear of: by name, the run they belong to."""

    def __init__(self):
        self.own, self.parents = {}, {}

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **kwargs):
        self.own[kwargs["name"]] = run_id
        self.parents[kwargs["name"]] = parent_run_id


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_the_base_is_a_child_in_traces(way):
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=MODEL)
    runs = Runs()
    found = getattr(retriever, way)(QUERY, config={"callbacks": [runs]})
    if way == "ainvoke":
        await found
    elif way == "stream":
        list(found)
    elif way == "astream":
        assert [step async for step in found]
    assert runs.parents == {"QRAGRetriever": None, "Finder": runs.own["QRAGRetriever"]}


class Queries(BaseCallbackHandler):
    """The retrievals that callbacks hear of: name and query of each and of what it belongs to."""

    def __init__(self):
        self.runs, self.pairs = {}, []

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **kwargs):
        self.runs[run_id] = (kwargs["name"], query)
        self.pairs.append((self.runs.get(parent_run_id), self.runs[run_id]))


@pytest.mark.parametrize("way", ["batch", "abatch"])
@pytest.mark.parametrize("count", [1, 3])
async def test_the_base_is_a_child_of_each_query_of_a_batch(way, count):
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=MODEL)
    told, queries = Queries(), QUERIES[:count]
    found = getattr(retriever, way)(queries, config={"callbacks": [told]})
    found = await found if way == "abatch" else found
    assert [[own.id for own in some] for some in found] == [
        [own.id for own in retriever.invoke(query)] for query in queries
    ]
    assert sorted(told.pairs, key=str) == sorted(
        [
            *((None, ("QRAGRetriever", query)) for query in queries),
            *((("QRAGRetriever", query), ("Finder", query)) for query in queries),
        ],
        key=str,
    )


async def test_what_a_call_cannot_use_is_refused_before_the_base_is_asked():
    asked = []
    base = RunnableLambda(lambda query: asked.append(query) or documents())
    retriever = QRAGRetriever.from_retriever(base, model=MODEL)
    for query, settings in (("", {}), ({"q": 1}, {}), (QUERY, {"k": 0}), (QUERY, {"filter": 3})):
        with pytest.raises(InvalidInputError):
            await retriever.ainvoke(query, **settings)
        with pytest.raises(InvalidInputError):
            retriever.batch([QUERY, query], **settings)
    assert asked == []


def test_documents_that_are_equal_are_chosen_from_once():
    texts = [Document(document.page_content) for document in documents()]
    base = RunnableLambda(
        lambda query: [*texts, *texts, Document(texts[0].page_content, metadata={"a": 1})]
    )
    retriever = QRAGRetriever.from_retriever(base, model=MODEL, k=50, q_threshold=None)
    found = [(own.page_content, str(own.metadata)) for own in retriever.invoke(QUERY)]
    assert len(found) == len(set(found)) == len(texts) + 1


async def test_a_base_that_is_asynchronous_alone():
    async def find(query):
        return documents()

    retriever = QRAGRetriever.from_retriever(RunnableLambda(find), model=MODEL)
    assert [found.id for found in await retriever.ainvoke(QUERY)] == expected(documents())


def test_what_fails_in_the_base_is_not_hidden():
    def fail(query):
        raise ConnectionError("gone")

    retriever = QRAGRetriever.from_retriever(RunnableLambda(fail), model=MODEL)
    with pytest.raises(ConnectionError, match="gone"):
        retriever.invoke(QUERY)
    wrong = QRAGRetriever.from_retriever(RunnableLambda(lambda query: [3]), model=MODEL)
    with pytest.raises(InvalidInputError, match="of type int"):
        wrong.invoke(QUERY)


@pytest.mark.parametrize("found", ["Paris", b"Paris", {"context": documents()}, None, 3])
def test_what_is_no_list_is_refused(found):
    retriever = QRAGRetriever.from_retriever(RunnableLambda(lambda query: found), model=MODEL)
    with pytest.raises(InvalidInputError, match=f"returned a {type(found).__name__}"):
        retriever.invoke(QUERY)


async def test_a_base_that_has_invoke_alone():
    class Finds:
        def invoke(self, query):
            return iter(documents())

    retriever = QRAGRetriever.from_retriever(Finds(), model=MODEL)
    assert [found.id for found in await retriever.ainvoke(QUERY)] == expected(documents())
    assert [found.id for found in retriever.invoke(QUERY)] == expected(documents())


def test_pickles_select_the_same():
    items = documents()
    stage = QRAGRetriever.from_retriever(Finder(documents=items), model=MODEL)
    again = pickle.loads(pickle.dumps(stage))
    assert [found.id for found in again.invoke(QUERY)] == expected(items)
    compressor = pickle.loads(pickle.dumps(QRAGDocumentCompressor(MODEL)))
    assert [found.id for found in compressor.compress_documents(items, QUERY)] == expected(items)
    chosen = pickle.loads(pickle.dumps(QRAGNodePostprocessor(MODEL)))
    found = chosen.postprocess_nodes(
        [NodeWithScore(node=node) for node in nodes()], query_str=QUERY
    )
    assert [one.node.node_id for one in found] == expected(nodes())


def test_embeddings_are_kept_by_content(monkeypatch):
    model, asked = make_model(), []
    encode = model.encode_actions
    monkeypatch.setattr(
        model, "encode_actions", lambda texts: (asked.extend(texts), encode(texts))[1]
    )
    cache = EmbeddingCache(model, size=3)
    first = cache.embed(TEXTS[:3])
    assert (first == encode(TEXTS[:3])).all()
    assert (cache.embed([TEXTS[2], TEXTS[0], TEXTS[2]]) == first[[2, 0, 2]]).all()
    assert asked == TEXTS[:3]
    cache.embed([TEXTS[3]])  # TEXTS[1] was not used for longest
    cache.embed([TEXTS[0], TEXTS[2], TEXTS[3]])
    assert (asked, len(cache)) == (TEXTS[:4], 3)
    cache.embed([TEXTS[1]])
    assert asked == [*TEXTS[:4], TEXTS[1]]
    assert cache.embed([]).shape == (0, model.dimension)


def test_training_the_model_makes_kept_embeddings_worthless():
    model = make_model()
    cache = EmbeddingCache(model)
    before = cache.embed(TEXTS)
    with torch.no_grad():
        for weight in model.action_encoder.parameters():
            weight.mul_(1.5)
    after = cache.embed(TEXTS)
    assert (after == model.encode_actions(TEXTS)).all()
    assert (after != before).any()


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"chunk_prompt": "passage: "}])
def test_so_do_changed_settings(change):
    model = make_model()
    cache = EmbeddingCache(model)
    before = cache.embed(TEXTS)
    model.config = model.config.replace(**change)
    after = cache.embed(TEXTS)
    assert (after == model.encode_actions(TEXTS)).all()
    assert (after != before).any()


@pytest.mark.parametrize(
    "model", [shared_model("relative"), make_model(state_order="document")], ids=["rho", "order"]
)
def test_models_that_need_the_order_of_the_document_are_refused(model):
    with pytest.raises(ConfigError, match="second stage"):
        SecondStage(Finder(documents=[]), model)


def test_so_are_those_that_come_to_need_it():
    model = make_model()
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=model)
    model.config = model.config.replace(positions="relative")
    with pytest.raises(ConfigError, match="second stage"):
        retriever.search(QUERY)


@pytest.mark.parametrize("base", [None, Finder])
def test_what_is_no_retriever_is_refused(base):
    with pytest.raises(InvalidInputError, match=r"got None|Finder is a class"):
        QRAGRetriever.from_retriever(base, model=MODEL)


def test_wrong_arguments_are_refused():
    for settings in ({"candidates": 0}, {"cache_size": 0}, {"candidates": True}):
        with pytest.raises(InvalidInputError, match="integer of at least 1"):
            QRAGRetriever.from_retriever(Finder(documents=[]), model=MODEL, **settings)
    with pytest.raises(InvalidInputError, match="no retriever"):
        QRAGRetriever.from_retriever(documents(), model=MODEL)
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=MODEL)
    for change in (
        lambda: retriever.add_texts(["new"]),
        lambda: retriever.delete([IDS[0]]),
        lambda: retriever.save_local("nowhere"),
    ):
        with pytest.raises(InvalidInputError, match="only reads"):
            change()


def test_copies():
    retriever = QRAGRetriever.from_retriever(Finder(documents=documents()), model=MODEL)
    for twin in (copy.copy(retriever), copy.deepcopy(retriever)):
        assert twin.search(QUERY) == retriever.search(QUERY)


async def test_compressor():
    compressor = QRAGDocumentCompressor(MODEL, k=4)
    given = documents()
    found = compressor.compress_documents(given, QUERY)
    assert [document.id for document in found] == expected(given, k=4)
    assert all(any(document is other for other in given) for document in found)
    assert await compressor.acompress_documents(given, QUERY) == found
    assert list(compressor.compress_documents([], QUERY)) == []
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=Finder(documents=given, k=9)
    )
    assert retriever.invoke(QUERY) == found
    assert await retriever.ainvoke(QUERY) == found


async def test_postprocessor():
    postprocessor = QRAGNodePostprocessor(MODEL, k=4)
    given = [NodeWithScore(node=node, score=0.1) for node in nodes()]
    found = postprocessor.postprocess_nodes(given, query_str=QUERY)
    assert [item.node.node_id for item in found] == expected(nodes(), k=4)
    assert all(any(item.node is other.node for other in given) for item in found)
    index = ChunkIndex.from_documents(nodes(), model=MODEL)
    steps = QRAGRetriever(index=index, k=4).search(QUERY)
    assert [item.score for item in found] == pytest.approx([step.q_value for step in steps])
    assert await postprocessor.apostprocess_nodes(given, query_str=QUERY) == found
    engine = RetrieverQueryEngine.from_args(
        NodeFinder(nodes()), llm=MockLLM(), node_postprocessors=[postprocessor]
    )
    for answer in (engine.query(QUERY), await engine.aquery(QUERY)):
        ids = [item.node.node_id for item in answer.source_nodes]
        assert ids == [item.node.node_id for item in found]
    with pytest.raises(InvalidInputError, match="for a query"):
        postprocessor.postprocess_nodes(given)


def test_a_dumped_postprocessor_names_its_model(tmp_path):
    folder = str(MODEL.save_pretrained(tmp_path / "model"))
    given = [NodeWithScore(node=node, score=0.1) for node in nodes()]
    one = QRAGNodePostprocessor(folder, k=3, q_threshold=-9.0)
    again = QRAGNodePostprocessor.from_dict(one.to_dict())
    assert again.to_dict() == one.to_dict()
    assert (again.model_name, again.k, again.q_threshold) == (folder, 3, -9.0)
    select = [kind.postprocess_nodes(given, query_str=QUERY) for kind in (one, again)]
    assert select[0] == select[1]
    assert QRAGNodePostprocessor().model_name == "multihop-en"


@pytest.mark.parametrize("kind", [QRAGDocumentCompressor, QRAGNodePostprocessor])
def test_settings_of_compressor_and_postprocessor(kind):
    with pytest.raises(InvalidInputError, match="Unknown setting 'top'"):
        kind(MODEL, top=3)
    with pytest.raises(InvalidInputError, match="k=0"):
        kind(MODEL, k=0)
    with pytest.raises(ConfigError, match="second stage"):
        kind(shared_model("relative"))


def test_a_retriever_with_settings_in_both_places_is_asked_for_so_many():
    class Both(LangChainBase):
        search_kwargs: dict[str, Any] = Field(default_factory=lambda: {"k": 100})
        k: int = 4

        def _get_relevant_documents(self, query, *, run_manager):
            return documents()[: min(self.k, self.search_kwargs["k"])]

    retriever = QRAGRetriever.from_retriever(Both(), model=MODEL, candidates=6)
    assert retriever.search(QUERY).n_candidates == 6


def test_a_kept_embedding_does_not_keep_its_batch():
    cache = EmbeddingCache(MODEL)
    cache.embed(TEXTS)
    assert all(vector.base is None for vector in cache._kept.values())


def test_a_query_for_the_compressor_is_a_text():
    with pytest.raises(InvalidInputError, match="A query is a str"):
        QRAGDocumentCompressor(MODEL).compress_documents(documents(), ["q"])
