"""What LangChain's callbacks are told of a retrieval."""

from __future__ import annotations

import asyncio
import threading

import pytest
from corpus import QUERIES, QUERY, make_index, make_model
from langchain_core.runnables import RunnableLambda
from langchain_helpers import (
    AsyncRecorder,
    Recorder,
    collected,
    contents,
    in_every_way,
    make,
    steps_of,
)

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.langchain import QRAGRetriever


@pytest.mark.parametrize("kind", [Recorder, AsyncRecorder])
@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"chunks_per_step": 2}], ids=repr)
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "batch", "abatch", "stream", "astream"])
async def test_start_steps_and_end_are_told_once_each(way, settings, kind):
    retriever, recorder = make(**settings), kind()
    config = {"callbacks": [recorder], "tags": ["of-call"], "run_name": "named"}
    calls = {
        "invoke": lambda: retriever.invoke(QUERY, config),
        "ainvoke": lambda: retriever.ainvoke(QUERY, config),
        "batch": lambda: retriever.batch([QUERY], config),
        "abatch": lambda: retriever.abatch([QUERY], config),
        "stream": lambda: list(retriever.stream(QUERY, config)),
        "astream": lambda: collected(retriever.astream(QUERY, config)),
    }
    result = calls[way]()
    if asyncio.iscoroutine(result):
        await result
    trajectory = retriever.search(QUERY)
    kinds, runs, _, loops = zip(*recorder.events, strict=True)
    assert kinds == ("start", *["step"] * 3, "end")
    assert len(set(runs)) == 1
    assert recorder.of("step") == steps_of(trajectory)
    assert [document.id for document in recorder.of("end")[0]] == trajectory.chunk_ids
    [start] = recorder.of("start")
    assert (start["query"], start["name"], start["tags"]) == (QUERY, "named", ["of-call"])
    if kind is AsyncRecorder and way.startswith("a"):
        assert set(loops) == {asyncio.get_running_loop()}


async def test_every_way_introduces_itself_alike():
    recorder = Recorder()
    retriever = make(tags=["own"], metadata={"purpose": "test"})
    config = {"callbacks": [recorder], "tags": ["call"], "metadata": {"user": "me"}}
    ways = await in_every_way(retriever, config=config)
    started = recorder.of("start")
    assert len(started) == len(ways)
    for start in started:
        assert sorted(start["tags"]) == ["call", "own"]
        assert start["metadata"].items() >= {"purpose": "test", "user": "me"}.items()
        assert start["metadata"]["ls_retriever_name"] == "qrag"
        assert start["name"] == "QRAGRetriever"
    assert all(start == started[0] for start in started)


async def test_each_query_of_a_batch_is_a_run_of_its_own():
    for awaited in (False, True):
        recorders = [Recorder() for _ in QUERIES]
        configs = [{"callbacks": [recorder]} for recorder in recorders]
        found = make().batch(QUERIES, configs)
        if awaited:
            recorders = [Recorder() for _ in QUERIES]
            found = await make().abatch(QUERIES, [{"callbacks": [r]} for r in recorders])
        for query, recorder, documents in zip(QUERIES, recorders, found, strict=True):
            assert [kind for kind, *_ in recorder.events] == ["start", *["step"] * 3, "end"]
            assert recorder.of("start")[0]["query"] == query
            told = [step["chunk_id"] for step in recorder.of("step")]
            assert told == [document.id for document in documents]


async def test_an_error_is_told_once():
    recorder = Recorder()
    config = {"callbacks": [recorder]}
    with pytest.raises(InvalidInputError):
        make().invoke("", config)
    with pytest.raises(InvalidInputError):
        await make().ainvoke("", config)
    with pytest.raises(InvalidInputError):
        list(make().stream("", config))
    with pytest.raises(InvalidInputError):
        await collected(make().astream("", config))
    assert [kind for kind, *_ in recorder.events] == ["start", "error"] * 4
    recorder.events.clear()
    with pytest.raises(InvalidInputError):
        make().batch([QUERY, ""], config)
    with pytest.raises(InvalidInputError):
        await make().abatch([QUERY, ""], config)
    assert [kind for kind, *_ in recorder.events] == ["start", "start", "error", "error"] * 2


async def test_a_stream_that_is_left_early_ends_well():
    recorder = Recorder()
    config = {"callbacks": [recorder]}
    stream = make().stream(QUERY, config)
    first = next(stream)
    stream.close()
    assert [kind for kind, *_ in recorder.events] == ["start", "step", "end"]
    assert recorder.of("end") == [first]
    recorder.events.clear()
    stream = make().astream(QUERY, config)
    first = await anext(stream)
    await stream.aclose()
    assert [kind for kind, *_ in recorder.events] == ["start", "step", "end"]
    assert recorder.of("end") == [first]


@pytest.mark.parametrize("chained", [False, True])
async def test_events_of_a_stream(chained):
    retriever = make()
    runnable = retriever | RunnableLambda(len) if chained else retriever
    events = [event async for event in runnable.astream_events(QUERY, version="v2")]
    assert len([event for event in events if event["event"] == "on_retriever_start"]) == 1
    [end] = [event for event in events if event["event"] == "on_retriever_end"]
    custom = [event for event in events if event["event"] == "on_custom_event"]
    assert [{"name": e["name"], **e["data"]} for e in custom] == steps_of(retriever.search(QUERY))
    assert {event["run_id"] for event in custom} == {end["run_id"]}
    assert contents(end["data"]["output"]) == contents(retriever.invoke(QUERY))


@pytest.mark.parametrize("way", ["abatch", "astream"])
async def test_a_cancelled_retrieval_is_told_as_an_error(way, monkeypatch):
    model, recorder = make_model(), Recorder()
    retriever = QRAGRetriever(index=make_index(model))
    encode, encoding, go_on = model.encode_states, threading.Event(), threading.Event()
    monkeypatch.setattr(
        model, "encode_states", lambda states: encoding.set() or (go_on.wait(60) and encode(states))
    )
    config = {"callbacks": [recorder]}
    if way == "abatch":
        task = asyncio.create_task(retriever.abatch([QUERY], config))
    else:
        task = asyncio.create_task(collected(retriever.astream(QUERY, config)))
    while not encoding.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert [kind for kind, *_ in recorder.events] == ["start", "error"]
