"""The benchmarks of time and memory run through on little; their figures are not judged here."""

from __future__ import annotations

import json

import ann
import beams
import compare
import encoding
import numpy as np
import pytest
import scoring
import serving
import storage_types
import ten_million
from running import SENTENCES, run, save_model, write_books, write_hotpotqa

from qrag_retriever import ChunkIndex, QRAGModel, QRAGRetriever, SearchOptions
from qrag_retriever.vectors import StoredVectors
from qrag_train.data import SupportSample, read_hotpotqa
from qrag_train.evaluation import evaluate


@pytest.fixture
def embedder(tmp_path):
    save_model(tmp_path)
    return tmp_path / "encoder"


def test_a_step_in_each_storage_type(tmp_path):
    file = tmp_path / "scoring.json"
    small = ["--chunks", 2000, "--dimension", 16, "--states", 1, "--retrieved", 2]
    run(scoring, *small, "--types", "float32", "int8", "--repetitions", 1, "--json", file)
    written = json.loads(file.read_text())
    cases = {(row["type"], row["positions"]) for row in written["figures"]}
    assert cases == {(name, mode) for name in ("float32", "int8") for mode in scoring.SCHEMES}
    assert all(row["times_bare_scan"] > 0 for row in written["figures"])


def test_compare_refuses_ways_that_differ(tmp_path, monkeypatch):
    file = tmp_path / "compare.json"
    small = ["--chunks", 300, "--dimensions", 8, "--repetitions", 1]
    run(compare, *small, "--json", file)
    [row] = json.loads(file.read_text())["figures"]
    assert (row["chunks"], row["dimension"]) == (300, 8)
    monkeypatch.setattr(compare, "straightforward", lambda *_: -1)
    with pytest.raises(SystemExit, match="different chunks"):
        run(compare, *small)


def test_serving(tmp_path, embedder):
    file = tmp_path / "serving.json"
    small = ["--model", embedder, "--chunks", 300, "--few-chunks", 50, "--queries", 3]
    small += ["--callers", 4, "--steps", 2, "--repetitions", 1]
    run(serving, *small, "--positions", "none", "truncated", "--types", "int8", "--json", file)
    rows = json.loads(file.read_text())["figures"]
    assert [(row["positions"], row["state_encoder"]) for row in rows[:4]] == [
        (positions, encoder) for positions in ("none", "truncated") for encoder in (True, False)
    ]
    assert (rows[4]["queries"], rows[4]["steps"]) == (3, 2)
    assert rows[5]["states"] == 4 * 2
    assert 2 <= rows[5]["encoder_passes"] <= 8
    assert rows[6]["steps"] == 2


# letter by letter, as the small encoder reads a book, passages are long
@pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")
def test_encoding_compares_equal_vectors(tmp_path, embedder, monkeypatch):
    file = tmp_path / "encoding.json"
    small = ["--model", embedder, "--texts", 12, "--repetitions", 1, "--json", file]
    run(encoding, *small)
    even, mixed = json.loads(file.read_text())["figures"]
    assert (even["count"], even["different"]) == (12, 12)
    assert (mixed["count"], mixed["different"]) == (12, 8)
    encode = QRAGModel.encode_actions
    monkeypatch.setattr(QRAGModel, "encode_actions", lambda *a, **more: encode(*a, **more) + 0.1)
    with pytest.raises(SystemExit, match="differ by"):
        run(encoding, *small)


@pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")
def test_encoding_by_openvino(tmp_path, embedder):
    pytest.importorskip("openvino")
    file = tmp_path / "encoding.json"
    small = ["--model", embedder, "--texts", 6, "--repetitions", 1, "--json", file]
    run(encoding, *small, "--openvino")
    written = json.loads(file.read_text())
    assert all(row["openvino_per_s"] > 0 for row in written["figures"])
    assert [row["chunks_in_state"] for row in written["one_state"]] == [0, 1, 3]


def test_approximate_search(tmp_path):
    file = tmp_path / "ann.json"
    small = ["--chunks", 500, "--dimension", 16, "--queries", 30, "--repetitions", 1]
    run(ann, *small, "--kinds", "flat", "hnsw", "--types", "int8", "--json", file)
    flat, hnsw = json.loads(file.read_text())["figures"]
    assert flat["recall_at_1"] == 1
    assert hnsw["recall_at_1"] > 0.9
    vectors = np.random.default_rng(0).standard_normal((40, 8))
    np.save(tmp_path / "own.npy", vectors)
    own = ["--embeddings", tmp_path / "own.npy", "--queries", 10, "--kinds", "flat"]
    run(ann, *own, "--repetitions", 1, "--json", file)
    written = json.loads(file.read_text())
    assert (written["chunks"], written["queries"]) == (30, 10)


