from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from own_code import bring_code
from qrag_retriever import model_files, model_names
from qrag_retriever.errors import (
    ConfigError,
    InvalidInputError,
    ModelFormatError,
    UnsafeModelError,
)
from qrag_retriever.model import QRAGModel

CHUNKS = ["Mary took the milk.", "John went to the garden."]


@pytest.fixture
def folder(tiny_model: QRAGModel, tmp_path: Path) -> Path:
    return tiny_model.save_pretrained(tmp_path / "model")


def load(folder: Path, **options: Any) -> QRAGModel:
    return QRAGModel.from_pretrained(folder, device="cpu", **options)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- what is not loaded


@pytest.mark.parametrize("name", ["modeling.py", "sub/native.so", "pytorch_model.bin", "x.PT"])
def test_code_and_pickles(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(UnsafeModelError, match="trust_remote_code=True") as caught:
        load(folder)
    assert name in str(caught.value)
    assert load(folder, trust_remote_code=True).dimension == 32


def test_classes_that_come_with_the_model(folder: Path) -> None:
    config = next(folder.rglob("config.json"))
    edit(config, auto_map={"AutoModel": "elsewhere/repo--modeling.Evil"})
    with pytest.raises(
        UnsafeModelError, match=r"asks for the class 'elsewhere/repo--modeling\.Evil'"
    ):
        load(folder)


@pytest.mark.parametrize(
    "kind", ["os.system", "custom_st.Transformer", "sentence_transformers_x.A"]
)
def test_module_classes_of_other_packages(folder: Path, kind: str) -> None:
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    modules[0]["type"] = kind
    file.write_text(json.dumps(modules))
    with pytest.raises(UnsafeModelError, match=f"asks for the class '{kind}'"):
        load(folder)


def test_route_classes_of_other_packages(folder: Path) -> None:
    file = folder / "router_config.json"
    types = json.loads(file.read_text())["types"]
    edit(file, types=dict.fromkeys(types, "os.system"))
    with pytest.raises(UnsafeModelError, match=r"asks for the class 'os\.system'"):
        load(folder)


def test_embedder_with_classes_of_its_own(tiny_sentence_encoder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    SentenceTransformer(str(tiny_sentence_encoder), device="cpu").save(str(copy))
    edit(copy / "config.json", auto_map={"AutoModel": "modeling.Custom"})
    with pytest.raises(UnsafeModelError, match=r"modeling\.Custom"):
        QRAGModel.from_encoder(copy)


# --- a model with code of its own


@pytest.fixture
def own_encoder(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    return bring_code(tiny_encoder, tmp_path / "own")


@pytest.mark.parametrize("compact", [False, True])
def test_code_is_saved_with_the_model(
    compact: bool, own_encoder: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsafeModelError, match=r"asks for the class 'own\.OwnConfig'"):
        QRAGModel.from_encoder(own_encoder, device="cpu")
    model = QRAGModel.from_encoder(own_encoder, device="cpu", trust_remote_code=True)
    plain = QRAGModel.from_encoder(tiny_encoder, device="cpu")
    expected = plain.encode_actions(CHUNKS)
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), expected)
    folder = model.save_pretrained(tmp_path / "model", compact=compact)
    with pytest.raises(UnsafeModelError, match=r"own\.py"):
        load(folder)
    again = load(folder, trust_remote_code=True)
    assert type(again.action_encoder.transformer.model).__name__ == "OwnModel"
    difference = again.encode_actions(CHUNKS) - expected
    assert np.abs(difference).max() <= (0.02 if compact else 0)
    if not compact:
        whole = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
        np.testing.assert_allclose(whole.encode_document(CHUNKS) * 0.1, expected, atol=1e-6)
    # it may be someone's own file, so another model in its place leaves it, and says what to do
    plain.save_pretrained(folder)
    with pytest.raises(UnsafeModelError, match=r"own\.py.*Remove the file"):
        load(folder)
    (folder / "own.py").unlink()
    np.testing.assert_array_equal(load(folder).encode_actions(CHUNKS), expected)


def test_encoders_with_different_code_of_one_name(own_encoder: Path, tmp_path: Path) -> None:
    other = bring_code(own_encoder, tmp_path / "other")
    with (other / "own.py").open("a") as code:
        code.write("# another version\n")
    first, second = (
        QRAGModel.from_encoder(folder, device="cpu", trust_remote_code=True)
        for folder in (own_encoder, other)
    )
    model = QRAGModel(first.state_encoder, second.action_encoder, first.config)
    with pytest.raises(ConfigError, match=r"different code under one name, own\.py"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- what is damaged


def weights_of(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("model.safetensors"))
    assert len(files) == 2
    return files


@pytest.mark.parametrize("which", [0, 1])
def test_truncated_weights(folder: Path, which: int) -> None:
    file = weights_of(folder)[which]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFormatError, match="incomplete or damaged"):
        load(folder)


@pytest.mark.parametrize("which", [0, 1])
def test_missing_weights(folder: Path, which: int) -> None:
    file = weights_of(folder)[which]
    tensors = load_file(file)
    name = "encoder.layer.1.output.dense.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, file, {"format": "pt"})
    with pytest.raises(ModelFormatError, match=name):
        load(folder)
    file.unlink()
    with pytest.raises(ModelFormatError, match="incomplete or damaged"):
        load(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    file = weights_of(folder)[0]
    tensors = load_file(file)
    tensors["embeddings.word_embeddings.weight"] = torch.ones(7, 32)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFormatError, match="incomplete or damaged"):
        load(folder)


@pytest.mark.parametrize("name", ["qrag_config.json", "modules.json", "router_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b'"text"', b"7"])
def test_damaged_settings(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFormatError):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"null"])
def test_damaged_settings_of_an_encoder(folder: Path, name: str, content: bytes) -> None:
    (folder / "query_0_Transformer" / name).write_bytes(content)
    with pytest.raises(ModelFormatError):
        load(folder)


@pytest.mark.parametrize("name", ["modules.json", "router_config.json"])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelFormatError, match="incomplete or damaged"):
        load(folder)


