"""Encoder passes that searches share: what is joined, and whose error is whose."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from corpus import QUERIES, TEXTS, make_index, make_model

from qrag_retriever import QRAGRetriever
from qrag_retriever.collector import Collector, collector_of
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.search import SearchOptions

LONG = 30  # seconds that no test should ever wait


class Encoder:
    """Counts what it is asked for together; holds its first call until it is released."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered, self.released = threading.Event(), threading.Event()
        self.interrupt: BaseException | None = None

    def encode_states(self, states: Any) -> np.ndarray:
        self.batches.append([query for query, _ in states])
        if len(self.batches) == 1:
            self.entered.set()
            assert self.released.wait(LONG)
            if self.interrupt is not None:
                raise self.interrupt
        if any(query == "bad" for query, _ in states):
            raise ValueError("bad")
        return np.array([[float(query)] for query, _ in states], dtype=np.float32)


def ask(collector: Collector, *queries: str) -> tuple[threading.Thread, list[Any]]:
    """Ask in a thread of its own; the outcome comes into the list."""
    outcome: list[Any] = []

    def call() -> None:
        try:
            vectors = collector.encode_states([(query, []) for query in queries])
            outcome.append(vectors[:, 0].tolist())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, outcome


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(LONG * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came about")


@pytest.fixture
def encoder() -> Iterator[Encoder]:
    made = Encoder()
    yield made
    made.released.set()


def outcomes(encoder: Encoder, collector: Collector, *asked: tuple[str, ...]) -> list[Any]:
    """The first alone; the others while it is encoded."""
    calls = [ask(collector, *asked[0])]
    assert encoder.entered.wait(LONG)
    for number, queries in enumerate(asked[1:], 1):
        calls.append(ask(collector, *queries))
        wait_until(lambda number=number: len(collector._waiting) == number)
    encoder.released.set()
    for thread, _ in calls:
        thread.join(LONG)
    return [outcome for _, [outcome] in calls]


def test_those_who_wait_are_encoded_together(encoder):
    found = outcomes(encoder, Collector(encoder), ("1",), ("2", "3"), ("4",), ("5",))
    assert found == [[1], [2, 3], [4], [5]]
    assert encoder.batches == [["1"], ["2", "3", "4", "5"]]


def test_an_error_is_its_own_callers(encoder):
    collector = Collector(encoder)
    first, good, bad, other = outcomes(encoder, collector, ("1",), ("2",), ("3", "bad"), ("4",))
    assert (first, good, other) == ([1], [2], [4])
    assert isinstance(bad, ValueError)
    assert ask(collector, "6")[0].join(LONG) is None  # and it goes on
    assert collector.encode_states([("7", [])]) == [[7]]


def test_an_interrupt_stops_one_thread_alone(encoder):
    encoder.interrupt = KeyboardInterrupt()
    collector = Collector(encoder)
    first, *others = outcomes(encoder, collector, ("1",), ("2",), ("3",))
    assert isinstance(first, KeyboardInterrupt)
    assert others == [[2], [3]]
    assert collector._leader is None


def test_many_threads_get_what_is_theirs(encoder):
    encoder.released.set()
    collector = Collector(encoder)
    calls = [ask(collector, *(str(100 * n + i) for i in range(n % 4 + 1))) for n in range(60)]
    for n, (thread, outcome) in enumerate(calls):
        thread.join(LONG)
        assert outcome == [[100 * n + i for i in range(n % 4 + 1)]]
    assert collector._leader is None
    assert not collector._waiting


class Counted:
    """A model's encoder, which starts only when everyone is there."""

    def __init__(self, model: Any, together: int) -> None:
        self.encode, self.together = model.encode_states, together
        self.collector = collector_of(model)
        self.sizes: list[int] = []
        model.encode_states = self

    def __call__(self, states: Any, **settings: Any) -> np.ndarray:
        self.sizes.append(len(states))
        if len(self.sizes) == 1:
            wait_until(lambda: len(self.collector._waiting) == self.together - 1)
        return self.encode(states, **settings)


def test_concurrent_ainvoke_shares_encoder_passes():
    model = make_model("relative")
    retriever = QRAGRetriever(index=make_index(model), k=1)
    queries = [f"{query} {text}" for query in QUERIES for text in TEXTS][:16]
    expected = [retriever.invoke(query) for query in queries]
    counted = Counted(model, 16)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(retriever.ainvoke(query) for query in queries))

    assert asyncio.run(all_at_once()) == expected
    assert counted.sizes == [1, 15]


