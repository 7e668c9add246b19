"""Embedding in parts: what a killed build has to do again, and several processes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from corpus import make_model
from fake_model import FakeModel, vectors_of

from qrag_retriever import QRAGRetriever, embedding
from qrag_retriever.errors import IndexFormatError, InvalidInputError, QRAGError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.vectors import StoredVectors

TEXTS = [f"text {number}" for number in range(11)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embedding, "_PART", 4)


class Killed(BaseException):
    pass


class DyingModel(FakeModel):
    """Ends after some parts."""

    def __init__(self, parts: int = 99, **settings) -> None:
        super().__init__(**settings)
        self.left = parts

    def encode_actions(self, texts, *, show_progress=False):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().encode_actions(texts)


def test_parts_together_are_the_whole(small_parts):
    model = FakeModel()
    index = ChunkIndex.from_texts([*TEXTS, "text 3"], model=model)
    assert np.array_equal(index.snapshot().embeddings, vectors_of([*TEXTS, "text 3"]))
    assert model.encoded == TEXTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_killed_build_goes_on(small_parts, tmp_path, dtype):
    settings = {"dtype": dtype, "checkpoint": tmp_path / "parts", "show_progress": True}
    with pytest.raises(Killed):
        ChunkIndex.from_texts(TEXTS, model=DyingModel(parts=2), **settings)
    model = DyingModel()
    index = ChunkIndex.from_texts(TEXTS, model=model, **settings)
    assert model.encoded == TEXTS[8:]
    expected = StoredVectors.of(vectors_of(TEXTS), dtype)
    assert np.array_equal(index.snapshot().vectors.values, expected.values)
    assert np.array_equal(index.snapshot().embeddings, expected.float32())
    assert not list(tmp_path.glob("parts/.*"))


def test_a_checkpoint_serves_its_own_texts_model_and_type_alone(small_parts, tmp_path):
    ChunkIndex.from_texts(TEXTS, model=FakeModel(), checkpoint=tmp_path)
    for texts, settings, fingerprint in (
        (["other", *TEXTS[1:]], {}, "fake"),
        (TEXTS, {"dtype": "int8"}, "fake"),
        (TEXTS, {}, "another"),
    ):
        model = FakeModel(fingerprint=fingerprint)
        index = ChunkIndex.from_texts(texts, model=model, checkpoint=tmp_path, **settings)
        assert texts[0] in model.encoded
        stored = StoredVectors.of(vectors_of(texts), index.dtype)
        assert np.array_equal(index.snapshot().embeddings, stored.float32())


@pytest.mark.parametrize("left", [100, 0])
def test_a_damaged_part_is_named(small_parts, tmp_path, left):
    ChunkIndex.from_texts(TEXTS, model=FakeModel(), checkpoint=tmp_path)
    file = min(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(IndexFormatError, match=f"{file.name} is damaged.*delete"):
        ChunkIndex.from_texts(TEXTS, model=FakeModel(), checkpoint=tmp_path)
    file.unlink()
    model = FakeModel()
    ChunkIndex.from_texts(TEXTS, model=model, checkpoint=tmp_path)
    assert 0 < len(model.encoded) <= 4


def test_two_processes_give_what_one_gives(small_parts, tmp_path):
    model = make_model()
    expected = model.encode_actions(TEXTS)
    retriever = QRAGRetriever.from_texts(
        TEXTS, model=model, devices=["cpu", "cpu"], checkpoint=tmp_path, show_progress=True
    )
    found = retriever.index.snapshot().embeddings
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 3


def test_parts_are_kept_in_a_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InvalidInputError, match="is a file; name a folder"):
        ChunkIndex.from_texts(TEXTS, model=FakeModel(), checkpoint=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


class ExitingModel(FakeModel):
    def to(self, device):
        raise SystemExit(f"{device} is gone")


def test_a_process_that_ends_is_an_error(small_parts):
    with pytest.raises(QRAGError, match=r"has ended.*checkpoint="):
        ChunkIndex.from_texts(TEXTS, model=ExitingModel(), devices=["cpu"])


class LargeModel(FakeModel):
    """Larger than what a pipe takes before somebody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = np.zeros(1 << 20)


def test_so_is_one_that_ends_before_it_begins(small_parts, tmp_path, monkeypatch):
    script = tmp_path / "script.py"  # as one without a guard, whose main module is run once more
    script.write_text("raise SystemExit")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with pytest.raises(QRAGError, match=r"has ended.*__main__"):
        ChunkIndex.from_texts(TEXTS, model=LargeModel(), devices=["cpu"])


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("cuda:0", r"give \['cuda:0'\]"),
        (3, "devices=3; give a list"),
        (["cpu", "cpuu"], "'cpuu' cannot be used here"),
        (["cuda:99"], "'cuda:99' cannot be used here"),
    ],
)
def test_devices_are_a_list(devices, message):
    with pytest.raises(InvalidInputError, match=message):
        ChunkIndex.from_texts(TEXTS, model=FakeModel(), devices=devices)
