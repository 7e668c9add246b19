from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import DatasetError
from qrag_train.cli import read_questions
from qrag_train.data import (
    SupportSample,
    pooled,
    read_hotpotqa,
    read_musique,
    read_twowiki,
    read_twowiki_open,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")

RECORD = {
    "_id": "h1",
    "question": "Which county?",
    "answer": "Kent",
    "supporting_facts": [["B", 1], ["D", 0], ["B", 0]],
    "context": [["A", ["Aa."]], ["B", ["Ba.", " Bb."]], ["C", ["Ca."]], ["D", ["Da."]]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where?",
    "answer": "York",
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "Aa.", "is_supporting": False},
        {"idx": 1, "title": "B", "paragraph_text": "Ba.", "is_supporting": True},
        {"idx": 2, "title": "B", "paragraph_text": "Bb.", "is_supporting": True},
    ],
}


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("read", [read_hotpotqa, read_twowiki])
def test_paragraphs_become_chunks_and_supporting_titles_support(tmp_path, read):
    (sample,) = read(write(tmp_path / "x.json", [RECORD]))
    assert sample.id == "h1"
    assert sample.chunks == ("A. Aa.", "B. Ba. Bb.", "C. Ca.", "D. Da.")
    assert sample.support == (1, 3)
    assert sample.answer == "Kent"


def test_a_paragraph_that_stands_twice_supports_once(tmp_path):
    twice = {**RECORD, "context": [*RECORD["context"], RECORD["context"][1]]}
    (sample,) = read_twowiki(write(tmp_path / "x.json", [twice]))
    assert len(sample.chunks) == 5
    assert sample.support == (1, 3)


def test_all_wrong_records_are_named(tmp_path):
    without = {key: value for key, value in RECORD.items() if key != "supporting_facts"}
    absent = {**RECORD, "_id": "h3", "supporting_facts": [["Z", 0]]}
    misshapen = {**RECORD, "_id": "h4", "context": [["A"]]}
    with pytest.raises(DatasetError) as error:
        read_hotpotqa(write(tmp_path / "x.json", [RECORD, without, absent, misshapen, 5]))
    text = str(error.value)
    assert "x.json has 4 problems" in text
    assert "record 1 (h1): the field 'supporting_facts' is missing" in text
    assert "record 2 (h3): The supporting paragraph 'Z' is not among" in text
    assert "record 3 (h4): a field has the wrong shape" in text
    assert "record 4: a field has the wrong shape" in text


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"x\.json"):
        read_hotpotqa(path)


def test_open_corpus_is_shared(tmp_path):
    corpus = write(
        tmp_path / "c.json", [{"title": title, "text": f"{title}a."} for title in "ABCD"]
    )
    questions = [{key: value for key, value in RECORD.items() if key != "context"}] * 2
    first, second = read_twowiki_open(corpus, write(tmp_path / "q.json", questions))
    assert first.chunks == ("A. Aa.", "B. Ba.", "C. Ca.", "D. Da.")
    assert first.support == (1, 3)
    assert first.chunks is second.chunks

    with pytest.raises(DatasetError, match="record 1: the field 'title' is missing"):
        read_twowiki_open(write(corpus, [{"title": "A", "text": ""}, {"text": ""}]), questions)


def test_musique(tmp_path):
    path = tmp_path / "m.jsonl"
    unanswerable = {**MUSIQUE, "id": "u", "answerable": False}
    named = {**MUSIQUE, "answer_aliases": ["Jorvik"]}
    path.write_text(f"{json.dumps(named)}\n{json.dumps(unanswerable)}\n")
    (sample,) = read_musique(path)
    assert sample.other_answers == pooled([sample])[0].other_answers == ("Jorvik",)
    assert sample.id == "2hop__1_2"
    assert sample.chunks == ("A. Aa.", "B. Ba.", "B. Bb.")
    assert sample.support == (1, 2)
    assert sample.answer == "York"


