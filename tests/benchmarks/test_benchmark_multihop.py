from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from itertools import pairwise

import bench
import machine
import multihop
import numpy as np
import pytest
from running import run, save_model, write_hotpotqa
from sentence_transformers import SentenceTransformer

from llm_server import llm_server
from qrag_retriever import QRAGModel, SearchOptions
from qrag_retriever.errors import ConfigError
from qrag_train.data import SupportSample, pooled, read_hotpotqa
from qrag_train.evaluation import search_samples
from qrag_train.metrics import fact_scores
from qrag_train.reading import Task, prompt

METHODS = [
    "mine: 2 steps",
    "mine: 2 steps, until Q < 0.500",
    "mine: 2 steps, 3 beams",
    "mine: the best 2 of one step",
    "untrained: 2 steps",
    "untrained: the best 2 of one step",
    "BM25",
]


# paragraphs, letter by letter, are longer than the small encoder's window
@pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")
def test_an_embedder_as_it_was_published(tmp_path):
    hotpotqa, json_file = write_hotpotqa(tmp_path), tmp_path / "m.json"
    save_model(tmp_path)
    embedder = tmp_path / "encoder"
    run(multihop, "--hotpotqa", hotpotqa, "--dense", embedder, "--json", json_file)
    rows = json.loads(json_file.read_text())["rows"]
    found = next(row for row in rows if row["retrieval"] == "encoder: the best 2 of one step")
    plain, recalls = SentenceTransformer(str(embedder), device="cpu"), []
    for sample in read_hotpotqa(hotpotqa):
        products = plain.encode_document(list(sample.chunks)) @ plain.encode_query(sample.question)
        best = set(np.argsort(-products)[:2].tolist())
        recalls.append(len(best & set(sample.support)) / len(sample.support))
    assert found["recall@2"] == pytest.approx(np.mean(recalls), abs=1e-4)


def test_what_stands_in_for_a_start_that_is_gone_has_its_own_name(tmp_path):
    model = QRAGModel.from_pretrained(save_model(tmp_path), device="cpu")
    assert bench.start_of(model, None, ()).name == "untrained"
    shutil.rmtree(tmp_path / "encoder")
    with pytest.warns(UserWarning, match="left out"):
        assert bench.start_of(model, None, ()).name == "untrained all-MiniLM-L6-v2"


def test_rows_files_and_resuming(tmp_path, monkeypatch):
    model, hotpotqa = save_model(tmp_path), write_hotpotqa(tmp_path)
    json_file = tmp_path / "out" / "m.json"
    arguments = [model, "--hotpotqa", hotpotqa, "--beams", 3, "--json", json_file]
    run(multihop, *arguments)
    written = json.loads(json_file.read_text())
    rows = written["rows"]
    samples = read_hotpotqa(hotpotqa)
    corpus = pooled(samples)
    size = len({chunk for sample in samples for chunk in sample.chunks})
    sets = ["HotpotQA, 6 candidates", f"HotpotQA, pool of {size}"]
    greedy = [method for method in METHODS if "beams" not in method]
    assert [row["data"] for row in rows] == [sets[0]] * len(METHODS) + [sets[1]] * len(greedy)
    assert [row["retrieval"] for row in rows[:7]] == METHODS
    assert [row["retrieval"].replace(" 5 ", " 2 ") for row in rows[8:]] == greedy[1:]
    assert all(row["questions"] == 3 for row in rows)
    # the model was not trained: it is its own start
    assert {**rows[4], "retrieval": ""} == {**rows[0], "retrieval": ""}

    loaded = QRAGModel.from_pretrained(model, device="cpu")
    beams = search_samples(loaded, corpus, SearchOptions(5))
    wanted = [set(sample.support) for sample in corpus]
    for k in (2, 5):
        shares = [
            len(w & set(b.retrieved[:k])) / len(w) for b, w in zip(beams, wanted, strict=True)
        ]
        assert rows[7][f"recall@{k}"] == pytest.approx(np.mean(shares), abs=1e-4)
    own = [
        fact_scores(b.retrieved, s.support)
        for b, s in zip(search_samples(loaded, samples, SearchOptions(2)), samples, strict=True)
    ]
    assert rows[0]["fact_f1"] == pytest.approx(np.mean([score.f1 for score in own]), abs=1e-4)

    assert set(written["models"]) == {"mine", "untrained"}
    assert written["machine"]["torch"]
    assert {len(digest) for digest in written["files"].values()} == {64}
    tables = json_file.with_suffix(".md").read_text().split("\n\n")
    assert len(tables[0].splitlines()) == len(rows) + 2
    assert tables[1] == "HotpotQA, 6 candidates; mine: 2 steps"
    assert tables[2].startswith("| threshold | Fact-EM | Fact-F1 | steps | early | perfect | late")
    for picture in ("m_stopping.png", "m_q_values.png"):
        assert (json_file.parent / picture).read_bytes().startswith(b"\x89PNG")
    table = written["stopping"]["HotpotQA, 6 candidates; mine: 2 steps"]
    assert table[0]["steps"] == 2.0  # no Q is below the lowest
    assert all(a["steps"] >= b["steps"] for a, b in pairwise(table))
    steps = written["q_over_steps"]["HotpotQA, 6 candidates; mine: 2 steps"]
    assert [step["share_complete"] for step in steps] == [0.0, 0.0]  # two facts take two steps

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "search_samples", refuse)
    monkeypatch.setattr(bench, "best_actions", refuse)
    run(multihop, *arguments)
    assert json.loads(json_file.read_text())["rows"] == rows
    # other settings are other results
    with pytest.raises(AssertionError, match="measured again"):
        run(multihop, *arguments, "--beams", 2)


