"""The retriever inside LangChain's chains and other retrievers."""

from __future__ import annotations

import pytest
from corpus import QUERIES, QUERY
from langchain_core.runnables import RunnableLambda
from langchain_helpers import INDEX, Recorder, contents, make, steps_of


def format_documents(documents):
    return " ".join(document.page_content for document in documents)


async def test_in_a_chain():
    chain = make() | format_documents | RunnableLambda(str.upper)
    expected = format_documents(make().invoke(QUERY)).upper()
    assert chain.invoke(QUERY) == expected
    assert await chain.ainvoke(QUERY) == expected
    assert chain.batch([QUERY, QUERY]) == [expected] * 2
    assert await chain.abatch([QUERY, QUERY]) == [expected] * 2
    assert "".join(chain.stream(QUERY)) == expected
    assert "".join([part async for part in chain.astream(QUERY)]) == expected


async def test_steps_reach_the_handlers_of_a_chain():
    for awaited in (False, True):
        recorder = Recorder()
        chain = make() | format_documents
        config = {"callbacks": [recorder]}
        await chain.ainvoke(QUERY, config) if awaited else chain.invoke(QUERY, config)
        assert recorder.of("step") == steps_of(make().search(QUERY))
        assert len(recorder.of("start")) == len(recorder.of("end")) == 1


def test_as_a_tool():
    from langchain_core.tools import create_retriever_tool

    texts = [step.text for step in make().search(QUERY)]
    tool = create_retriever_tool(make(), "facts", "Looks up facts.")
    assert all(text in tool.invoke({"query": QUERY}) for text in texts)


class TestClassic:
    """Retrievers and chains that take a retriever apart and put results together again."""

    @pytest.fixture(autouse=True)
    def _classic(self):
        pytest.importorskip("langchain_classic")

    async def test_ensemble(self):
        from langchain_classic.retrievers import EnsembleRetriever

        ensemble = EnsembleRetriever(
            retrievers=[make(k=4), make(k=4, filter={"tenant": "b"})],
            weights=[0.5, 0.5],
            id_key=None,
        )
        found = ensemble.invoke(QUERY)
        assert len({document.id for document in found}) == len(found)
        parts = [make(k=4).invoke(QUERY), make(k=4).invoke(QUERY, filter={"tenant": "b"})]
        assert {document.id for document in found} == {d.id for part in parts for d in part}
        assert contents(await ensemble.ainvoke(QUERY)) == contents(found)

    async def test_several_queries_bring_no_chunk_twice(self):
        from langchain_classic.retrievers import MultiQueryRetriever
        from langchain_core.language_models import FakeListLLM

        llm = FakeListLLM(responses=["\n".join(QUERIES)])
        retriever = MultiQueryRetriever.from_llm(retriever=make(k=5), llm=llm)
        expected = {id_ for query in QUERIES for id_ in make(k=5).search(query).chunk_ids}
        for found in (retriever.invoke(QUERY), await retriever.ainvoke(QUERY)):
            assert len(found) == len(expected)
            assert {document.id for document in found} == expected

    async def test_compression_that_writes_into_documents(self):
        from langchain_classic.retrievers import ContextualCompressionRetriever
        from langchain_core.documents import BaseDocumentCompressor

        class Shortener(BaseDocumentCompressor):
            def compress_documents(self, documents, query, callbacks=None):
                for document in documents:
                    document.page_content = document.page_content[:4]
                    document.metadata["short"] = True
                return documents

        retriever = ContextualCompressionRetriever(
            base_retriever=make(), base_compressor=Shortener()
        )
        for _ in range(2):
            for found in (retriever.invoke(QUERY), await retriever.ainvoke(QUERY)):
                assert [d.page_content for d in found] == [
                    step.text[:4] for step in make().search(QUERY)
                ]
        assert all("short" not in chunk.metadata for chunk in INDEX.snapshot().chunks)

    async def test_retrieval_chain(self):
        from langchain_classic.chains import create_retrieval_chain

        chain = create_retrieval_chain(make(), RunnableLambda(lambda given: len(given["context"])))
        for answer in (chain.invoke({"input": QUERY}), await chain.ainvoke({"input": QUERY})):
            assert answer["answer"] == 3
            assert contents(answer["context"]) == contents(make().invoke(QUERY))
