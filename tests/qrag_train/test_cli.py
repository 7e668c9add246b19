from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from tiny import fit_options, tiny_model, write_questions

from qrag_retriever import QRAGModel
from qrag_retriever.errors import DatasetError, InvalidInputError
from qrag_train import cli
from qrag_train.callbacks import BestModel
from qrag_train.cli import main, read_questions
from qrag_train.curves import read_curves
from qrag_train.module import QRAGTrainingModule
from qrag_train.validation import ValidatedTrainingModule

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
TRAININGS = [file for file in sorted(CONFIGS.glob("*.yaml")) if "\nmodel:" in file.read_text()]
FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "reference"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(fit_options(folder)) == 0
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)
    moments = {
        f"{i}/{name}": value
        for i, state in checkpoint["optimizer_states"][0]["state"].items()
        for name, value in state.items()
    }
    return {**checkpoint["state_dict"], **moments}


def assert_same_run(run: Path, other: Path) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for file in ("query_0_Transformer", "document_0_Transformer"):
        path = Path("model") / file / "model.safetensors"
        assert (run / path).read_bytes() == (other / path).read_bytes()


def test_fit_leaves_all_a_person_needs(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.yaml", "logs", "checkpoints", "model", "curves.png"}
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "logs" / "version_0").glob("events.*"))
    curves = read_curves(whole / "logs")
    assert [step for step, _ in curves["val/fact_em"]] == [0, 1, 3, 5]
    assert [step for step, _ in curves["loss"]] == list(range(6))
    assert {"return", "fact_f1", "alpha", "lr", "transitions_per_s"} <= curves.keys()


def test_the_best_model_loads_in_both_ways_and_knows_its_training(whole: Path) -> None:
    model = QRAGModel.from_pretrained(whole / "model", device="cpu")
    plain = SentenceTransformer(str(whole / "model"), device="cpu")
    texts = ["the red cup fell", "the blue hat fell"]
    np.testing.assert_allclose(
        plain.encode_document(texts) * model.config.scale, model.encode_actions(texts), atol=1e-6
    )
    assert model.config.max_steps == 2
    record = model.config.training
    assert record["data"]["train_file"].endswith("train.jsonl")
    assert record["settings"]["model"]["pqn"]["environments"] == 4
    em = read_curves(whole / "logs")["val/fact_em"]
    assert record["figures"]["val/fact_em"] == pytest.approx(max(value for _, value in em))
    card = (whole / "model" / "README.md").read_text()
    for part in ("QRAGRetriever", "SentenceTransformer(", "train.jsonl", "fact_em", "lambda_"):
        assert part in card


class KilledError(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, update: int, signal_number: int | None) -> None:
    """Make training end in the middle of an update, by an exception or by Ctrl-C."""
    original = QRAGTrainingModule.training_step

    def step(self: QRAGTrainingModule, *args: Any) -> Any:
        loss = original(self, *args)
        if self.global_step == update:
            if signal_number is None:
                raise KilledError
            os.kill(os.getpid(), signal_number)
        return loss

    monkeypatch.setattr(QRAGTrainingModule, "training_step", step)


@pytest.mark.parametrize("update", [1, 2, 5])
def test_killed_and_resumed_ends_with_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    arguments = fit_options(tmp_path, checkpoint_minutes=0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, update, None)
        with pytest.raises(KilledError):
            main(arguments)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == update
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "run", whole)
    curves, expected = (read_curves(run / "logs") for run in (tmp_path / "run", whole))
    assert curves["loss"] == expected["loss"]
    assert curves["val/fact_em"] == expected["val/fact_em"]


