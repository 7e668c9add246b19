"""What models are called: by their weights, in half precision by the full ones behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from qrag_retriever.errors import ModelFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from qrag_retriever.config import QRAGConfig
    from qrag_retriever.model import QRAGModel

_FILE = "fingerprint.json"

# of models that search: version and settings, and the fingerprint then
_known: WeakKeyDictionary[QRAGModel, tuple[int, QRAGConfig, str]] = WeakKeyDictionary()


def is_of(fingerprint: str, model: QRAGModel) -> bool:
    """Whether it is the model's, which is computed again only if weights or settings changed."""
    now = present(model)
    if _known.get(model) == (*now, fingerprint):
        return True
    # also where it differs: what is done to the data of weights leaves their version as it is
    _known[model] = (*now, model.fingerprint)
    return _known[model][2] == fingerprint


def present(model: QRAGModel) -> tuple[int, QRAGConfig]:
    """What its embeddings depend on, weights and settings, as they are now; soon compared."""
    return model.action_encoder.version, model.config


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