def test_musique_names_wrong_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    nothing = {**MUSIQUE, "paragraphs": MUSIQUE["paragraphs"][:1]}
    path.write_text(f"{json.dumps(MUSIQUE)}\n{{\n{json.dumps(nothing)}\n[]\n")
    with pytest.raises(DatasetError) as error:
        read_musique(path)
    assert "has 3 problems" in str(error.value)
    assert "line 2: " in str(error.value)
    assert "line 3: Sample '2hop__1_2': 'support' must be" in str(error.value)


@needs_data
@pytest.mark.parametrize(
    ("read", "name", "count"),
    [
        (read_hotpotqa, "hotpotqa/valid.json", 300),
        (read_twowiki, "2wikimultihopqa/train.json", 727),
    ],
)
def test_official_files_with_supporting_facts(read, name, count):
    records = json.loads((DATA / name).read_text(encoding="utf-8"))
    samples = read(DATA / name)
    assert len(samples) == len(records) == count
    for sample, record in zip(samples, records, strict=True):
        assert len(sample.chunks) == len(record["context"])
        titles = {record["context"][i][0] for i in sample.support}
        assert titles == {title for title, _ in record["supporting_facts"]}
        for title, sentence in record["supporting_facts"]:
            chunk = next(
                sample.chunks[i] for i in sample.support if sample.chunks[i].startswith(title)
            )
            text = dict(map(tuple, record["context"]))[title]
            # A few official records point past the paragraph's last sentence.
            assert sentence >= len(text) or " ".join(text[sentence].split()) in chunk


@needs_data
def test_official_musique_file():
    samples = read_musique(DATA / "musique" / "valid.jsonl")
    lines = (DATA / "musique" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == len(lines) == 60
    for sample, line in zip(samples, lines, strict=True):
        # The decomposition names the same paragraphs as is_supporting does.
        steps = json.loads(line)["question_decomposition"]
        assert set(sample.support) == {step["paragraph_support_idx"] for step in steps}


@needs_data
def test_pooled_corpus():
    folder = DATA / "2wikimultihopqa"
    samples = read_twowiki_open(folder / "open_corpus.json", folder / "open_corpus_valid.json")
    assert len(samples) == 54
    assert {len(sample.chunks) for sample in samples} == {6119}
    records = json.loads((folder / "open_corpus_valid.json").read_text(encoding="utf-8"))
    for sample, record in zip(samples, records, strict=True):
        titles = {title for title, _ in record["supporting_facts"]}
        assert len(sample.support) == len(titles)
        assert all(
            any(sample.chunks[i].startswith(f"{title}. ") for title in titles)
            for i in sample.support
        )


@given(
    st.lists(
        st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6).flatmap(
            lambda chunks: st.tuples(
                st.just(chunks), st.sets(st.integers(0, len(chunks) - 1), min_size=1)
            )
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_pool_holds_every_text_once_and_the_same_support(
    drawn: list[tuple[list[str], set[int]]],
) -> None:
    samples = [
        SupportSample(str(i), "?", tuple(chunks), tuple(sorted(support)))
        for i, (chunks, support) in enumerate(drawn)
    ]
    together = pooled(samples)
    corpus = together[0].chunks
    assert all(sample.chunks is corpus for sample in together)
    assert sorted(corpus) == sorted({chunk for chunks, _ in drawn for chunk in chunks})
    for sample, one in zip(samples, together, strict=True):
        assert {corpus[i] for i in one.support} == {sample.chunks[i] for i in sample.support}


def test_evaluation_on_a_pool(tmp_path: Path) -> None:
    other = {**RECORD, "_id": "h2", "context": [["E", ["Ea."]], *RECORD["context"]]}
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps([RECORD, other]))
    (samples,) = read_questions(str(file), "hotpotqa", pool=True, samples=1).values()
    assert len(samples) == 1
    assert samples[0].chunks == ("A. Aa.", "B. Ba. Bb.", "C. Ca.", "D. Da.", "E. Ea.")


@pytest.mark.parametrize("read", [read_hotpotqa, read_twowiki])
def test_a_file_that_is_not_there(tmp_path, read):
    with pytest.raises(DatasetError, match=r"nowhere\.json cannot be read \(No such file"):
        list(read(tmp_path / "nowhere.json"))
