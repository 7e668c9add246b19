from __future__ import annotations

import hashlib
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qrag_retriever import offline
from qrag_retriever.errors import MissingDependencyError, ModelFormatError
from qrag_retriever.model import QRAGModel

if TYPE_CHECKING:
    from pathlib import Path

needs_extra = pytest.mark.skipif(
    not offline.is_installed(), reason="the 'offline' extra is not installed"
)


@needs_extra
def test_the_published_weights() -> None:
    folder = offline.minilm_folder()
    model = QRAGModel.from_encoder(device="cpu")
    assert model.dimension == 384
    assert model.config.scale == 1, "MiniLM normalises its embeddings"
    assert QRAGModel.from_encoder(folder, device="cpu").fingerprint == model.fingerprint
    question, answer, other = (
        model.encode_actions([text])[0]
        for text in ("Where is Paris?", "Paris is in France.", "Bananas are yellow.")
    )
    np.testing.assert_allclose(np.linalg.norm(question), 1, atol=1e-5)
    assert question @ answer > question @ other + 0.3


def test_sha256(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights" * 300_000)
    offline.check_sha256(file, hashlib.sha256(b"weights" * 300_000).hexdigest())
    with pytest.raises(ModelFormatError, match="damaged or was changed"):
        offline.check_sha256(file, hashlib.sha256(b"others").hexdigest())
    with pytest.raises(ModelFormatError, match="is missing"):
        offline.check_sha256(tmp_path / "none", "")


def test_changed_weights_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / offline._PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model" / "model.safetensors").write_bytes(b"changed")
    monkeypatch.syspath_prepend(tmp_path)
    offline.minilm_folder.cache_clear()
    with pytest.raises(ModelFormatError, match="SHA-256"):
        QRAGModel.from_encoder()
    offline.minilm_folder.cache_clear()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    offline.minilm_folder.cache_clear()
    assert not offline.is_installed()
    with pytest.raises(MissingDependencyError, match=r"pip install 'qrag-retriever\[offline\]'"):
        offline.minilm_folder()