def test_ctrl_c_saves_says_how_to_go_on_and_can_be_resumed_by_the_folder_alone(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            main(fit_options(tmp_path))
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    run = tmp_path / "run"
    assert f"qrag-train fit --output_dir {run} --resume" in capsys.readouterr().out
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 4
    assert main(["fit", "--output_dir", str(run), "--resume"]) == 0
    assert_same_run(run, whole)
    best = QRAGModel.from_pretrained(run / "model").config.training["figures"]
    told = f"return {best['val/return']:.3f}, Fact-EM {best['val/fact_em']:.3f}"
    updates = QRAGModel.from_pretrained(run / "model").config.training["updates"]
    said = " ".join(capsys.readouterr().out.split())
    assert f"The best model, after update {updates} of " in said
    assert f"is in {run / 'model'}: validation {told}." in said


def test_ctrl_c_before_the_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ValidatedTrainingModule, "validation_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(fit_options(tmp_path, updates=2))
    assert stop.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopped before the first update; the same command" in capsys.readouterr().out
    assert main(fit_options(tmp_path, updates=2)) == 0


def test_a_run_is_resumed_with_its_own_settings_alone(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["fit", f"--output_dir={whole}", "--resume"]
    assert main([*resume, "--model.pqn.alpha=0.4", "--trainer.max_steps=9"]) == 1
    error = capsys.readouterr().err
    assert "model.pqn.alpha: 0.03 before, 0.4 now" in error
    assert "trainer.max_steps: 6 before, 9 now" in error
    assert error.count(" before, ") == 2


def test_a_run_may_go_on_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = fit_options(tmp_path, updates=9, **{"trainer.max_time": "00:00:00:04"})
    seconds = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(
            "lightning.pytorch.callbacks.timer.Timer.time_elapsed", lambda *_: next(seconds)
        )
        assert main(options) == 0
    assert "The time given is used up (--trainer.max_time)" in capsys.readouterr().out
    resume = ["fit", f"--output_dir={tmp_path / 'run'}", "--resume"]
    assert main([*resume, "--trainer.max_time=01:00:00:00"]) == 0
    out = capsys.readouterr().out
    assert " of 9, is in" in out
    assert "used up" not in out


def test_a_run_does_not_start_from_a_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = whole / "checkpoints" / "last.ckpt"
    for options in (
        fit_options(tmp_path, ckpt_path=checkpoint),
        ["fit", f"--output_dir={whole}", "--resume", f"--ckpt_path={checkpoint}"],
    ):
        assert main(options) == 1
        assert "goes on by --resume, and a new one starts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_called_by_its_config_or_its_data(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [a for a in fit_options(tmp_path, updates=2) if "output_dir" not in a]
    (tmp_path / "mine.yaml").write_text("trainer: {accelerator: cpu}")
    assert main([*options, "--config", "mine.yaml"]) == 0
    assert (tmp_path / "runs" / "mine" / "model").is_dir()
    (tmp_path / "train.jsonl").write_text("")
    encoder = f"--model.encoder={whole / 'model'}"
    files = ["--data.train_file=train.jsonl", "--data.val_file=val.jsonl"]
    assert main(["fit", "--preset=hotpotqa", encoder, *files]) == 1
    assert "error: " in capsys.readouterr().err  # of what does not fit, and no other


def test_no_config_says_which_run_it_is(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"  # names the folder of the other one
    before = (whole / "checkpoints" / "last.ckpt").read_bytes()
    for order in (["--resume", f"--config={config}"], [f"--config={config}", "--resume"]):
        assert main(["fit", f"--output_dir={tmp_path / 'copy'}", *order]) == 0
        assert f"is in {tmp_path / 'copy' / 'model'}" in capsys.readouterr().out
    assert (whole / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_is_not_overwritten(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fit_options(whole.parent)) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*fit_options(tmp_path), "--resume"]) == 1
    assert "holds no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer.accelerator": "cuda"}, "--trainer.accelerator auto"),
        ({"trainer.devices": 0}, "--trainer.devices auto"),
        ({"seed_everything": -1}, "seed_everything=-1 is not allowed"),
        ({"seed_everything": 2**32}, "from 0 to 4294967295"),
    ],
)
def test_options_that_cannot_be_are_refused_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(fit_options(tmp_path, **options)) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_run_needs_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(fit_options(tmp_path, output_dir=tmp_path / folder)) == 1
    assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model/notes.txt", "precious"),
        ("config.yaml", "precious: true"),
        ("config.yaml", "- precious"),
        ("config.yaml", "{"),
    ],
)
def test_what_is_of_no_run_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    path = tmp_path / "run" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert main(fit_options(tmp_path)) == 1
    assert "is not of a run and is left as it is" in capsys.readouterr().err
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ('--data.train=[{"file": "ruler:vt", "format": "ruler"}]', "needs 'background'; give it"),
        ('--data.train=[{"file": "a", "limit": 0}]', "limit=0 of a is not allowed"),
        ("--model.scratch.heads=3", "dimension=32 is not allowed; give a multiple"),
    ],
)
def test_settings_that_are_refused_say_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    left_out = (option.partition("=")[0], f"{option.partition('=')[0]}_file")
    arguments = [a for a in fit_options(tmp_path) if a.partition("=")[0] not in left_out]
    assert main([*arguments, option]) == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_is_resumed_keeps_its_threshold(tmp_path: Path) -> None:
    assert main(fit_options(tmp_path)) == 0
    model = tmp_path / "run" / "model"
    assert main(["calibrate", str(tmp_path / "run"), str(tmp_path / "val.jsonl")]) == 0
    before = {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}
    assert QRAGModel.from_pretrained(model).config.q_threshold is not None
    assert main(["fit", f"--output_dir={tmp_path / 'run'}", "--resume"]) == 0
    assert {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()} == before