def test_bm25_ranks_by_its_formula():
    corpus = ("red cup fell", "blue cup cup stood here", "green hat", "old key under lamp")
    question = "where stood blue cup"
    documents = [text.split() for text in corpus]
    mean = sum(map(len, documents)) / len(documents)

    def score(document: list[str]) -> float:
        total = 0.0
        for word in question.split():
            having = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            count = document.count(word)
            # Lucene: without the constant factor k1 + 1
            total += idf * count / (count + 1.5 * (0.25 + 0.75 * len(document) / mean))
        return total

    expected = [score(document) for document in documents]
    sample = SupportSample("1", question, corpus, (1,))
    (beam,) = bench.bm25(2).search([sample])
    assert beam.retrieved == (1, 0)
    assert [pick.q_value for pick in beam.picks] == pytest.approx([expected[1], expected[0]])


def test_a_model_is_told_apart_by_what_decides_its_ranking(tmp_path):
    model = save_model(tmp_path)
    loaded = QRAGModel.from_pretrained(model, device="cpu")
    digest = bench.model_digest(loaded)
    loaded.config = loaded.config.replace(q_threshold=0.9, training={})
    assert bench.model_digest(loaded) == digest
    loaded.config = loaded.config.replace(state_order="document")
    assert bench.model_digest(loaded) != digest


def test_a_model_is_named_after_its_run(tmp_path):
    model = save_model(tmp_path)
    other = model.parent / "other"
    shutil.copytree(model, other)
    names = [bench.load(path, []).name for path in (model, model.parent, other)]
    assert names == ["mine", "mine", "other"]
    assert [judged.name for judged in bench.load_all([model, other], [])] == ["mine", "other"]
    with pytest.raises(SystemExit, match="Two models are called 'mine'"):
        bench.load_all([model, model.parent], [])