def test_settings_of_another_version_or_kind(folder: Path) -> None:
    edit(folder / "qrag_config.json", format_version=2)
    with pytest.raises(ModelFormatError, match="format version 2"):
        load(folder)
    edit(folder / "qrag_config.json", format_version=1, positions="sideways")
    with pytest.raises(ConfigError, match="positions='sideways'"):
        load(folder)


def test_no_model_there(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no Q-RAG model.*QRAGModel\.from_encoder"):
        load(tiny_encoder)
    with pytest.raises(ModelFormatError, match="No Q-RAG model at"):
        QRAGModel.from_pretrained("nobody/no-such-model", local_files_only=True)
    with pytest.raises(ModelFormatError, match="cannot be loaded"):
        QRAGModel.from_encoder(tmp_path)
    with pytest.raises(ModelFormatError, match=r"cannot be loaded.*There is no such folder"):
        QRAGModel.from_encoder(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("multihop_en", "'multihop-en'"),
        ("babylong", "'babilong'"),
        ("all-MiniLM-L6", "'sentence-transformers/all-MiniLM-L6-v2'"),
        ("quite/another", None),
    ],
)
def test_a_misspelt_name_is_recognised(name: str, meant: str | None) -> None:
    for make in (QRAGModel.from_encoder, QRAGModel.from_pretrained):
        with pytest.raises(ModelFormatError) as caught:
            make(name)
        assert "Without a hub there are babilong, multihop-en, " in str(caught.value)
        assert ("Did you mean" in str(caught.value)) == (meant is not None)
        assert meant is None or f"Did you mean {meant}?" in str(caught.value)


def test_home_folder(
    tiny_encoder: Path, tiny_model: QRAGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_encoder.parent))
    model = QRAGModel.from_encoder(f"~/{tiny_encoder.name}", device="cpu")
    assert model.fingerprint == tiny_model.fingerprint


# --- saving


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_something_else(tiny_model: QRAGModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="is left as it is"):
        tiny_model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="is left as it is"):
        tiny_model.save_pretrained(tmp_path / "notes.txt")
    assert names(tmp_path) == ["notes.txt"]