def test_a_trained_model_is_not_overwritten(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main(fit_options(tmp_path)) == 1
    assert "holds a trained model whose checkpoint is gone" in capsys.readouterr().err
    assert (tmp_path / "run" / "model" / "README.md").is_file()


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(
    whole: Path, tmp_path: Path
) -> None:
    model = QRAGModel.from_pretrained(whole / "model", device="cpu")
    model.config = model.config.replace(training={"updates": 0})
    model.save_pretrained(tmp_path / "run" / "model")
    shutil.copy(whole / "config.yaml", tmp_path / "run")
    assert main(fit_options(tmp_path, updates=3)) == 0
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 3
    )


def line(**changes: object) -> dict[str, object]:
    return {"id": "1", "question": "Where?", "chunks": ["a", "b"], "support": [1], **changes}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(support=[2])], "line 1: 'support' holds 2"),
        ([line(support=[])], "line 1: 'support' is"),
        ([{k: v for k, v in line().items() if k != "support"}], "line 1: 'support' is missing"),
        ([line(), line()], "line 2: .*id"),
        ([line(), line(id="2", chunks=["a", " "])], "line 2: chunk 1 is blank"),
        ([line(chunks=["a", "b", "c"], support=[0, 1, 2])], "max_steps=2 .* has 3 support chunks"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_bad_data_is_refused_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[dict[str, object]],
    message: str,
    part: str,
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert main(fit_options(tmp_path, **{f"data.{part}_file": file})) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert str(file) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("episode", "budget"), [(1, 2), (2, 1)])
def test_neither_episodes_nor_the_budget_are_too_short_for_the_support(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], episode: int, budget: int
) -> None:
    steps = {"model.pqn.max_steps": episode, "model.max_steps": budget}
    arguments = fit_options(tmp_path, **steps)
    for part in ("train", "val"):
        write_questions(tmp_path / f"{part}.jsonl", 4, support=2)
    assert main(arguments) == 1
    assert re.search("max_steps=1 .* has 2 support chunks", capsys.readouterr().err)


def test_validation_data_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [a for a in fit_options(tmp_path) if not a.startswith("--data.val_file")]
    assert main(arguments) == 1
    assert "There is no val data; give --data.val_file" in capsys.readouterr().err


