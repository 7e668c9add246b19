from __future__ import annotations

import argparse
import json
from pathlib import Path

import ablations
import babilong
import numpy as np
import pytest
from machine import model_digest
from running import SENTENCES, run, save_model, write_books

from qrag_retriever import QRAGModel, SearchOptions
from qrag_train.calibration import choose_threshold, search_thresholds
from qrag_train.data import BabiSimulator, BackgroundText, FixedSamples, hide_story
from qrag_train.evaluation import evaluate

STORIES = list(FixedSamples(BabiSimulator(1), 8, seed=0))
TEXTS = tuple(text for story in STORIES for text in (*story.chunks, story.question))


def obvious(half: list, background: BackgroundText, length: int, count: int) -> list:
    """What is drawn first, if it fits, hidden one after the other."""
    rng = np.random.default_rng((0, length))
    drawn = [half[i] for i in rng.permutation(len(half))]
    taken = [story for story in drawn if len(story.chunks) <= length][:count]
    return [hide_story(story, background, length, rng) for story in taken]


@pytest.fixture
def calibrated_up_to_200(monkeypatch):
    """Long documents are those that take no time in a test."""
    monkeypatch.setattr(babilong, "_CALIBRATED", 200)


def test_figures_of_a_run(tmp_path, calibrated_up_to_200):
    model = save_model(tmp_path, "relative", TEXTS, None)
    books, file = write_books(tmp_path), tmp_path / "out" / "b.json"
    arguments = [
        *(model.parent, "--questions", "simulated:1", "--background", books, "--count", 4),
        *("--lengths", 12, 60, 260, "--baselines-to", 300, "--json", file),
    ]
    run(babilong, *arguments)
    written = json.loads(file.read_text())
    (row,) = written["runs"]
    assert (row["run"], row["budget"], written["questions"]) == ("mine", 2, "simulated:1")

    loaded = QRAGModel.from_pretrained(model, device="cpu")
    background = BackgroundText.from_folder(books)
    halves = STORIES[::2], STORIES[1::2]
    chosen_on = [s for n in (12, 60) for s in obvious(halves[0], background, n, 4)]
    chosen = choose_threshold(search_thresholds(loaded, chosen_on))
    assert row["q_threshold"] == pytest.approx(chosen.q_threshold, abs=1e-4)
    for figure, length in zip(row["figures"], (12, 60, 260), strict=True):
        samples = obvious(halves[1], background, length, 4)
        assert (figure["sentences"], figure["questions"]) == (length, len(samples))
        assert figure["left_out"] == sum(len(s.chunks) > length for s in halves[1])
        whole = evaluate(loaded, samples, SearchOptions(2))
        stopped = evaluate(loaded, samples, SearchOptions(2, q_threshold=chosen.q_threshold))
        assert figure["fact_em"] == pytest.approx(whole["fact_em"], abs=1e-4)
        for name in ("fact_em", "fact_f1", "steps"):
            assert figure["with_threshold"][name] == pytest.approx(stopped[name], abs=1e-4)
    ways = [(r["data"], r["retrieval"]) for r in written["rows"]]
    assert [way for data, way in ways if data == "simulated:1, 12 sentences"][-3:] == [
        "untrained: 2 steps",
        "untrained: the best 2 of one step",
        "BM25",
    ]
    assert not any("untrained" in way for data, way in ways if data == "simulated:1, 60 sentences")
    for picture in ("length", "stopping", "q_values"):
        assert (file.parent / f"b_{picture}.png").read_bytes().startswith(b"\x89PNG")

    journal = file.with_suffix(".journal.jsonl")
    before = journal.read_bytes()
    run(babilong, *arguments)
    assert journal.read_bytes() == before
    assert json.loads(file.read_text())["runs"] == written["runs"]


