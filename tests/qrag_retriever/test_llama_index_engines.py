"""The retriever inside LlamaIndex's query engines, tools and other retrievers."""

from __future__ import annotations

import pytest
from corpus import QUERIES, QUERY, TEXTS
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever, RouterRetriever
from llama_index.core.schema import IndexNode, TextNode
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from llama_index_helpers import INDEX, MODEL, contents, ids

from qrag_retriever.index import ChunkIndex
from qrag_retriever.llama_index import QRAGRetriever


def make(**settings) -> QRAGRetriever:
    return QRAGRetriever(INDEX, **settings)


def query_engine(**settings):
    return RetrieverQueryEngine.from_args(make(**settings), llm=MockLLM())


class SecondChoice(BaseSelector):
    def _update_prompts(self, prompts):
        pass

    def _get_prompts(self):
        return {}

    def _select(self, choices, query):
        return SelectorResult(selections=[SingleSelection(index=1, reason="")])

    async def _aselect(self, choices, query):
        return self._select(choices, query)


async def test_query_engine():
    expected = contents(make().retrieve(QUERY))
    for answer in (query_engine().query(QUERY), await query_engine().aquery(QUERY)):
        assert contents(answer.source_nodes) == expected
        assert all(node.text in str(answer) for node, _ in expected)  # the mock repeats its prompt


async def test_tool():
    tool = RetrieverTool.from_defaults(make(), description="facts")
    expected = make().retrieve(QUERY)
    for output in (tool.call(QUERY), await tool.acall(QUERY)):
        assert contents(output.raw_output) == contents(expected)
        assert all(node.text in output.content for node in expected)


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["reciprocal_rerank", "simple"])
def test_fusion(mode, use_async):
    fused = QueryFusionRetriever(
        [make(k=4), make(k=4, filter={"tenant": "b"})],
        llm=MockLLM(),
        mode=mode,
        similarity_top_k=9,
        num_queries=1,
        use_async=use_async,
    )
    found = ids(fused.retrieve(QUERY))
    parts = [make(k=4).retrieve(QUERY), make(k=4, filter={"tenant": "b"}).retrieve(QUERY)]
    assert len(set(found)) == len(found)
    assert set(found) == {id_ for part in parts for id_ in ids(part)}


async def test_fusion_of_several_queries():
    fused = QueryFusionRetriever(
        [make(k=4)],
        llm=MockLLM(),
        similarity_top_k=9,
        num_queries=3,
        use_async=False,
        query_gen_prompt=f"{QUERIES[1]}\n{QUERIES[2]}",  # the mock repeats it
    )
    expected = {id_ for query in QUERIES for id_ in make(k=4).search(query).chunk_ids}
    for found in (fused.retrieve(QUERY), await fused.aretrieve(QUERY)):
        assert len(found) == len(expected)
        assert set(ids(found)) == expected


async def test_router_retriever():
    router = RouterRetriever(
        selector=SecondChoice(),
        retriever_tools=[
            RetrieverTool.from_defaults(make(filter={"tenant": tenant}), description=tenant)
            for tenant in "ab"
        ],
        llm=MockLLM(),
    )
    expected = contents(make(filter={"tenant": "b"}).retrieve(QUERY))
    assert contents(router.retrieve(QUERY)) == expected
    assert contents(await router.aretrieve(QUERY)) == expected


async def test_router_query_engine():
    router = RouterQueryEngine(
        selector=SecondChoice(),
        query_engine_tools=[
            QueryEngineTool.from_defaults(query_engine(filter={"tenant": t}), description=t)
            for t in "ab"
        ],
        llm=MockLLM(),
    )
    expected = contents(make(filter={"tenant": "b"}).retrieve(QUERY))
    for answer in (router.query(QUERY), await router.aquery(QUERY)):
        assert contents(answer.source_nodes) == expected


OBJECTS = {
    "node": TextNode(id_="behind", text="What lies behind."),
    "retriever": make(k=2),
    "engine": query_engine(k=2),
}


@pytest.mark.parametrize("given", ["obj", "object_map", "objects"])
@pytest.mark.parametrize("kind", OBJECTS)
async def test_an_index_node_leads_to_its_object(kind, given, capsys):
    node = IndexNode(id_="pointer", text="Pointer.", index_id="target", obj=OBJECTS[kind])
    settings = {"verbose": True, "k": 9}
    if given == "object_map":
        settings["object_map"] = {"target": node.obj}
    if given == "objects":
        settings["objects"] = [node]
    stored = (
        node if given == "obj" else IndexNode(id_="pointer", text="Pointer.", index_id="target")
    )
    index = ChunkIndex.from_documents([*TEXTS[:2], stored], model=MODEL)
    retriever = QRAGRetriever(index, **settings)
    [score] = [step.q_value for step in retriever.search(QUERY) if step.chunk_id == "pointer"]
    for awaited in (False, True):
        found = await retriever.aretrieve(QUERY) if awaited else retriever.retrieve(QUERY)
        assert "pointer" not in ids(found)
        assert "Retrieval entering target" in capsys.readouterr().out
        if kind == "node":
            assert [n.score for n in found if n.node.node_id == "behind"] == [score]
        elif kind == "retriever":
            inner = contents(OBJECTS["retriever"].retrieve(QUERY))
            assert all(pair in contents(found) for pair in inner)
        else:
            answer = str(OBJECTS["engine"].query(QUERY))
            assert [n.score for n in found if n.node.get_content() == answer] == [score]


def test_an_index_node_without_an_object_is_a_node():
    index = ChunkIndex.from_documents(
        [IndexNode(id_="pointer", text="Pointer.", index_id="target")], model=MODEL
    )
    [found] = QRAGRetriever(index).retrieve(QUERY)
    assert isinstance(found.node, IndexNode)
    assert found.node.index_id == "target"