def printed_config(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


@pytest.mark.parametrize(
    ("preset", "alpha", "lambda_", "lr", "max_steps"),
    [
        ("babilong", 0.01, 0.65, 5e-5, 6),
        ("hotpotqa", 0.05, 0.5, 1.5e-5, 2),
        ("musique", 0.005, 0.6, 1e-5, 4),
        ("hotpotqa_musique", 0.005, 0.6, 5e-6, 6),
    ],
)
def test_presets(
    preset: str,
    alpha: float,
    lambda_: float,
    lr: float,
    max_steps: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = printed_config(["fit", "--preset", preset], capsys)
    pqn = config["model"]["pqn"]
    assert (pqn["alpha"], pqn["lambda_"], pqn["gamma"]) == (alpha, lambda_, 0.99)
    assert config["model"]["optimizer"]["lr"] == lr
    assert config["model"]["max_steps"] == max_steps
    assert pqn["reward"]["fact_share"] == 0.0  # the paper's reward is sparse


def test_everything_overrides_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {max_steps: 3, pqn: {tau: 0.5}}")
    arguments = ["fit", "--model.pqn.alpha=0.2", f"--config={file}", "--preset=babilong"]
    model = printed_config(arguments, capsys)["model"]
    assert (model["pqn"]["alpha"], model["pqn"]["tau"], model["max_steps"]) == (0.2, 0.5, 3)
    assert model["pqn"]["lambda_"] == 0.65


def test_a_preset_in_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: babilong")
    assert main(["fit", f"--config={file}"]) == 1
    assert "--preset" in capsys.readouterr().err


@pytest.mark.parametrize("file", TRAININGS, ids=lambda file: file.stem)
def test_the_configs_of_the_examples_are_understood(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={file}", "--print_config"])
    assert stop.value.code == 0
    printed, given = (yaml.safe_load(text) for text in (capsys.readouterr().out, file.read_text()))
    assert printed["model"]["pqn"].items() >= {**given["model"]["pqn"], "reward": ANY}.items()
    assert printed["data"]["val_samples"] == given["data"]["val_samples"]


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "evaluate", "calibrate", "import"):
        assert f"\n    {command} " in text


def test_help_of_fit_shows_what_people_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    for option in ("data.train_file", "model.encoder", "model.pqn.alpha", "trainer.max_steps"):
        assert f"--{option} " in text
    assert "--trainer.profiler" not in text
    assert "--ckpt_path" not in text


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_run_is_judged_by_its_best_model(
    whole: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    part = "val" if command == "validate" else "test"
    same = f"--data.{part}_file={whole.parent / 'val.jsonl'}"
    assert main([command, f"--output_dir={whole}", same]) == 0
    figures = QRAGModel.from_pretrained(whole / "model").config.training["figures"]
    shown = f"{figures['val/fact_em']:.4f}"[:5]
    assert re.search(rf"{part}/fact_em.*{shown}", capsys.readouterr().out)


def test_a_run_is_judged_with_what_is_given_anew(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(*options: str) -> str:
        assert main(["validate", f"--output_dir={whole}", *options]) == 0
        return capsys.readouterr().out

    usual = figures()
    assert figures("--model.max_steps=2") == usual
    # one step finds half of the support, two the whole
    assert figures("--model.max_steps=1") != usual
    other = tiny_model(tmp_path / "encoder", max_steps=1).save_pretrained(tmp_path / "other")
    assert figures(f"--model.encoder={other}") != usual


def test_settings_given_anew_count_though_the_run_started_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tiny_model(tmp_path / "encoder", max_steps=2).save_pretrained(tmp_path / "start")
    options = [a for a in fit_options(tmp_path, updates=8) if ".scratch." not in a]
    assert main([*options, f"--model.encoder={start}"]) == 0

    def figures(*named: str) -> str:
        assert main(["validate", f"--output_dir={tmp_path / 'run'}", *named]) == 0
        return capsys.readouterr().out

    capsys.readouterr()
    trained, anew = figures(), figures(f"--model.encoder={start}")
    assert anew != trained
    (tmp_path / "same").symlink_to(start)
    assert figures(f"--model.encoder={tmp_path / 'same'}") == anew


def test_a_checkpoint_is_judged_without_the_training_questions(tmp_path: Path) -> None:
    start = tiny_model(tmp_path / "encoder").save_pretrained(tmp_path / "start")
    lines = [f'{{"id": "{thing}", "text": "the {thing} fell"}}\n' for thing in "abcdefgh"]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    named = {"data.corpus": tmp_path / "corpus.jsonl", "data.candidates": 6, "model.encoder": start}
    options = [a for a in fit_options(tmp_path, updates=2, **named) if ".scratch." not in a]
    for part, things in (("train", "abcd"), ("val", "efgh")):
        lines = [f'{{"id": "{i}", "question": "{i}?", "support": ["{i}"]}}\n' for i in things]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    assert main(options) == 0
    (tmp_path / "train.jsonl").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["validate", f"--output_dir={tmp_path / 'run'}", f"--ckpt_path={checkpoint}"]) == 0


def test_training_stops_where_it_diverges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "model.optimizer.lr": 1e9,
        "model.optimizer.warmup_updates": 0,
        "model.pqn.random_transitions": 0,
        "trainer.gradient_clip_val": "null",
    }
    assert main(fit_options(tmp_path, updates=20, **options)) == 1
    assert "Training diverged" in capsys.readouterr().err


def test_validation_is_counted_in_updates_where_batches_are_accumulated(tmp_path: Path) -> None:
    options = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 2}
    assert main(fit_options(tmp_path, updates=4, **options)) == 0
    curves = read_curves(tmp_path / "run" / "logs")
    assert [step for step, _ in curves["val/fact_em"]] == [0, 1, 3]


def test_a_card_that_was_edited_stays(whole: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    card = model / "README.md"
    card.write_text(card.read_text() + "\nOurs.\n")
    with pytest.warns(UserWarning, match="was edited and stays as it is"):
        assert main(["calibrate", str(model), str(whole.parent / "val.jsonl"), "--k=4"]) == 0
    assert card.read_text().endswith("\nOurs.\n")
    assert QRAGModel.from_pretrained(model).config.max_steps == 4


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("started", [False, True])
def test_a_folder_without_a_model_is_not_judged(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    started: bool,
) -> None:
    if started:
        shutil.copy(whole / "config.yaml", tmp_path)
    files = [f"--data.{part}_file={whole.parent / 'val.jsonl'}" for part in ("val", "test")]
    assert main([command, f"--output_dir={tmp_path}", *files]) == 1
    assert f"{tmp_path} holds no model of a run" in capsys.readouterr().err
    if not started:  # another folder may still be named for what is judged
        encoder = f"--model.encoder={whole / 'model'}"
        assert main([command, f"--output_dir={tmp_path}", encoder, *files]) == 0


def test_evaluate_takes_a_runs_folder_and_makes_that_of_its_output(
    whole: Path, tmp_path: Path
) -> None:
    data = str(whole.parent / "val.jsonl")
    rows = []
    for name, folder in (("run", whole), ("model", whole / "model")):
        output = tmp_path / name / "figures.json"
        assert main(["evaluate", str(folder), data, f"--output={output}"]) == 0
        rows.append(json.loads(output.read_text())["rows"])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k=0"], "k=0 is not allowed"),
        (["--k=-2"], "k=-2 is not allowed"),
        (["--beams=0"], "beams=0 is not allowed"),
        (["--output={}/file/x.json"], "No file can be made"),
        (["--output={}"], "is a folder"),
    ],
)
def test_evaluate_refuses_what_cannot_be_before_any_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    arguments = [option.format(tmp_path) for option in options]
    assert main(["evaluate", "no-such-model", "no-such-file", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_evaluation_that_fails_leaves_the_last_ones_figures(tmp_path: Path) -> None:
    model = str(tiny_model(tmp_path / "encoder", "none").save_pretrained(tmp_path / "model"))
    before, new = tmp_path / "before.json", tmp_path / "new.json"
    before.write_text("{}")
    for output in (before, new):
        assert main(["evaluate", model, "no-such-file", f"--output={output}"]) == 1
    assert before.read_text() == "{}"
    assert not new.exists()


def test_documents_to_judge_on_are_not_those_the_threshold_was_chosen_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def read(*_: object, seed: int = 0, **__: object) -> dict[str, list[object]]:
        seeds.append(seed)
        raise DatasetError("no more")

    monkeypatch.setattr(cli, "read_questions", read)
    model = str(tiny_model(tmp_path / "encoder", "none").save_pretrained(tmp_path / "model"))
    for command in ("evaluate", "calibrate"):
        arguments = [command, model, "simulated:1"]
        extra = [f"--output={tmp_path}/e.json"] if command == "evaluate" else []
        assert main([*arguments, *extra]) == 1
        assert main([*arguments, *extra, "--seed=7"]) == 1
    assert seeds == [0, 7, 1, 7]
    monkeypatch.undo()
    (tmp_path / "book.txt").write_text("The garden was dark and quiet at night. " * 9)
    first, same, other = (
        next(iter(read_questions("simulated:1", "babilong", None, str(tmp_path), seed=s).values()))
        for s in (0, 0, 1)
    )
    assert list(first[:5]) == list(same[:5])
    assert list(first[:5]) != list(other[:5])


def test_questions_on_a_corpus_need_no_format(tmp_path: Path) -> None:
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    texts = {"a": "the cup is red", "b": "the hat is blue"}
    lines = [json.dumps({"id": key, "text": text}) + "\n" for key, text in texts.items()]
    corpus.write_text("".join(lines))
    questions.write_text(json.dumps({"id": "1", "question": "Where?", "support": ["b"]}) + "\n")
    for given in ({}, {"format": "corpus"}):
        ((name, (sample,)),) = read_questions(str(questions), corpus=str(corpus), **given).items()
        assert (name, sample.chunks, sample.support) == (
            "questions",
            tuple(texts.values()),
            (1,),
        )
    with pytest.raises(DatasetError, match="hotpotqa have no corpus"):
        read_questions(str(questions), "hotpotqa", str(corpus))
    for samples in (0, -1):
        with pytest.raises(InvalidInputError, match=f"samples={samples} is not allowed"):
            read_questions(str(questions), corpus=str(corpus), samples=samples)


def test_evaluate_prints_a_table_and_writes_figures(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = tmp_path / "figures.json", whole.parent / "val.jsonl"
    arguments = ["evaluate", str(whole / "model"), str(data), f"--output={output}"]
    assert main([*arguments, "--q_threshold=0.1", "--baselines=true", "--k=3"]) == 0
    written = json.loads(output.read_text())
    assert written["fingerprint"] == QRAGModel.from_pretrained(whole / "model").fingerprint
    assert written["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert (written["data"], written["k"], written["beams"]) == (str(data), 3, 1)
    rows = written["rows"]
    names = ["3 steps", "at most 3 steps, until Q < 0.100", "the best 3 of one step"]
    assert [row["retrieval"] for row in rows] == names
    assert all(row["questions"] == 12 for row in rows)
    assert rows[0]["steps"] == 3.0
    assert rows[0]["recall@3"] == rows[0]["fact_recall"]
    stops = [rows[1][f"stop_{kind}"] for kind in ("early", "perfect", "late")]
    assert sum(stops) == pytest.approx(1.0)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| data | questions | retrieval | Fact-EM |")
    assert [cells.split(" | ")[2] for cells in table[2:5]] == names


def test_calibrate_writes_the_threshold_into_the_model(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    assert main(["calibrate", str(model), str(whole.parent / "val.jsonl"), "--k=4"]) == 0
    config = QRAGModel.from_pretrained(model).config
    assert config.max_steps == 4
    assert config.training["calibration"]["q_threshold"] == config.q_threshold
    assert f"q_threshold={config.q_threshold:.4f}" in capsys.readouterr().out
    assert config.training["figures"]  # what was known before is kept
    card = (model / "README.md").read_text(encoding="utf-8")
    assert f"Stopped below Q = {config.q_threshold:.4f}, of at most 4 chunks" in card
    assert "2 chunks retrieved for each" in card  # the figures of training are of its own budget
    several = f"[{whole.parent / 'val.jsonl'},{whole.parent / 'train.jsonl'}]"
    assert main(["calibrate", str(model), several]) == 0
    assert "on 52 questions" in capsys.readouterr().out
    assert main(["calibrate", str(model), "[]"]) == 1
    assert "name at least one" in capsys.readouterr().err
    before = (model / "qrag_config.json").read_bytes()
    assert main(["calibrate", str(model), str(whole.parent / "val.jsonl"), "--k=0"]) == 1
    assert "k=0 is not allowed" in capsys.readouterr().err
    assert (model / "qrag_config.json").read_bytes() == before
    assert main(["calibrate", str(tmp_path), str(whole.parent / "val.jsonl"), "--k=3"]) == 0
    assert QRAGModel.from_pretrained(model).config.max_steps == 3
    unreachable = ["--target_em=1.1", "--k=1"]
    assert main(["calibrate", str(model), str(whole.parent / "val.jsonl"), *unreachable]) == 1
    assert "target_em=1.1 is not reached" in capsys.readouterr().err


def test_a_warning_is_told_without_a_place_in_the_code(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    before, told = warnings.formatwarning, []

    def show(message: Warning, category: type[Warning], file: str, line: int, *_: object) -> None:
        told.append(warnings.formatwarning(message, category, file, line))

    monkeypatch.setattr(warnings, "showwarning", show)
    assert main(["calibrate", str(model), str(whole.parent / "val.jsonl")]) == 0
    assert len(told) == 1
    assert re.fullmatch(r"warning: 12 questions choose a threshold badly; [^\n]*\n", told[0])
    assert warnings.formatwarning is before


def test_calibrate_refuses_what_it_cannot_write_into_before_it_searches(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QRAGModel, "from_pretrained", None)  # a model of the package would load
    assert main(["calibrate", "babilong", str(whole.parent / "val.jsonl"), "--k=2"]) == 1
    assert "babilong comes with the package, whose files stay" in capsys.readouterr().err
    assert main(["calibrate", "no/such", str(whole.parent / "val.jsonl"), "--k=2"]) == 1
    assert "no/such is no folder of a Q-RAG model" in capsys.readouterr().err


def test_an_option_of_fit_is_no_part_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--data.corpus", "c.jsonl"], ["--data.corpus=c.jsonl"]):
        assert main(["calibrate", "model", "val.jsonl", *option]) == 1
        assert "--data.corpus is an option of fit; here write --corpus" in capsys.readouterr().err


def test_a_training_that_improved_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # nothing is learned, and nothing is forgotten: of equal models the last one is kept
    assert main([*fit_options(tmp_path / "a"), "--model.optimizer.lr=1e-30"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"after update (\d+) of \1,", said)
    assert "that the training started from" not in said
    judge = BestModel.on_validation_end

    def best_at_first(self: BestModel, trainer: Any, module: Any) -> None:
        judge(self, trainer, module)
        self.score = (9.0, 9.0)

    monkeypatch.setattr(BestModel, "on_validation_end", best_at_first)
    assert main(fit_options(tmp_path / "b")) == 0
    said = capsys.readouterr().out
    assert "after update 0 of " in said
    assert "It is the model that the training started from" in said


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference fixtures are not here")
def test_import(tmp_path: Path) -> None:
    source, encoder = FIXTURES / "relative", FIXTURES / "tiny_bert"
    assert main(["import", str(source), str(tmp_path / "new"), f"--encoder={encoder}"]) == 0
    assert QRAGModel.from_pretrained(tmp_path / "new").config.positions == "relative"


DISTRIBUTED = """
import json, sys
from pathlib import Path
import torch
from qrag_train.training import run

cli = run(json.loads(Path(sys.argv[1]).read_text()))
weights = torch.cat([p.detach().flatten() for p in cli.model.parameters()])
report = {
    "weights": [weights.double().sum().item(), weights.double().square().sum().item()],
    "episodes": [sample.id for sample in cli.model.collector.environment.samples],
    "val": {name: float(value) for name, value in cli.trainer.callback_metrics.items()},
}
rank = cli.trainer.global_rank
Path(sys.argv[1]).with_name(f"rank{rank}.json").write_text(json.dumps(report))
"""


def test_two_processes_have_their_own_episodes_and_equal_weights(tmp_path: Path) -> None:
    options = {"trainer.strategy": "ddp", "trainer.devices": 2}
    arguments = fit_options(tmp_path, updates=4, **options)
    write_questions(tmp_path / "val.jsonl", 13, seed=2)  # one process has one more than the other
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "arguments.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["weights"] == second["weights"]
    assert not set(first["episodes"]) & set(second["episodes"])
    assert first["val"]["val/fact_em"] == second["val"]["val/fact_em"]
    # both halves of the validation questions count
    model, data, output = tmp_path / "run" / "model", tmp_path / "val.jsonl", tmp_path / "e.json"
    assert main(["evaluate", str(model), str(data), f"--output={output}"]) == 0
    figures = QRAGModel.from_pretrained(model).config.training["figures"]
    row = json.loads(output.read_text())["rows"][0]
    assert figures["val/fact_em"] == pytest.approx(row["fact_em"])
    # and one process judges what two have trained
    checkpoint = next((tmp_path / "run").rglob("last.ckpt"))
    again = ["validate", f"--output_dir={tmp_path / 'run'}", f"--ckpt_path={checkpoint}"]
    assert main([*again, "--trainer.devices=1", "--trainer.strategy=auto"]) == 0


def test_one_length_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained the whole day long. Nobody came to see them.")
    for length, sets in ((40, [40]), ([40, 60], [40, 60]), (None, [60]), ([], [60])):
        found = read_questions(
            "simulated:1", "babilong", background=str(tmp_path), sentences=length, samples=2
        )
        assert [len(samples[0].chunks) for samples in found.values()] == sets


def test_options_of_another_format_are_refused(tmp_path: Path) -> None:
    file = str(write_questions(tmp_path / "q.jsonl", 3))
    for option in ("background", "words", "questions"):
        with pytest.raises(DatasetError, match=f"--{option} belongs to the format"):
            read_questions(file, **{option: "there is no such file"})  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="--sentences belongs to the format babilong"):
        read_questions(file, sentences=[50])
    with pytest.raises(DatasetError, match="--moves belongs to the format babilong"):
        read_questions(file, moves=3)
    with pytest.raises(DatasetError, match="places belongs to stories that are made up"):
        read_questions("qa1.txt", "babilong", background=str(tmp_path), places=2)
    with pytest.raises(DatasetError, match="--pool: documents of the format babilong"):
        read_questions("simulated:1", "babilong", background=str(tmp_path), pool=True)


WITHOUT = """
import sys

class Refuse:
    blocked = ("langchain_core", "llama_index", "faiss")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Refuse())
import importlib, pkgutil
import qrag_train

for module in pkgutil.walk_packages(qrag_train.__path__, "qrag_train."):
    importlib.import_module(module.name)
"""


def test_training_needs_no_retrieval_framework() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
