from __future__ import annotations

import json

import pytest
import ruler
from running import run, save_model, write_books, write_hotpotqa


def test_tasks_lengths_and_means(tmp_path):
    needles = ("One of the special magic numbers uuids for is: VAR = 0123456789-abcdef",)
    model = save_model(tmp_path, "relative", needles)
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["cup", "hat", "key", "book", "lamp", "coin", "red", "blue"]))
    file = tmp_path / "out" / "r.json"
    tasks = ["niah_single_1", "niah_multiquery", "vt", "qa_2", "qa_1"]  # the last has no file
    arguments = [
        *(model, "--words", words, "--background", write_books(tmp_path), "--count", 3),
        *("--hotpotqa", write_hotpotqa(tmp_path), "--tasks", *tasks, "--tokens", 256, 512),
        *("--baselines-to", 256, "--json", file),
    ]
    run(ruler, *arguments)
    written = json.loads(file.read_text())
    rows = {(row["data"], row["retrieval"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"])
    mine = {"mine: 4 steps", "mine: 4 steps, until Q < 0.500"}
    others = {"untrained: 4 steps", "untrained: the best 4 of one step", "BM25"}
    for task in ("niah_single_1", "niah_multiquery", "mean of 2 NIAH tasks"):
        assert {way for data, way in rows if data == f"{task}, 256"} == mine | others
        assert {way for data, way in rows if data == f"{task}, 512"} == mine
    assert ("vt, 512", "mine: 5 steps") in rows
    assert ("qa_2, 256", "mine: 2 steps") in rows
    assert not any("qa_1" in data for data, _ in rows)
    for way in mine | others:
        parts = [rows[f"{task}, 256", way] for task in tasks[:2]]
        mean = rows["mean of 2 NIAH tasks, 256", way]
        assert mean["fact_em"] == pytest.approx(sum(p["fact_em"] for p in parts) / 2, abs=1e-4)
        assert mean["questions"] == 6
    assert (file.parent / "r_length.png").read_bytes().startswith(b"\x89PNG")
    drawn = ruler.lines(written["rows"])
    assert list(drawn["Fact-EM, mine"]) == [*tasks[:2], "vt", "qa_2"]
    assert set(drawn["Fact-EM, mean of NIAH"]["BM25"]) == {256}
    # BM25 finds the one needle, whose key stands in the question alone
    assert rows["niah_single_1, 256", "BM25"]["fact_em"] == 1.0

    journal = file.with_suffix(".journal.jsonl")
    before = journal.read_bytes()
    run(ruler, *arguments)
    assert journal.read_bytes() == before


def test_without_a_model_the_others_are_judged(tmp_path):
    save_model(tmp_path)
    words = tmp_path / "words.txt"
    words.write_text("cup\nhat\nkey")
    file = tmp_path / "r.json"
    books = write_books(tmp_path)
    run(
        *(ruler, "--encoder", tmp_path / "encoder", "--words", words, "--background", books),
        *("--tasks", "niah_single_1", "--tokens", 100, "--count", 2, "--json", file),
    )
    rows = json.loads(file.read_text())["rows"]
    assert {row["retrieval"] for row in rows[:3]} == {
        "untrained: 4 steps",
        "untrained: the best 4 of one step",
        "BM25",
    }


def test_what_was_drawn_stays_when_the_reader_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    model = save_model(tmp_path)
    words = tmp_path / "words.txt"
    words.write_text("cup\nhat\nkey")
    file = tmp_path / "r.json"
    reader = ("--reader", "tiny", "--reader-url", "http://127.0.0.1:9/v1")
    with pytest.raises(SystemExit, match="answered 0 of 2"):
        run(
            *(ruler, model, "--words", words, "--background", write_books(tmp_path), *reader),
            *("--tasks", "niah_single_1", "--tokens", 100, 200, "--count", 2, "--json", file),
        )
    assert (file.parent / "r_length.png").read_bytes().startswith(b"\x89PNG")