def test_beams_beside_the_greedy_search(tmp_path):
    model, questions, file = save_model(tmp_path), write_hotpotqa(tmp_path), tmp_path / "b.json"
    run(beams, model, questions, "--format", "hotpotqa", "--beams", 1, 3, "--json", file)
    rows = json.loads(file.read_text())["figures"]
    plain = QRAGModel.from_pretrained(model)
    searches = [(threshold, count) for threshold in (None, 0.5) for count in (1, 3)]
    assert [(row["q_threshold"], row["beams"]) for row in rows] == searches
    for row, (threshold, count) in zip(rows, searches, strict=True):
        options = SearchOptions(2, q_threshold=threshold, beams=count)
        scores = evaluate(plain, read_hotpotqa(questions), options)
        assert row["fact_em"] == pytest.approx(scores["fact_em"], abs=1e-4)
    assert [row["times_as_long"] for row in rows[::2]] == [1, 1]
    greedy, several = rows[:2]
    assert greedy["states_per_question"] == 2 < several["states_per_question"] <= 4


def test_storage_types_are_judged_on_what_they_keep(tmp_path, monkeypatch):
    model, questions, file = save_model(tmp_path), write_hotpotqa(tmp_path), tmp_path / "t.json"
    asked = []
    store = StoredVectors.of
    monkeypatch.setattr(
        StoredVectors, "of", lambda vectors, dtype: asked.append(dtype) or store(vectors, dtype)
    )
    types = ["float32", "int8"]
    run(storage_types, model, questions, "--format", "hotpotqa", "--types", *types, "--json", file)
    rows = json.loads(file.read_text())["figures"]
    assert [row["type"] for row in rows] == types
    assert set(asked) == set(types)
    assert rows[0]["other_trajectories"] == 0
    plain = QRAGModel.from_pretrained(model)
    expected = evaluate(plain, read_hotpotqa(questions), SearchOptions(k=2))
    assert expected.items() <= rows[0].items()
    babi = ["simulated:1", "simulated:2", "--steps", 1, 2, "--format", "babilong"]
    babi += ["--background", write_books(tmp_path), "--sentences", 30, "--questions", 2]
    run(storage_types, model, *babi, "--types", "bfloat16", "--json", file)
    one, two, both = json.loads(file.read_text())["figures"]
    assert (one["steps"], two["steps"], both["questions"]) == (1, 2, 4)
    assert both["fact_em"] == (one["fact_em"] + two["fact_em"]) / 2
    assert len(json.loads(file.read_text())["models"]) == 1


def test_files_of_one_name_are_two(tmp_path, capsys):
    model, questions = save_model(tmp_path), write_hotpotqa(tmp_path)
    other = tmp_path / "other" / questions.name
    other.parent.mkdir()
    other.write_text(json.dumps(json.loads(questions.read_text())[:1]))
    run(storage_types, model, questions, other, "--format", "hotpotqa", "--types", "float32")
    assert capsys.readouterr().out.count("points of Fact-EM lost 0.00") == 3


def test_ten_million(tmp_path):
    folder, file = tmp_path / "index", tmp_path / "ten.json"
    arguments = [save_model(tmp_path), "--background", write_books(tmp_path), "--folder", folder]
    arguments += ["--sentences", 25, "--questions", 2, "--json", file]
    run(ten_million, *arguments)
    first = json.loads(file.read_text())
    assert first["built"]["sentences"] == 25
    assert first["built"]["bytes_of_embeddings"] == 25 * 32
    assert first["load_seconds"] is None
    assert not (folder / "parts").exists()
    run(ten_million, *arguments)
    second = json.loads(file.read_text())
    assert second["built"] == first["built"]
    assert second["load_seconds"] > 0
    assert second["fact_em"] == first["fact_em"]
    for other in (["--sentences", 26], ["--dtype", "float32"]):
        with pytest.raises(SystemExit, match="holds an index of other sentences"):
            run(ten_million, *arguments, *other)


def test_a_hidden_story_is_found_and_taken_out_again(tmp_path):
    model = QRAGModel.from_pretrained(save_model(tmp_path), device="cpu")
    index = ChunkIndex.from_texts(SENTENCES[:20], model=model)
    before = list(index.snapshot().chunks)
    sample = SupportSample("1", "where is the coin?", ("the white coin fell.",) * 2, (0,))
    for k, found in ((20, True), (0, False)):
        retriever = QRAGRetriever(index=index, k=max(k, 1), q_threshold=None if k else 1e9)
        rng = np.random.default_rng(0)
        assert ten_million.hide_and_ask(retriever, index, sample, rng) is found
        assert list(index.snapshot().chunks) == before
