"""Locks across forks, copies and pickles."""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest

from qrag_retriever import QRAGModel
from qrag_retriever.locks import Lock


def is_open(lock: Lock) -> bool:
    """Whether another thread can enter within a second."""
    entered = threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    return entered.wait(1)


def test_one_thread_at_a_time_and_itself_again() -> None:
    lock = Lock()
    with lock:
        with lock:
            assert not is_open(lock)
        assert not is_open(lock)
    assert is_open(lock)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda lock: pickle.loads(pickle.dumps(lock))])
def test_a_copy_is_a_lock_of_its_own(again) -> None:
    lock = Lock()
    with lock:
        assert is_open(again(lock))


def in_child(work) -> int:
    """Exit status of a forked child: 0 if `work` gave true, 1 if not, 2 if it hung or failed."""
    child = os.fork()
    if child == 0:
        status = 2
        threading.Timer(20, os._exit, [2]).start()
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_finds_it_open(tiny_model: QRAGModel) -> None:
    lock, held, done = (
        tiny_model.state_encoder._tokenizer_lock,
        threading.Event(),
        threading.Event(),
    )

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    threading.Thread(target=hold).start()
    held.wait()
    try:
        assert in_child(lambda: len(tiny_model.state_encoder.tokenize(["the cup"])) == 1) == 0
    finally:
        done.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_leaves_what_its_parent_entered() -> None:
    lock = Lock()

    def leave() -> bool:
        lock.__exit__()
        return is_open(lock)

    with lock:
        assert in_child(leave) == 0
        assert not is_open(lock)
