from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import lightning
import numpy as np
import pytest
import torch
from tiny import Colours, tiny_model

from qrag_retriever import QRAGModel, SearchOptions
from qrag_retriever.errors import ModelFormatError
from qrag_train.build import AdaptConfig, adapted
from qrag_train.callbacks import (
    AtomicCheckpointIO,
    BestModel,
    Criterion,
    LastCheckpoint,
    ProgressBar,
    ProgressLines,
    export,
)
from qrag_train.curves import plot_curves, read_curves
from qrag_train.evaluation import search_samples
from qrag_train.loader import RolloutLoader, SampleLoader
from qrag_train.metrics import retrieval_metrics
from qrag_train.settings import OptimizerConfig, PQNConfig
from qrag_train.validation import ValidatedTrainingModule

SAMPLES = [Colours().sample(np.random.default_rng(i)) for i in range(8)]


@pytest.fixture
def module(tmp_path: Path) -> ValidatedTrainingModule:
    model = tiny_model(tmp_path / "encoder", "none", scale=0.2)
    pqn = PQNConfig(environments=4, random_transitions=8)
    return ValidatedTrainingModule(model, pqn, OptimizerConfig(lr=3e-3, warmup_updates=2))


def fit(
    module: ValidatedTrainingModule, folder: Path, updates: int = 4, **settings: Any
) -> lightning.Trainer:
    values = {
        "accelerator": "cpu",
        "max_steps": updates,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 2,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        **settings,
    }
    trainer = lightning.Trainer(**values)
    batches = updates * trainer.accumulate_grad_batches
    trainer.fit(module, RolloutLoader(Colours(), batches), SampleLoader(SAMPLES, size=3))
    return trainer


class Steps(LastCheckpoint):
    """Notes at which updates it saved."""

    def __init__(self, file: Path, minutes: float) -> None:
        super().__init__(file, minutes)
        self.saved: list[int] = []

    def _save(self, trainer: lightning.Trainer) -> None:
        super()._save(trainer)
        self.saved.append(trainer.global_step)


@pytest.mark.parametrize(("minutes", "saved"), [(60, [2, 4, 4]), (0, [1, 2, 3, 4, 4])])
def test_checkpoints_by_time_and_after_validation(
    module: ValidatedTrainingModule, tmp_path: Path, minutes: float, saved: list[int]
) -> None:
    callback = Steps(tmp_path / "c" / "last.ckpt", minutes)
    fit(module, tmp_path, callbacks=[callback])
    assert callback.saved == saved
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["last.ckpt"]


def test_no_checkpoint_between_gradients_and_their_update(
    module: ValidatedTrainingModule, tmp_path: Path
) -> None:
    callback = Steps(tmp_path / "last.ckpt", 0)
    fit(module, tmp_path, accumulate_grad_batches=3, callbacks=[callback], val_check_interval=5)
    assert callback.saved == [1, 2, 3, 4, 4]


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"a": torch.tensor(1)}, file)
    before = file.read_bytes()

    def stop(self: Path, target: Path) -> None:
        raise OSError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(OSError, match="power"):
            io.save_checkpoint({"a": torch.tensor(2)}, file)
    assert file.read_bytes() == before
    io.save_checkpoint({"a": torch.tensor(2)}, file)
    assert io.load_checkpoint(file)["a"] == 2


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_damaged_checkpoint_says_so(tmp_path: Path, length: int) -> None:
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelFormatError, match=r"last.ckpt is damaged .*start anew"):
        io.load_checkpoint(file)


class PressCtrlC(lightning.Callback):
    def __init__(self, times: int) -> None:
        self.times = times
        self.after = 0

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            self.after += 1


class Validated(lightning.Callback):
    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if not trainer.sanity_checking and trainer.global_step:
            self.at.append(trainer.global_step)


@pytest.mark.parametrize("times", [1, 2])
def test_one_ctrl_c_finishes_the_update_and_two_do_not(
    module: ValidatedTrainingModule, tmp_path: Path, times: int
) -> None:
    press, save, judged = PressCtrlC(times), Steps(tmp_path / "last.ckpt", 60), Validated()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(module, tmp_path, callbacks=[press, save, judged])
    assert save.saved == ([2] if times == 1 else [])
    assert judged.at == ([2] if times == 1 else []), "a validation that is due is not left out"
    assert press.after == (1 if times == 1 else 0)
    assert signal.getsignal(signal.SIGINT) is before


class Scores(lightning.Callback):
    """Replaces what a validation found."""

    def __init__(self, *scores: tuple[float, float]) -> None:
        self.scores = list(scores)

    def on_validation_end(self, trainer: lightning.Trainer, *_: object) -> None:
        em, total = self.scores.pop(0)
        figures = {"val/fact_em": torch.tensor(em), "val/return": torch.tensor(total)}
        trainer.callback_metrics.update(figures)


