from __future__ import annotations

import warnings

import pytest

from qrag_retriever.errors import TruncationWarning
from qrag_retriever.warn_once import WarnOnce


def test_warn_once() -> None:
    warn = WarnOnce()
    with pytest.warns(TruncationWarning, match="first"):
        warn("a", "first", TruncationWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("a", "second", TruncationWarning)
    with pytest.warns(TruncationWarning, match="third"):
        warn("b", "third", TruncationWarning)