def test_new_empty_and_old_folders(tiny_model: QRAGModel, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert tiny_model.save_pretrained(empty) == empty
    tiny_model.save_pretrained(tmp_path / "deep" / "down")
    (empty / "fingerprint.json").write_text("of an older model")
    (empty / ".git").mkdir()
    (empty / ".git" / "HEAD").write_text("of the hub's repository")
    tiny_model.save_pretrained(empty)
    assert not (empty / "fingerprint.json").exists()
    assert (empty / ".git" / "HEAD").read_text() == "of the hub's repository"
    assert names(tmp_path) == ["deep", "empty"], "nothing temporary is left"
    assert empty.stat().st_mode & 0o777 == 0o755
    assert not list(empty.rglob("*.py")), "a model folder holds no code"
    card = (empty / "README.md").read_text()
    assert 'from_pretrained("empty")' in card
    assert '"positions": "relative"' in card


@pytest.mark.parametrize("broken", ["write", "rename", "write tensors"])
def test_a_failing_save_leaves_the_old_model(
    broken: str, tiny_model: QRAGModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    replace = Path.replace

    def fail_to_rename(self: Path, target: Path) -> Path:
        if target == folder and ".new-" in self.name:
            raise OSError("no space left")
        return replace(self, target)

    def fail_to_write(*_: Any, **__: Any) -> None:
        raise (OSError if broken == "write" else SafetensorError)("no space left")

    if broken == "rename":
        monkeypatch.setattr(Path, "replace", fail_to_rename)
    else:
        monkeypatch.setattr(SentenceTransformer, "save_pretrained", fail_to_write)
    with pytest.raises(OSError, match="no space left"):
        tiny_model.save_pretrained(folder)
    monkeypatch.undo()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert names(folder.parent) == ["model"]


def test_a_save_that_is_killed_between_its_renames_tells_where_the_old_model_is(
    tiny_model: QRAGModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target == folder:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die)  # neither the new nor the old one comes back
    with pytest.raises(KeyboardInterrupt):
        tiny_model.save_pretrained(folder)
    monkeypatch.undo()
    with pytest.raises(ModelFormatError, match="A save of it was cut short: rename") as told:
        load(folder)
    Path(str(told.value).rpartition("rename ")[2].rstrip(".")).rename(folder)
    assert load(folder).fingerprint == tiny_model.fingerprint


def test_a_mount_point_cannot_be_replaced(
    tiny_model: QRAGModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(InvalidInputError, match="give a folder inside it"):
        tiny_model.save_pretrained(folder)
    assert names(folder.parent) == ["model"]


def test_saving_over_the_folder_it_was_loaded_from(folder: Path) -> None:
    model = load(folder)
    before = model.encode_actions(CHUNKS)
    model.save_pretrained(folder)
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), before)
    np.testing.assert_array_equal(load(folder).encode_actions(CHUNKS), before)


# --- the hub


def test_push_to_hub(
    tiny_model: QRAGModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []

    class FakeHub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id="me/" + repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            Path(folder_path).rename(tmp_path / "uploaded")
            Path(folder_path).mkdir()
            return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    monkeypatch.setattr(model_files, "HfApi", FakeHub)
    address = tiny_model.push_to_hub("qrag", private=True, token="secret")
    assert address == "https://hub.example/me/qrag/commit/1"
    assert calls == ["secret", ("qrag", True, True)]
    uploaded = load(tmp_path / "uploaded")
    assert uploaded.fingerprint == tiny_model.fingerprint
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert "library_name: qrag-retriever" in card
    assert 'from_pretrained("me/qrag")' in card


def test_download_takes_no_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fake_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(model_names, "snapshot_download", fake_download)
    model = QRAGModel.from_pretrained("me/qrag", revision="v1", token="t", device="cpu")
    assert model.dimension == 32
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/qrag", "v1", "t")
    assert not any(Path("x" + p).suffix in (".py", ".bin", ".pt") for p in asked["allow_patterns"])


def test_the_folder_a_process_works_in_stays(
    tiny_model: QRAGModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", tmp_path / "here", ".."):
        with pytest.raises(InvalidInputError, match="where this process works"):
            tiny_model.save_pretrained(folder)
    tiny_model.save_pretrained("model")
    assert QRAGModel.from_pretrained(Path("model"), device="cpu").config == tiny_model.config