@pytest.mark.parametrize(("by", "updates"), [("return", [2, 6, 8, 10]), ("fact_em", [2, 4, 12])])
def test_the_best_model_has_the_best_return_then_the_best_em_or_the_reverse(
    module: ValidatedTrainingModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: Criterion,
    updates: list[int],
) -> None:
    class Spy(BestModel):
        exported: ClassVar[list[int]] = []

    monkeypatch.setattr(
        "qrag_train.callbacks.export",
        lambda module, folder, record: Spy.exported.append(record["updates"]),
    )
    scores = Scores((0.3, 0.5), (0.4, 0.4), (0.3, 0.5), (0.31, 0.5), (0.1, 0.7), (0.4, 0.45))
    monkeypatch.setattr(lightning.Trainer, "callback_metrics", {}, raising=True)
    spy = Spy(tmp_path / "model", by=by)
    fit(module, tmp_path, 12, callbacks=[scores, spy])
    assert Spy.exported == updates
    best = {"return": (0.7, 0.1), "fact_em": (0.45, 0.4)}[by]
    assert (spy.figures["return"], spy.figures["fact_em"]) == pytest.approx(best)


def test_the_best_score_survives_a_checkpoint() -> None:
    first, second = BestModel(Path("model")), BestModel(Path("model"))
    first.score, first.updates = (0.5, 0.25), 7
    second.load_state_dict(first.state_dict())
    assert (second.score, second.updates) == ((0.5, 0.25), 7)


def test_an_exported_model_computes_what_the_trained_one_does(
    module: ValidatedTrainingModule, tmp_path: Path
) -> None:
    adapted(module.model, AdaptConfig(freeze_word_embeddings=True, lora_rank=2))
    module = ValidatedTrainingModule(module.model, module.pqn, module.optimizer_config)
    state, texts = [("where is the cup", ["the red cup fell"])], ["the blue hat fell"]
    before = module.model.encode_states(state)
    fit(module, tmp_path, 6)
    module.eval()
    trained = module.model.encode_states(state), module.model.encode_actions(texts)
    assert not np.allclose(trained[0], before, atol=1e-4)
    export(module, tmp_path / "model", {"updates": 6})
    loaded = QRAGModel.from_pretrained(tmp_path / "model", device="cpu")
    np.testing.assert_allclose(loaded.encode_states(state), trained[0], atol=1e-5)
    np.testing.assert_allclose(loaded.encode_actions(texts), trained[1], atol=1e-5)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert any("lora" in name for name, _ in module.model.named_parameters())
    assert loaded.config.max_steps == 2
    assert "after 6 updates" in (tmp_path / "model" / "README.md").read_text()


def test_an_exported_model_keeps_its_budget_where_episodes_are_shorter(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "none", max_steps=3)
    module = ValidatedTrainingModule(model, PQNConfig(max_steps=2))
    export(module, tmp_path / "model", {"updates": 6})
    config = QRAGModel.from_pretrained(tmp_path / "model", device="cpu").config
    assert config.max_steps == config.training["max_steps"] == 3
    assert "3 chunks retrieved for each" in (tmp_path / "model" / "README.md").read_text()


def test_the_mean_weights_are_judged_and_exported(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "none", scale=0.2)
    optimizer = OptimizerConfig(lr=3e-3, warmup_updates=2, average_updates=50)
    pqn = PQNConfig(environments=4, random_transitions=8)
    module = ValidatedTrainingModule(model, pqn, optimizer)
    trainer = fit(module, tmp_path, 6)
    scores = retrieval_metrics(
        [b.retrieved for b in search_samples(module.averaged, SAMPLES, SearchOptions(2))],
        [sample.support for sample in SAMPLES],
    )
    judged = trainer.callback_metrics["val/fact_f1"]
    assert float(judged) == pytest.approx(scores["fact_f1"], abs=1e-6)
    export(module, tmp_path / "model", {"updates": 6})
    texts = ["the blue hat fell"]
    found = QRAGModel.from_pretrained(tmp_path / "model", device="cpu").encode_actions(texts)
    np.testing.assert_allclose(found, module.averaged.encode_actions(texts), atol=1e-6)
    assert not np.allclose(found, module.model.encode_actions(texts), atol=1e-3)


def test_progress_on_a_terminal_and_without_one(
    module: ValidatedTrainingModule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(module, tmp_path, callbacks=[ProgressLines(seconds=0)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert [line.split()[1].strip(",") for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    figures = ("min left", "return=", "fact_em=", "loss=", "alpha=", "transitions_per_s=")
    assert all(figure in lines[-1] for figure in figures)
    fit(module, tmp_path, callbacks=[ProgressBar()], enable_progress_bar=True)
    shown = capsys.readouterr()
    assert "Training: 100%" in shown.out + shown.err
    assert "transitions_per_s=" in shown.out + shown.err


def write_metrics(folder: Path, version: int, rows: list[dict[str, object]]) -> None:
    path = folder / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", "loss", "val/fact_em"])
        writer.writeheader()
        writer.writerows(rows)


def test_the_curves_of_a_resumed_run_are_joined(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        9,
        [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "val/fact_em": 0.5}],
    )
    write_metrics(tmp_path, 10, [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.0}])
    cut_off = tmp_path / "version_10" / "metrics.csv"
    cut_off.write_text(cut_off.read_text() + "3,0,x\n4")
    curves = read_curves(tmp_path)
    assert curves == {"loss": [(0, 3.0), (1, 2.5), (2, 1.0)], "val/fact_em": [(1, 0.5)]}
    plot_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
