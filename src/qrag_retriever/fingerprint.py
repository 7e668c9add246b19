"""What weights in half precision are called: after the full ones that they were rounded from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from qrag_retriever.errors import ModelFormatError

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "fingerprint.json"


class Names(NamedTuple):
    """What weights in half precision are called, so that indexes of the full ones stay theirs.

    Attributes:
        weights: Fingerprint that the weights have by themselves.
        fingerprint: That of the full weights they were rounded from.
    """

    weights: str
    fingerprint: str


def read_names(folder: Path) -> Names | None:
    """What `write_names` wrote of weights in half precision; ``None`` for others.

    Raises:
        ModelFormatError: If the file is damaged.
    """
    file = folder / _FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Names(str(values["weights"]), str(values["fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"{file} is damaged ({error!r}). Copy or download the model again."
        ) from error


def write_names(folder: Path, names: Names) -> None:
    """Put the names of weights in half precision into their folder."""
    (folder / _FILE).write_text(json.dumps(names._asdict(), indent=2), encoding="utf-8")
