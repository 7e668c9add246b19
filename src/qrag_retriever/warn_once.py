"""Warnings that come a single time, from the line that can be mended."""

from __future__ import annotations

import sys
import warnings

_PACKAGES = ("qrag_retriever", "qrag_train")


class WarnOnce:
    """Issues each warning a single time for the object that owns it."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, key: str, message: str, category: type[Warning]) -> None:
        """Warn with ``message`` unless ``key`` was warned of before.

        The warning names the line of the caller's own code that led to it, where it can be mended.
        """
        if key in self._seen:
            return
        self._seen.add(key)
        level, frame = 1, sys._getframe()  # noqa: SLF001
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
            level, frame = level + 1, frame.f_back
        warnings.warn(message, category, stacklevel=level)