def test_two_event_loops_and_llama_index_share_them_too():
    model = make_model()
    index = make_index(model)
    expected = [step.chunk.text for step in QRAGRetriever(index=index, k=1).search(QUERIES[0])]
    counted, found = Counted(model, 4), []

    async def two(retriever: QRAGRetriever) -> None:
        one, other = await asyncio.gather(
            retriever.ainvoke(QUERIES[0]), retriever.aretrieve(QUERIES[0])
        )
        found.extend([one[0].page_content, other[0].node.get_content()])

    def loop() -> None:
        asyncio.run(two(QRAGRetriever(index=index, k=1)))

    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert found == expected * 4
    assert counted.sizes == [1, 3]


def test_a_cancelled_search_disturbs_no_other():
    model = make_model()
    retriever = QRAGRetriever(index=make_index(model), k=2)
    expected = retriever.invoke(QUERIES[1])
    counted = Counted(model, 3)

    async def cancel_one() -> Any:
        tasks = [asyncio.create_task(retriever.ainvoke(query)) for query in QUERIES]
        await asyncio.to_thread(wait_until, lambda: len(counted.collector._waiting) > 0)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        return await tasks[1]

    assert asyncio.run(cancel_one()) == expected


def test_a_search_alone_encodes_once_a_step():
    model = make_model()
    counted = Counted(model, 1)
    options = SearchOptions(k=3)
    MultiStepRetriever(model, make_index(model)).search(QUERIES[0], options)
    assert counted.sizes == [1, 1, 1]


def test_an_interrupt_while_a_call_is_appointed_leaves_nobody_waiting(encoder, monkeypatch):
    encoder.released.set()
    collector = Collector(encoder)
    original = threading.Event.set
    interrupted = []

    def interrupt_once(event):
        if not interrupted:
            interrupted.append(event)
            raise KeyboardInterrupt
        original(event)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "set", interrupt_once)
        with pytest.raises(KeyboardInterrupt):
            collector.encode_states([("1", [])])
    thread, outcome = ask(collector, "2")
    thread.join(LONG)
    assert outcome == [[2.0]]


def test_an_interrupt_of_one_who_encodes_for_others_leaves_them_their_turn() -> None:
    encoder = Encoder()
    collector = Collector(encoder)
    first = ask(collector, "0")
    assert encoder.entered.wait(LONG)
    others = []
    for number in (1, 2, 3):
        others.append(ask(collector, str(number)))
        wait_until(lambda number=number: len(collector._waiting) == number)
    whole, calls = encoder.encode_states, []

    def interrupted_once(states: Any) -> np.ndarray:
        calls.append(len(states))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(states)

    encoder.encode_states = interrupted_once
    encoder.released.set()
    for thread, _ in (first, *others):
        thread.join(LONG)
    assert calls[0] == 3
    outcomes = [outcome for _, [outcome] in others]
    assert first[1] == [[0.0]]
    assert sum(isinstance(outcome, KeyboardInterrupt) for outcome in outcomes) == 1
    rest = [n for n, outcome in enumerate(outcomes, 1) if outcome == [float(n)]]
    assert len(rest) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_forked_while_another_thread_encodes_can_search() -> None:
    encoder = Encoder()
    thread, _ = ask(collector_of(encoder), "0")
    assert encoder.entered.wait(LONG)
    child = os.fork()
    if child == 0:
        threading.Timer(LONG, os._exit, [2]).start()
        encoder.released.set()
        os._exit(int(collector_of(encoder).encode_states([("7", [])])[0, 0] != 7.0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    encoder.released.set()
    thread.join(LONG)