def test_what_was_drawn_stays_when_the_reader_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    model, file = save_model(tmp_path, "relative", TEXTS), tmp_path / "b.json"
    with pytest.raises(SystemExit, match="answered 0 of 2"):
        run(
            *(babilong, model, "--questions", "simulated:1", "--count", 2, "--lengths", 12, 60),
            *("--background", write_books(tmp_path), "--json", file),
            *("--reader", "tiny", "--reader-url", "http://127.0.0.1:9/v1"),
        )
    assert (tmp_path / "b_length.png").read_bytes().startswith(b"\x89PNG")


def test_what_in_the_books_reads_like_a_fact_can_be_left_out(tmp_path, monkeypatch):
    facts = ["Fred put down the candle there.", "Mary went back to the stable."]
    others = ["Mary went back to bed again.", "And Mary went to the stable.", "It was dark by now."]
    assert babilong.facts_in([*facts, *others, *facts]) == facts
    made = BabiSimulator(2).sample(np.random.default_rng(0)).chunks
    assert babilong.facts_in(made) == sorted(set(made))
    books = write_books(tmp_path)
    text = " ".join([*facts, *others])
    (books / "book.txt").write_text((books / "book.txt").read_text() + " " + text)
    seen: list[str] = []
    hidden = babilong.hide_story
    monkeypatch.setattr(
        babilong,
        "hide_story",
        lambda story, background, *rest: (
            seen.extend(background.sentences),
            hidden(story, background, *rest),
        )[1],
    )
    model, file = save_model(tmp_path, "relative", TEXTS), tmp_path / "b.json"
    arguments = [
        *(babilong, model, "--questions", "simulated:1", "--count", 1, "--lengths", 12),
        *("--background", books, "--json", file),
    ]
    for options, expected in (((), set()), (("--without-facts",), set(facts))):
        file.with_suffix(".journal.jsonl").unlink(missing_ok=True)
        seen.clear()
        run(*arguments, *options)
        assert json.loads(file.read_text())["facts_left_out"] == sorted(expected)
        assert set(seen) & {*facts, *others} == {*facts, *others} - expected


def test_documents_are_the_same_whenever_read():
    background = BackgroundText(SENTENCES)
    options = argparse.Namespace(seed=0, count=3)
    documents = babilong.Documents(STORIES, background, 12, options)
    first = list(documents)
    assert first == list(documents) == obvious(STORIES, background, 12, 3)
    assert len(documents) == len(first)


def test_more_documents_than_stories_have_each_in_several():
    background = BackgroundText(SENTENCES)
    fitting = sum(len(story.chunks) <= 12 for story in STORIES)
    options = argparse.Namespace(seed=0, count=2 * fitting)
    documents = list(babilong.Documents(STORIES, background, 12, options))
    assert documents[:fitting] == obvious(STORIES, background, 12, fitting)
    again = [(story.question, story.answer) for story in documents]
    assert again[:fitting] == again[fitting:]
    assert documents[:fitting] != documents[fitting:]


def test_a_threshold_needs_short_documents(tmp_path, calibrated_up_to_200):
    model = save_model(tmp_path, "relative", TEXTS, None)
    with pytest.raises(SystemExit, match="at most 200"):
        run(
            *(babilong, model, "--questions", "simulated:1", "--count", 2, "--lengths", 300),
            *("--background", write_books(tmp_path), "--json", tmp_path / "b.json"),
        )


def test_several_tasks_budgets_and_a_threshold_of_ones_own(tmp_path):
    model = save_model(tmp_path, "relative", TEXTS)
    arguments = [
        *(model, "--questions", "simulated:1", "simulated:4", "--background"),
        *(write_books(tmp_path), "--count", 2, "--lengths", 210, "--json", tmp_path / "b.json"),
    ]
    run(babilong, *arguments, "--k", 1, 3)
    written = json.loads((tmp_path / "b.json").read_text())
    first, second = written["runs"]
    assert (first["task"], first["budget"], first["q_threshold"]) == ("simulated:1", 1, 0.5)
    assert (second["task"], second["budget"]) == ("simulated:4", 3)
    ways = {(row["task"], row["retrieval"]) for row in written["rows"]}
    assert ("simulated:4", "untrained: 3 steps") in ways
    assert ("simulated:1", "mine: 1 steps, until Q < 0.500") in ways
    with pytest.raises(SystemExit, match="once for each of 2"):
        run(babilong, *arguments, "--k", 1)


