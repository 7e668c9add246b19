from __future__ import annotations

import os
import signal
from pathlib import Path

import babilong
import pytest
import torch
import training_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qrag_train.curves import read_curves
from qrag_train.module import QRAGTrainingModule


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """A tiny encoder that answers from one sentence."""
    line = (
        '{{"id": "{0}", "question": "where is {0}", "chunks": ["{0} fell", "b"], "support": [0]}}'
    )
    for name, words in (("train", ("cup", "hat", "key")), ("val", ("book", "lamp"))):
        text = "\n".join(line.format(word) for word in words)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {
        "data.train_file": tmp_path / "train.jsonl",
        "data.val_file": tmp_path / "val.jsonl",
        "model.scratch.layers": 1,
        "model.scratch.dimension": 16,
        "model.scratch.heads": 2,
        "model.scratch.vocabulary": 100,
        "model.max_steps": 1,
        "model.pqn.environments": 2,
        "model.optimizer.warmup_updates": 1,
        "trainer.val_check_interval": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
    }


def stop_after(patch: pytest.MonkeyPatch, update: int) -> None:
    """Press Ctrl-C in an update."""
    original = QRAGTrainingModule.training_step

    def step(self: QRAGTrainingModule, *args: object) -> object:
        if self.global_step == update - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    patch.setattr(QRAGTrainingModule, "training_step", step)


def state(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("update", [2, 3])
def test_an_interrupted_training_goes_on_and_a_finished_one_is_left_alone(
    tmp_path: Path, settings: dict[str, object], update: int
) -> None:
    folder, other = tmp_path / "one", tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, update)
        with pytest.raises(SystemExit):
            training_runs.train(folder, 3, settings)
    assert (folder / "curves.png").exists()
    training_runs.train(folder, 3, settings)
    training_runs.train(other, 3, settings)
    ends = [torch.load(run / "checkpoints" / "last.ckpt") for run in (folder, other)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 3
    judged = [read_curves(run / "logs")["val/fact_em"] for run in (folder, other)]
    assert len(judged[0]) == len(judged[1]) == 2
    for name, value in ends[1]["state_dict"].items():
        assert torch.equal(ends[0]["state_dict"][name], value)
    model = Path("model") / "query_0_Transformer" / "model.safetensors"
    assert (folder / model).read_bytes() == (other / model).read_bytes()

    before = state(folder)
    training_runs.train(folder, 3, settings)
    assert state(folder) == before


def test_another_training_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = tmp_path / "one"
    training_runs.train(folder, 3, settings)
    before = state(folder)
    with pytest.raises(SystemExit, match=r"(?s)one holds another .*trainer.max_steps: 3 .* 4 now"):
        training_runs.train(folder, 4, settings)
    changed = settings | {"model.pqn.gamma": 0.5}
    with pytest.raises(SystemExit, match=r"(?s)another --folder.*model.pqn.gamma: .* 0.5 now"):
        training_runs.train(folder, 3, changed)
    assert state(folder) == before


def test_minutes_of_a_resumed_training_are_those_of_all_its_logs(
    tmp_path: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            training_runs.train(folder, 3, settings)
    training_runs.train(folder, 3, settings)
    seconds = []
    for version in ("version_0", "version_1"):
        log = EventAccumulator(str(folder / "logs" / version))
        log.Reload()
        times = {entry.wall_time for tag in log.Tags()["scalars"] for entry in log.Scalars(tag)}
        assert len(times) > 1
        seconds.append(max(times) - min(times))
    assert [babilong.logged_seconds(folder / "logs" / f"version_{i}") for i in (0, 1)] == seconds
    (folder / "logs" / "version_2").mkdir()
    assert babilong.logged_seconds(folder / "logs" / "version_2") == 0.0  # nothing was logged
    monkeypatch.setattr(babilong, "logged_seconds", lambda log: 60.0 * 2 ** int(log.name[-1]))
    assert babilong.training(folder)["training_minutes"] == 1 + 2 + 4