def test_without_questions_the_figures_stay(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("precious")
    with pytest.raises(SystemExit, match="There are no questions; give --hotpotqa"):
        run(multihop, save_model(tmp_path), "--json", file)
    assert file.read_text() == "precious"


def test_what_the_package_refuses_is_told_in_a_line():
    def main():
        raise ConfigError("so it is")

    with pytest.raises(SystemExit, match="error: so it is"):
        machine.told(main)


def other_questions(hotpotqa, name):
    """The same questions in other words, so that their prompts differ."""
    text = hotpotqa.read_text()
    file = hotpotqa.with_name(name)
    file.write_text(text.replace("where is", "where was").replace("fell", "lay"))
    return file


@pytest.fixture
def two_sets(tmp_path, monkeypatch):
    """A model and two data sets of HotpotQA's shape, of which MuSiQue's option reads one."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setitem(multihop.READERS, "MuSiQue", (read_hotpotqa, 2))
    model, hotpotqa = save_model(tmp_path, q_threshold=None), write_hotpotqa(tmp_path)
    return model, hotpotqa, other_questions(hotpotqa, "other.json")


def test_a_question_that_the_reader_refuses_keeps_no_other_row_back(two_sets, tmp_path):
    model, hotpotqa, other = two_sets
    file = tmp_path / "m.json"
    arguments = [
        *(model, "--hotpotqa", hotpotqa, "--musique", other, "--beams", 1, "--json", file),
        *("--reader", "tiny"),
    ]
    with llm_server() as server:
        server.refused = ("where is the green hat?",)
        with pytest.raises(SystemExit) as stop:
            run(multihop, *arguments, "--reader-url", server.url)
    rows = json.loads(file.read_text())["rows"]
    first, second = [row for row in rows if row["retrieval"] == "mine: 2 steps"]
    assert second.keys() - first.keys() == {"answer_em", "answer_f1"}
    assert first["answers_missing"] == 1
    assert "answers_missing" not in second
    assert str(stop.value).startswith("error: The reader tiny at")
    assert str(stop.value).splitlines()[-2:] == [
        "Not scored, because answers are missing:",
        "  HotpotQA, 6 candidates; mine: 2 steps: 1 of 3",
    ]


def test_a_reader_that_is_gone_is_not_asked_for_every_row(two_sets, tmp_path):
    model, hotpotqa, other = two_sets
    file = tmp_path / "m.json"
    arguments = [model, "--beams", 1, "--json", file, "--reader", "tiny", "--musique"]
    with llm_server() as server:
        arguments += [hotpotqa, "--reader-url", server.url]
        run(multihop, *arguments)
        server.refused, server.asked = ("",), []
        with pytest.raises(SystemExit, match="answered 0 of 3"):
            run(multihop, *arguments, "--hotpotqa", other)
        assert len(server.asked) == 4  # three of them, and whether it is there at all
        with pytest.raises(SystemExit, match=r"(?s)answered 0 of 3.*HotpotQA, 6 .*: 3 of 3$"):
            run(multihop, *arguments, "--hotpotqa", other)
    rows = json.loads(file.read_text())["rows"]
    # what was answered before is scored
    assert [row["data"] for row in rows if "answer_em" in row] == ["MuSiQue, 6 candidates"]


def test_questions_without_answers_are_not_read(tmp_path):
    model, hotpotqa = save_model(tmp_path, q_threshold=None), write_hotpotqa(tmp_path)
    options = argparse.Namespace(threads=1, json=tmp_path / "m.json", journal=None, seed=0)
    options.reader, options.reader_url = "tiny", "http://127.0.0.1:9/v1"
    results = bench.Results(options, "multihop")
    samples = [dataclasses.replace(sample, answer=None) for sample in read_hotpotqa(hotpotqa)]
    method = bench.load(model, []).steps(2, read=True)
    results.measure(method, samples, len(samples), data="no answers")
    results.write([], [])
    assert len(json.loads(options.json.read_text())["rows"]) == 1


def test_a_reader_answers_from_what_was_found(tmp_path, monkeypatch):
    model, hotpotqa = save_model(tmp_path), write_hotpotqa(tmp_path)
    file = tmp_path / "m.json"
    arguments = [model, "--hotpotqa", hotpotqa, "--beams", 1, "--json", file, "--reader", "tiny"]
    monkeypatch.setattr("time.sleep", lambda _: None)
    with llm_server() as server:
        gone = server.url
    with pytest.raises(SystemExit, match=r"error: The reader tiny at .* answered 0 of 3"):
        run(multihop, *arguments, "--reader-url", gone)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 12  # nothing of the retrieval is lost
    assert not any("answer_em" in row for row in rows)
    missing = [row.pop("answers_missing") for row in rows if "answers_missing" in row]
    assert missing == [3]

    monkeypatch.setattr(bench, "search_samples", None)  # and nothing is retrieved again
    with llm_server() as server:
        run(multihop, *arguments, "--reader-url", server.url)
        asked = list(server.asked)
    written = json.loads(file.read_text())["rows"]
    answered = [row for row in written if "answer_em" in row]
    assert [row["retrieval"] for row in answered] == ["mine: 2 steps, until Q < 0.500"]
    assert [{k: v for k, v in row.items() if "answer" not in k} for row in written] == rows
    assert "answer EM" in file.with_suffix(".md").read_text()
    # the passages are those found before Q fell below the threshold, in the document's order
    loaded = QRAGModel.from_pretrained(model, device="cpu")
    samples = read_hotpotqa(hotpotqa)
    beams = search_samples(loaded, samples, SearchOptions(2, q_threshold=0.5))
    assert asked == [
        prompt("multihop", Task(s.question, [s.chunks[i] for i in sorted(b.retrieved)], ""))
        for s, b in zip(samples, beams, strict=True)
    ]