def test_published_results_are_read_as_they_were():
    folder = Path(babilong.__file__).parent / "results"
    for file in sorted(folder.glob("babilong_qa?.json")):
        for row in json.loads(file.read_text())["runs"]:
            babilong.show(row)
            assert all(figure["with_threshold"]["fact_f1"] for figure in row["figures"])


def test_ablations_use_the_same_judge(tmp_path, monkeypatch):
    model = save_model(tmp_path, "relative", TEXTS)
    monkeypatch.setattr(ablations, "train", lambda *_: None)
    folder = tmp_path / "ablations" / "full"
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(model)
    file, config = tmp_path / "a.json", tmp_path / "c.yaml"
    config.write_text("model: {}")
    run(
        *(ablations, "--config", config, "--folder", folder.parent, "--variants"),
        *("full", "--questions", "simulated:1", "--background", write_books(tmp_path)),
        *("--lengths", 12, "--count", 3, "--json", file),
    )
    results = json.loads(file.read_text())
    (row,) = results["variants"]
    assert (row["variant"], row["figures"][0]["questions"]) == ("full", 3)
    assert results["models"] == {"full": model_digest(QRAGModel.from_pretrained(model))}
    books = [str(path) for path in sorted(tmp_path.rglob("*.txt"))]
    assert sorted(results["files"]) == sorted([str(config), *books])


def test_a_variant_that_the_config_has_is_no_variant(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: {pqn: {tau: 1.0, alpha: 0.03}}")
    same = [variant for variant in ablations.VARIANTS if ablations.is_full(variant, config)]
    assert same == ["no target networks"]
    config.write_text("data:")
    assert not any(ablations.is_full(variant, config) for variant in ablations.VARIANTS)


def test_ablations_train_one_variant_after_the_other(tmp_path):
    books = write_books(tmp_path)
    stories = {
        "file": "simulated:1",
        "format": "babilong",
        "background": str(books),
        "sentences": [12, 16],
    }
    config = {
        "model": {
            "scratch": {"layers": 1, "dimension": 16, "heads": 2, "vocabulary": 200},
            "positions": "relative",
            "max_steps": 2,
            "pqn": {"environments": 2, "random_transitions": 0},
            "optimizer": {"warmup_updates": 1},
        },
        "data": {"train": [stories], "val": [stories], "val_samples": 2},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config), encoding="utf-8")
    file = tmp_path / "a.json"
    arguments = [
        *("--config", tmp_path / "c.yaml", "--folder", tmp_path / "runs", "--background", books),
        *("--questions", "simulated:1", "--lengths", 12, "--count", 3, "--json", file),
    ]
    variants = ["full", "supervised", "untrained"]
    run(ablations, *arguments, "--updates", 2, "--variants", *variants)
    rows = json.loads(file.read_text())["variants"]
    assert [(row["variant"], row["updates"]) for row in rows] == [
        *(("full", 2), ("supervised", 2), ("untrained", 1))
    ]
    for folder in variants:
        assert (tmp_path / "runs" / folder / "model" / "qrag_config.json").exists()

    models = [(tmp_path / "runs" / name / "checkpoints" / "last.ckpt") for name in variants]
    before = [model.read_bytes() for model in models]
    run(ablations, *arguments, "--updates", 2, "--variants", *variants)
    assert [model.read_bytes() for model in models] == before
    assert json.loads(file.read_text())["variants"] == rows
    with pytest.raises(SystemExit, match="full holds another training"):
        run(ablations, *arguments, "--updates", 3, "--variants", "full")
