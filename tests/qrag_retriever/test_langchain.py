"""What the retriever returns to LangChain, in every way of asking."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from corpus import IDS, METADATAS, QUERIES, QUERY, make_index, make_model
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_helpers import (
    INDEX,
    Recorder,
    collected,
    contents,
    in_every_way,
    make,
)

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.langchain import QRAGRetriever


@pytest.fixture
def counted(monkeypatch):
    """A retriever over a model of its own, and the number of states of each encoder pass."""
    model = make_model("relative")
    retriever = QRAGRetriever(index=make_index(model))
    encode, passes = model.encode_states, []
    monkeypatch.setattr(
        model, "encode_states", lambda states: passes.append(len(states)) or encode(states)
    )
    return retriever, passes


@pytest.mark.parametrize(
    "settings",
    [{}, {"k": 4}, {"beams": 3}, {"chunks_per_step": 2, "k": 5}, {"temperature": 0.2, "seed": 1}],
    ids=repr,
)
async def test_every_way_of_asking_gives_the_same(settings):
    retriever = make(**settings)
    expected = contents(
        Document(step.text, id=step.chunk_id, metadata=step.metadata)
        for step in retriever.search(QUERY)
    )
    assert len(expected) == settings.get("k", 3)
    for way, documents in (await in_every_way(retriever)).items():
        assert contents(documents) == expected, way


OVERRIDES = [
    {"k": 1},
    {"similarity_top_k": 5},
    {"filter": {"tenant": "b"}},
    {"filters": {"tenant": "b"}},
    {"q_threshold": 1.2, "k": 5},
    {"beams": 4},
    {"chunks_per_step": 3},
    {"exclude_ids": ["fact-6"]},
    {"temperature": 0.5, "seed": 3},
    {"runners_up": 0},
    {"keep_q_values": True},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=repr)
async def test_settings_for_one_call(overrides):
    retriever = make()
    before = repr(retriever)
    expected = retriever.search(QUERY, **overrides).chunk_ids
    for way, documents in (await in_every_way(retriever, **overrides)).items():
        assert [document.id for document in documents] == expected, way
    assert repr(retriever) == before


async def test_a_call_equals_a_retriever_with_these_settings():
    for overrides in ({"k": 4}, {"filter": {"tenant": "b"}}, {"beams": 3}, {"q_threshold": 1.7}):
        assert contents(make().invoke(QUERY, **overrides)) == contents(
            make(**overrides).invoke(QUERY)
        )


@pytest.mark.parametrize(
    "overrides",
    [{"k": 0}, {"k": 2, "similarity_top_k": 3}, {"fliter": {"tenant": "b"}}, {"verbose": True}],
    ids=repr,
)
async def test_settings_that_cannot_be_are_refused_in_every_way(overrides):
    retriever, recorder = make(), Recorder()
    config = {"callbacks": [recorder]}
    calls = [
        lambda: retriever.invoke(QUERY, config, **overrides),
        lambda: retriever.batch(QUERIES, config, **overrides),
        lambda: list(retriever.stream(QUERY, config, **overrides)),
    ]
    awaited = [
        lambda: retriever.ainvoke(QUERY, config, **overrides),
        lambda: retriever.abatch(QUERIES, config, **overrides),
        lambda: collected(retriever.astream(QUERY, config, **overrides)),
    ]
    for call in calls:
        with pytest.raises(InvalidInputError):
            call()
    for call in awaited:
        with pytest.raises(InvalidInputError):
            await call()
    started, ended = len(recorder.of("start")), len(recorder.of("error"))
    assert started == ended == 2 * (1 + len(QUERIES) + 1)
    assert recorder.of("end") == []


def test_a_filter_hides_other_tenants_in_every_step():
    documents = make(k=9, filter={"tenant": "b"}).invoke(QUERY)
    assert sorted(document.id for document in documents) == IDS[1::2]


async def test_an_empty_result():
    for documents in (await in_every_way(make(filter={"tenant": "nobody"}))).values():
        assert documents == []
    assert list(make(q_threshold=99.0).stream(QUERY)) == [[]]


def test_stream_hands_out_one_step_at_a_time(counted):
    retriever, passes = counted
    for number, part in enumerate(retriever.stream(QUERY), start=1):
        assert len(part) == 1
        assert len(passes) == number


async def test_astream_hands_out_one_step_at_a_time(counted):
    retriever, passes = counted
    number = 0
    async for part in retriever.astream(QUERY):
        number += 1
        assert len(part) == 1
        assert len(passes) == number


async def test_a_batch_takes_one_encoder_pass_a_step(counted):
    retriever, passes = counted
    expected = [contents(retriever.invoke(query)) for query in QUERIES]
    passes.clear()
    assert [contents(found) for found in retriever.batch(QUERIES)] == expected
    assert passes == [3, 3, 3]
    assert [contents(found) for found in await retriever.abatch(QUERIES)] == expected
    assert passes == [3, 3, 3] * 2


async def test_a_batch_is_cut_where_a_configuration_says_how_many_at_once(counted):
    retriever, passes = counted
    alone = [retriever.invoke(query) for query in QUERIES]
    passes.clear()
    config = {"max_concurrency": 2}
    assert retriever.batch(QUERIES, config) == alone
    assert await retriever.abatch(QUERIES, config) == alone
    assert passes == [2, 2, 2, 1, 1, 1] * 2


async def test_the_limit_of_a_batch_holds_in_chains_too(counted):
    retriever, passes = counted
    alone = [retriever.invoke(query) for query in QUERIES]
    passes.clear()
    config = {"max_concurrency": 2}
    chain = retriever | RunnableLambda(lambda documents: documents)
    assert retriever.with_config(config).batch(QUERIES) == alone
    assert retriever.bind(k=3).batch(QUERIES, config) == alone
    assert chain.batch(QUERIES, config) == alone
    assert await chain.abatch(QUERIES, config) == alone
    assert passes == [2, 2, 2, 1, 1, 1] * 4


async def test_a_limit_below_one_is_refused():
    with pytest.raises(InvalidInputError, match="max_concurrency=-1"):
        make().batch(QUERIES, {"max_concurrency": -1})
    with pytest.raises(InvalidInputError, match="max_concurrency=-1"):
        await make().abatch(QUERIES, {"max_concurrency": -1})


async def test_each_part_of_a_batch_leaves_out_the_same():
    kept = IDS[4]
    config = {"max_concurrency": 1}
    for found in (
        make().batch(QUERIES, config, exclude_ids=(id_ for id_ in IDS if id_ != kept)),
        await make().abatch(QUERIES, config, exclude_ids=(id_ for id_ in IDS if id_ != kept)),
    ):
        assert [[document.id for document in documents] for documents in found] == [[kept]] * 3


async def test_an_empty_batch():
    assert make().batch([]) == []
    assert await make().abatch([]) == []


async def test_a_batch_returns_exceptions_where_asked_to():
    for results in (
        make().batch([QUERY, "", QUERIES[1]], return_exceptions=True),
        await make().abatch([QUERY, "", QUERIES[1]], return_exceptions=True),
    ):
        first, error, last = results
        assert isinstance(error, InvalidInputError)
        assert contents(first) == contents(make().invoke(QUERY))
        assert contents(last) == contents(make().invoke(QUERIES[1]))


async def test_documents_are_new_on_every_call():
    for ways in (await in_every_way(make()), await in_every_way(make())):
        for documents in ways.values():
            assert contents(documents) == contents(make().invoke(QUERY))
            for document in documents:
                document.page_content = "written"
                document.metadata["written"] = True
                document.metadata["tenant"] = "written"
    assert [chunk.metadata for chunk in INDEX.snapshot().chunks] == METADATAS


async def test_scores_are_in_the_metadata_only_where_asked_for():
    expected = [step.q_value for step in make().search(QUERY)]
    for documents in (await in_every_way(make(score_key="q"))).values():
        assert [document.metadata["q"] for document in documents] == expected
    for documents in (await in_every_way(make())).values():
        assert all(document.metadata.keys() == {"tenant", "number"} for document in documents)


def test_threads_at_once_get_what_one_gets():
    retriever = make(k=4)
    expected = {query: contents(retriever.invoke(query)) for query in QUERIES}
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        query = QUERIES[number % len(QUERIES)]
        return all(contents(retriever.invoke(query)) == expected[query] for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize(
    "ask",
    [
        lambda retriever: retriever.ainvoke(QUERY),
        lambda retriever: retriever.abatch(QUERIES),
        lambda retriever: collected(retriever.astream(QUERY)),
        lambda retriever: (retriever | RunnableLambda(len)).ainvoke(QUERY),
    ],
    ids=["ainvoke", "abatch", "astream", "chain"],
)
async def test_the_event_loop_goes_on_during_a_search(ask, monkeypatch):
    model = make_model()
    retriever = QRAGRetriever(index=make_index(model))
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
    await asyncio.gather(ask(retriever), other())
    assert go_on.is_set()
