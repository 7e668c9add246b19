"""Searches that run at the same time share encoder passes."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from qrag_retriever.locks import Lock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from qrag_retriever.model import QRAGModel, State

_T = TypeVar("_T")

# Threads that wait for an encoder cost nothing; asyncio's own are few where cores are few.
_THREADS = ThreadPoolExecutor(64, thread_name_prefix="qrag")


async def in_thread(function: Callable[..., _T], *arguments: Any) -> _T:
    """Run a function in a thread, with the context variables of the caller."""
    run = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(_THREADS, run, function, *arguments)


class _Call:
    """What one thread wants encoded."""

    def __init__(self, states: Sequence[State]) -> None:
        self.states = states
        self.vectors: NDArray[np.float32] | None = None
        self.error: Exception | None = None
        self.awake = threading.Event()  # set when it is done, or has to lead

    @property
    def done(self) -> bool:
        return self.vectors is not None or self.error is not None


class Collector:
    """Encodes the states of several threads together.

    While one thread encodes, the calls of others wait; then one of these encodes for all that have
    come together by then. So nobody waits for company, and a thread alone loses nothing.

    Args:
        model: Encodes the states.
    """

    def __init__(self, model: QRAGModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._leader: _Call | None = None
        self._waiting: list[_Call] = []

    def encode_states(self, states: Sequence[State]) -> NDArray[np.float32]:
        """As `QRAGModel.encode_states`; an error in one call is no other's."""
        call = _Call(states)
        try:
            with self._lock:
                self._waiting.append(call)
                if self._leader is None:
                    self._leader = call
                    call.awake.set()
            call.awake.wait()
            if not call.done:
                self._lead(call)
        except BaseException:  # an interrupt from outside, not an error of the model
            self._leave(call)
            raise
        if call.error is not None:
            raise call.error
        assert call.vectors is not None
        return call.vectors

    def _lead(self, own: _Call) -> None:
        """Encode for everyone who waits, then let another lead."""
        calls: list[_Call] = []
        try:
            with self._lock:
                calls, self._waiting = self._waiting, []
            self._encode(calls)
        finally:
            with self._lock:  # an interrupt concerns this thread alone: the others try again
                left = [call for call in calls if not call.done and call is not own]
                self._waiting = left + self._waiting
                self._hand_over()
            for call in calls:
                if call.done:
                    call.awake.set()

    def _encode(self, calls: Sequence[_Call]) -> None:
        model = self._model()
        assert model is not None  # the callers hold it
        try:
            together = [state for call in calls for state in call.states]
            vectors = model.encode_states(together)
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:  # whose error is it?
                self._encode([call])
            return
        first = 0
        for call in calls:
            call.vectors = vectors[first : first + len(call.states)]
            first += len(call.states)

    def _leave(self, call: _Call) -> None:
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            if self._leader is call:
                self._hand_over()

    def _hand_over(self) -> None:
        self._leader = self._waiting[0] if self._waiting else None
        if self._leader is not None:
            self._leader.awake.set()


_collectors: weakref.WeakKeyDictionary[QRAGModel, Collector] = weakref.WeakKeyDictionary()
_lock = Lock()


def collector_of(model: QRAGModel) -> Collector:
    """The collector that all searches with a model share."""
    with _lock:
        if model not in _collectors:
            _collectors[model] = Collector(model)
        return _collectors[model]


def _forget() -> None:
    """In a forked child: its parent's threads, and whoever led among them, are not there."""
    global _THREADS  # noqa: PLW0603
    _collectors.clear()
    _THREADS = ThreadPoolExecutor(64, thread_name_prefix="qrag")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
