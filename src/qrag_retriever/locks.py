"""Locks that a fork cannot leave closed."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import Any


class Lock:
    """A reentrant lock that is open in a forked child, whoever held it in the parent.

    What it guards must be usable at every moment of a change, for the child sees it as it was then.
    A copy, or what is unpickled, is a lock of its own.
    """

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):  # a child leaves what its parent entered
            self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock._renew()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
