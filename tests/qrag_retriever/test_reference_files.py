"""Checkpoints that are damaged, foreign or malicious, and the command line."""

from __future__ import annotations

import os
import pickle
import runpy
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from released import CHUNKS, edit_config, write_checkpoint

from qrag_retriever.errors import ConfigError, ModelFormatError, UnsafeModelError
from qrag_retriever.model import QRAGModel
from qrag_retriever.reference import load_reference_checkpoint, main

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")
WORDS = "state_embed.model.embeddings.word_embeddings.weight"


def change_weights(folder: Path, change: Any) -> None:
    content = torch.load(folder / "model_best.pt")
    change(content)
    torch.save(content, folder / "model_best.pt")


def drop(text: str) -> Any:
    def change(content: Any) -> None:
        critic = content["critic"]
        for name in [name for name in critic if text in name]:
            del critic[name]

    return change


def put(name: str, value: torch.Tensor) -> Any:
    return lambda content: content["critic"].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("critic"), "has no 'critic'"),
        (drop("action_embed.model.model."), r"lacks \d+ weights \(embeddings"),
        (drop("state_embed.model.encoder.layer.1.output"), "lacks 4 weights"),
        (put("state_embed.model.new", torch.ones(1)), r"unlike the embedder, 1 weights \(new"),
        (put(WORDS, torch.ones(5, 32)), "other shapes 1 weights"),
    ],
)
def test_weights_that_do_not_fit(
    change: Any, message: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    change_weights(tmp_path / "c", change)
    with pytest.raises(ModelFormatError, match=message):
        load_reference_checkpoint(tmp_path / "c", device="cpu")


def test_pooler_is_not_needed(tiny_encoder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    before = load_reference_checkpoint(tmp_path / "c", device="cpu").encode_actions(CHUNKS)
    change_weights(tmp_path / "c", drop(".pooler."))
    after = load_reference_checkpoint(tmp_path / "c", device="cpu").encode_actions(CHUNKS)
    np.testing.assert_array_equal(before, after)


def test_another_embedder(tiny_encoder: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    with pytest.raises(ModelFormatError, match="2 layers and the embedder, a Qwen3Model, 0"):
        load_reference_checkpoint(tmp_path / "c", tiny_qwen3)
    edit_config(tmp_path / "c", "algo.model.predictor.num_layers", 4)
    with pytest.raises(ModelFormatError, match="4 layers and the embedder, a BertModel, 3"):
        load_reference_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 cut off", None])
def test_damaged_checkpoint(content: bytes | None, tiny_encoder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    file = tmp_path / "c" / "model_best.pt"
    file.write_bytes(file.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ModelFormatError, match=r"model_best\.pt is damaged"):
        load_reference_checkpoint(tmp_path / "c")


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_code_in_a_checkpoint_is_not_run(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "c", tiny_encoder)
    file = tmp_path / "c" / "model_best.pt"
    change_weights(tmp_path / "c", lambda content: content.update(policy=Malicious()))
    with pytest.raises(UnsafeModelError, match="holds more than weights"):
        load_reference_checkpoint(tmp_path / "c")
    file.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ModelFormatError):
        load_reference_checkpoint(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def test_config_objects_in_the_optimizer_state(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older PyTorch saved betas as OmegaConf's list; it is passed over, nothing is imported."""

    class ListConfig:
        def __init__(self) -> None:
            self.content = [0.9, 0.98]
            self.kinds = [dict, int, list, Any]

        def __setstate__(self, state: object) -> None:
            raise AssertionError("a class of the checkpoint was used")

    ListConfig.__module__, ListConfig.__qualname__ = "omegaconf.listconfig", "ListConfig"
    module: Any = types.ModuleType("omegaconf.listconfig")
    module.ListConfig = ListConfig
    write_checkpoint(tmp_path / "c", tiny_encoder)
    before = load_reference_checkpoint(tmp_path / "c", device="cpu").encode_actions(CHUNKS)
    allowed = set(torch.serialization.get_safe_globals())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.listconfig", module)
        change_weights(
            tmp_path / "c",
            lambda content: content.update(
                critic_optim={"param_groups": [{"betas": ListConfig()}]}
            ),
        )
        after = load_reference_checkpoint(tmp_path / "c", device="cpu").encode_actions(CHUNKS)
    np.testing.assert_array_equal(before, after)
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("envs.positions_processor", "random", ConfigError, "RandomPositionProcessor"),
        ("algo.model.predictor.output_dim", 2, ConfigError, "only 1 is supported"),
        ("envs.env.separator", " | ", ConfigError, "separator is ' | '"),
        ("algo.pqn.state_embed._target_", "rl.New", ConfigError, "a New; only BertPredictor"),
        ("max_action_length", None, ModelFormatError, "no setting envs.env.action_embed_length"),
        ("max_action_length", "many", ModelFormatError, "an integer of at least 1"),
        ("envs.positions_processor", None, ModelFormatError, "no setting algo.pqn.action_embed"),
        ("algo.model.predictor", None, ModelFormatError, "no setting .*num_layers"),
        ("max_action_length", 2, ConfigError, "max_chunk_tokens=2"),
    ],
)
def test_settings_that_cannot_be_used(
    path: str,
    value: Any,
    error: type[Exception],
    message: str,
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    edit_config(tmp_path / "c", path, value)
    with pytest.raises(error, match=message):
        load_reference_checkpoint(tmp_path / "c")


# --- the command line


def test_conversion(tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    source, target = str(tmp_path / "c"), str(tmp_path / "m")
    assert main([source, target, "--encoder", str(tiny_encoder), "--checkpoint", "best"]) == 0
    assert "positions relative, 3 steps" in capsys.readouterr().out
    expected = load_reference_checkpoint(source, device="cpu").encode_actions(CHUNKS)
    loaded = QRAGModel.from_pretrained(target, device="cpu")
    np.testing.assert_array_equal(loaded.encode_actions(CHUNKS), expected)


def test_failed_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["reference", str(tmp_path), str(tmp_path / "m")])
    monkeypatch.delitem(sys.modules, "qrag_retriever.reference")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("qrag_retriever.reference", run_name="__main__")
    assert exit_.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "config.yaml is missing" in lines[0]
    assert not (tmp_path / "m").exists()
