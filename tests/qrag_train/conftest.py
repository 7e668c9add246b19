from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# How long an example takes says nothing about correctness on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def pictures_without_layout() -> Iterator[None]:
    """To find the margins of its picture takes a fifth of a small training's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "set_layout_engine", lambda *_arguments, **_options: None)
        yield
