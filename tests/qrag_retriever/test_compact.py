from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qrag_retriever import QRAGModel, model_names
from qrag_retriever.compact import MANIFEST, WEIGHTS, renew_manifest, unpack
from qrag_retriever.errors import ModelFormatError


@pytest.fixture
def trained(tiny_model: QRAGModel) -> QRAGModel:
    """Encoders that differ but for their word embeddings."""
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for name, weight in other.action_encoder.named_parameters():
            if "word_embeddings" not in name:
                weight.add_(0.05 * torch.randn(weight.shape))
    return other


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_comes_back_almost_the_same(trained: QRAGModel, tmp_path: Path) -> None:
    plain = trained.save_pretrained(tmp_path / "plain")
    compact = trained.save_pretrained(tmp_path / "compact", compact=True)
    assert size(compact) < size(plain) / 2
    back = QRAGModel.from_pretrained(compact)
    assert back.config == trained.config
    for own, other in zip(trained.parameters(), back.parameters(), strict=True):
        rows = own.detach().reshape(len(own), -1).abs().amax(dim=1)
        bound = rows / 254 + 1e-7 if own.ndim == 2 else rows * 1e-3 + 1e-7
        assert ((own - other).detach().reshape(len(own), -1).abs().amax(dim=1) <= bound).all()
    texts = ["the red cup fell", "where is the hat"]
    expected, got = trained.encode_actions(texts), back.encode_actions(texts)
    assert np.abs(expected - got).max() < 0.05 * np.abs(expected).max()
    assert not np.array_equal(expected, got)


def test_what_both_encoders_have_is_kept_once(trained: QRAGModel, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    kept = load_file(folder / WEIGHTS)
    assert sum("word_embeddings" in name and ".scale" not in name for name in kept) == 1
    assert sum("layer.0.attention.self.query.weight" in name for name in kept) >= 2


def test_equal_files_are_stored_once_and_come_back_under_every_name(
    trained: QRAGModel, tmp_path: Path
) -> None:
    plain = trained.save_pretrained(tmp_path / "plain")
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    assert len(list(plain.rglob("tokenizer.json"))) == 2
    assert len(list(folder.rglob("tokenizer.json"))) == 1
    unpack(folder, tmp_path / "back")
    for file in sorted(plain.rglob("*")):
        if file.is_file() and file.suffix not in {".safetensors", ".md"}:
            assert (tmp_path / "back" / file.relative_to(plain)).read_bytes() == file.read_bytes()


def test_an_equal_file_that_is_stored_again_is_read_too(trained: QRAGModel, tmp_path: Path) -> None:
    plain = trained.save_pretrained(tmp_path / "plain")
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    for file in plain.rglob("tokenizer.json"):
        copied = folder / file.relative_to(plain)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(file.read_bytes())
    assert QRAGModel.from_pretrained(folder).config == trained.config
    copied.write_bytes(b"{}")
    with pytest.raises(ModelFormatError, match="SHA-256"):
        QRAGModel.from_pretrained(folder)


def test_what_is_packed_again_stays_the_same(trained: QRAGModel, tmp_path: Path) -> None:
    once = trained.save_pretrained(tmp_path / "a", compact=True)
    twice = QRAGModel.from_pretrained(once).save_pretrained(tmp_path / "b", compact=True)
    first, second = load_file(once / WEIGHTS), load_file(twice / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if ".scale" not in name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1] + b"x"), "SHA-256"),
        (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
        (lambda f: (f / MANIFEST).write_text("[]"), "is damaged"),
        (lambda f: (f / "qrag_config.json").unlink(), "qrag_config.json"),
        (lambda f: next(f.rglob("tokenizer.json")).unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_changed_file_is_refused(
    trained: QRAGModel, tmp_path: Path, damage: object, message: str
) -> None:
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ModelFormatError, match=message):
        QRAGModel.from_pretrained(folder)


def test_what_lies_beside_the_model_is_no_matter(trained: QRAGModel, tmp_path: Path) -> None:
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    fingerprint = QRAGModel.from_pretrained(folder).fingerprint
    (folder / ".cache").mkdir()
    (folder / ".cache" / "CACHEDIR.TAG").write_text("of a downloader")
    (folder / "README.md").write_text("a better card")
    assert QRAGModel.from_pretrained(folder).fingerprint == fingerprint


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt"])
def test_a_manifest_cannot_write_outside_the_model(
    trained: QRAGModel, tmp_path: Path, name: str
) -> None:
    folder = trained.save_pretrained(tmp_path / "compact", compact=True)
    digests = json.loads((folder / MANIFEST).read_text())
    digests[name] = digests["README.md"]
    (folder / MANIFEST).write_text(json.dumps(digests))
    with pytest.raises(ModelFormatError, match="outside the model"):
        QRAGModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside/model.safetensors",
        "{folder}/model.safetensors",
        "x.pth",
        "C:\\model.safetensors",
    ],
)
def test_weights_cannot_be_written_outside_the_model(
    trained: QRAGModel, tmp_path: Path, name: str
) -> None:
    outside, folder = tmp_path / "outside", trained.save_pretrained(tmp_path / "m", compact=True)
    outside.mkdir()
    file = folder / WEIGHTS
    with safe_open(file, framework="pt") as stored:
        places = json.loads(stored.metadata()["places"])
    foreign = f"{name.format(folder=outside)}:weight"
    changed = {**places, foreign: next(iter(places.values()))}
    save_file(load_file(file), file, metadata={"places": json.dumps(changed)})
    renew_manifest(folder, [WEIGHTS])
    with pytest.raises(ModelFormatError, match="no file of weights"):
        QRAGModel.from_pretrained(folder)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("places", [None, "[]", "{", '{"model.safetensors:weight": "nowhere"}'])
def test_weights_without_their_places_are_damaged(
    trained: QRAGModel, tmp_path: Path, places: str | None
) -> None:
    folder = trained.save_pretrained(tmp_path / "m", compact=True)
    file = folder / WEIGHTS
    save_file(load_file(file), file, metadata=None if places is None else {"places": places})
    renew_manifest(folder, [WEIGHTS])
    with pytest.raises(ModelFormatError, match="damaged"):
        QRAGModel.from_pretrained(folder)


def test_a_model_of_the_package_is_found_by_its_name(
    trained: QRAGModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_names, "_PACKAGED", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    folder = trained.save_pretrained(tmp_path / "models" / "mine", compact=True)
    assert json.loads((folder / MANIFEST).read_text())
    assert model_names.is_qrag_model("mine")
    assert QRAGModel.from_pretrained("mine").config == trained.config
    here = trained.config.replace(max_steps=9)
    QRAGModel(trained.state_encoder, trained.action_encoder, here).save_pretrained("mine")
    assert QRAGModel.from_pretrained("mine").config.max_steps == 9
