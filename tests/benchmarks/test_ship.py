from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ship
import torch
from running import run, save_model, write_hotpotqa

from qrag_retriever import QRAGModel, SearchOptions
from qrag_train.calibration import choose_threshold, judge_thresholds
from qrag_train.data import read_hotpotqa
from qrag_train.evaluation import evaluate, search_samples

TEXTS = ["the red cup fell.", "the blue hat fell."]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ship, "MODELS", tmp_path / "package")
    monkeypatch.setattr(ship, "LOGS", tmp_path / "results")
    return tmp_path / "package"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs whose weights differ."""
    first = save_model(tmp_path, q_threshold=None).parent
    data = {"val": [{"file": str(write_hotpotqa(tmp_path)), "format": "hotpotqa"}]}
    (first / "config.yaml").write_text(f"output_dir: {first}\ndata: {json.dumps(data)}\n")
    (first / "curves.png").write_bytes(b"picture")
    (first / "logs" / "version_0").mkdir(parents=True)
    (first / "logs" / "version_0" / "metrics.csv").write_text("step\n1\n")
    second = first.with_name("second")
    shutil.copytree(first, second)
    changed = QRAGModel.from_pretrained(first / "model", device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weights in changed.named_parameters():
            if "word_embeddings" not in name:
                weights.add_(0.05 * torch.randn_like(weights))
    changed.save_pretrained(second / "model")
    return [first, second]


def test_the_mean_of_two_runs(runs: list[Path], package: Path, tmp_path: Path) -> None:
    run(ship, *runs, "--name", "ours", "--set", "max_chunk_tokens=64")
    shipped = QRAGModel.from_pretrained(package / "ours", device="cpu")
    assert shipped.config.max_chunk_tokens == 64
    assert "mean of those of mine, second;" in (package / "ours" / "README.md").read_text()
    found = evaluate(shipped, read_hotpotqa(tmp_path / "hotpot.json"), SearchOptions(2))
    figures = shipped.config.training["figures"]
    assert figures == pytest.approx({name: found[name] for name in figures})
    parts = [QRAGModel.from_pretrained(folder / "model", device="cpu") for folder in runs]
    mean = parts[0]
    with torch.no_grad():
        for one, other in zip(mean.parameters(), parts[1].parameters(), strict=True):
            one.add_(other).mul_(0.5)
    expected = mean.encode_actions(TEXTS)
    error = np.abs(shipped.encode_actions(TEXTS) - expected).max()
    assert error < 0.02 * np.abs(expected).max()  # the weights are in 8 bits
    assert error < 0.2 * np.abs(parts[1].encode_actions(TEXTS) - expected).max()
    for name in ("mine", "second"):
        kept = tmp_path / "results" / "ours" / name
        assert {file.name for file in kept.iterdir()} == {
            "config.yaml",
            "curves.png",
            "metrics_0.csv",
        }
        assert str(tmp_path) not in (kept / "config.yaml").read_text().splitlines()[0]


def test_balancing_changes_no_q(runs: list[Path], package: Path) -> None:
    run(ship, runs[1], "--name", "plain")
    run(ship, runs[1], "--name", "even", "--balance")
    plain, even = (QRAGModel.from_pretrained(package / n, device="cpu") for n in ("plain", "even"))
    states = [(text, []) for text in TEXTS]
    q = [m.encode_states(states) @ m.encode_actions(TEXTS).T for m in (plain, even)]
    assert q[1] == pytest.approx(q[0], rel=0.01)
    assert np.abs(even.encode_actions(TEXTS) - plain.encode_actions(TEXTS)).max() > 0.01
    assert even.config.q_threshold == pytest.approx(plain.config.q_threshold, rel=0.01)


def test_a_budget_and_questions_of_ones_own(
    runs: list[Path], package: Path, tmp_path: Path
) -> None:
    questions = tmp_path / "questions.yaml"
    source = {"file": str(tmp_path / "hotpot.json"), "format": "hotpotqa", "limit": 2}
    questions.write_text(json.dumps([source]))
    run(ship, runs[0], "--name", "ours", "--set", "max_steps=3", "--questions", questions)
    shipped = QRAGModel.from_pretrained(package / "ours", device="cpu")
    assert shipped.config.max_steps == 3
    samples = read_hotpotqa(tmp_path / "hotpot.json")[:2]
    beams = search_samples(shipped, samples, SearchOptions(3))
    chosen = choose_threshold(judge_thresholds(beams, [sample.support for sample in samples]))
    assert shipped.config.q_threshold == pytest.approx(chosen.q_threshold)
    found = evaluate(shipped, samples, SearchOptions(3))
    figures = shipped.config.training["figures"]
    assert figures == pytest.approx({name: found[name] for name in figures})
    assert "mean_of" not in shipped.config.training
    assert "3 chunks retrieved for each" in (package / "ours" / "README.md").read_text()


def test_the_mean_of_a_runs_best_and_last_weights(
    runs: list[Path], package: Path, tmp_path: Path
) -> None:
    first, second = runs
    config = first / "config.yaml"
    config.write_text(config.read_text() + "trainer: {max_steps: 7}\n")
    last = QRAGModel.from_pretrained(second / "model", device="cpu").state_dict()
    (first / "checkpoints").mkdir()
    state = {f"averaged.{name}": value for name, value in last.items()}
    state |= {f"model.{name}": torch.zeros_like(value) for name, value in last.items()}
    torch.save({"state_dict": state}, first / "checkpoints" / "last.ckpt")
    run(ship, *runs, "--name", "of_runs")
    run(ship, first, "--name", "of_one", "--last")
    expected, found = (
        QRAGModel.from_pretrained(package / name, device="cpu") for name in ("of_runs", "of_one")
    )
    assert np.array_equal(found.encode_actions(TEXTS), expected.encode_actions(TEXTS))
    assert found.config.training["mean_of"] == ["mine", "the end of mine"]
    assert found.config.training["updates"] == 7


def test_a_model_beside_a_run_is_half_of_the_mean(runs: list[Path], package: Path) -> None:
    first, second = runs
    run(ship, *runs, "--name", "of_runs")
    run(ship, first, "--name", "of_one", "--beside", second / "model")
    expected, found = (
        QRAGModel.from_pretrained(package / name, device="cpu") for name in ("of_runs", "of_one")
    )
    assert np.array_equal(found.encode_actions(TEXTS), expected.encode_actions(TEXTS))
    assert found.config.training["mean_of"] == ["mine", "model, 0.5 of the mean"]


def test_a_model_beside_a_run_may_have_another_share(runs: list[Path], package: Path) -> None:
    first, second = runs
    run(ship, second, "--name", "alone")
    run(ship, first, "--name", "all_of_it", "--beside", second, "--share", 1)
    expected, found = (
        QRAGModel.from_pretrained(package / name, device="cpu") for name in ("alone", "all_of_it")
    )
    assert np.array_equal(found.encode_actions(TEXTS), expected.encode_actions(TEXTS))


def test_the_threshold_is_chosen_by_the_model_that_ships(runs: list[Path], package: Path) -> None:
    run(ship, runs[1], "--name", "ours")
    shipped = QRAGModel.from_pretrained(package / "ours", device="cpu")
    samples = read_hotpotqa(runs[1].parents[1] / "hotpot.json")
    found = search_samples(shipped, samples, SearchOptions(2, runners_up=0))
    chosen = choose_threshold(judge_thresholds(found, [sample.support for sample in samples]))
    assert shipped.config.q_threshold == pytest.approx(chosen.q_threshold, abs=1e-6)
