from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrag_retriever.errors import DatasetError
from qrag_train.cli import read_questions
from qrag_train.data import (
    BackgroundText,
    FixedSamples,
    Ruler,
    SupportSample,
    read_squad,
    read_words,
)
from qrag_train.data.ruler import NEEDLES, NOISE, TASKS
from qrag_train.data.source import SourceConfig

BOOKS = BackgroundText([f"Sentence {i} of the book stands here." for i in range(300)])
WORDS = [a + b + c for a in "bdfg" for b in "aeiou" for c in "lmnr"]
PARAGRAPHS = [f"Paragraph {i}, about {i}." for i in range(26)]
QUESTIONS = [
    SupportSample(
        f"q{i}", f"What of {i}?", (*PARAGRAPHS[i : i + 6], PARAGRAPHS[i]), (1, 4), f"answer {i}"
    )
    for i in range(20)
]
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"

seeds = st.integers(0, 10**6)


def made(task: str, tokens: int | tuple[int, int], seed: int = 0) -> SupportSample:
    ruler = Ruler(task, tokens, BOOKS, words=WORDS, questions=QUESTIONS)
    return ruler.sample(np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("task", "needles", "support", "key", "value"),
    [
        ("niah_single_1", 1, 1, "words", "number"),
        ("niah_single_2", 1, 1, "words", "number"),
        ("niah_single_3", 1, 1, "words", "uuid"),
        ("niah_multikey_1", 4, 1, "words", "number"),
        ("niah_multikey_2", None, 1, "words", "number"),
        ("niah_multikey_3", None, 1, "uuid", "uuid"),
        ("niah_multivalue", 4, 4, "words", "number"),
        ("niah_multiquery", 4, 4, "words", "number"),
    ],
)
@settings(max_examples=20)
@given(seeds, st.sampled_from([300, 1000]))
def test_needles_by_reading_the_text(task, needles, support, key, value, seed, tokens):
    sample = made(task, tokens, seed)
    asked = re.fullmatch(
        r"What (?:is|are all) the special magic (numbers?|uuids?) for (.+) mentioned in the "
        r"provided text\?",
        sample.question,
    )
    keys = set(re.split(r", and |, ", asked[2]))
    read = {i: NEEDLE.fullmatch(c) for i, c in enumerate(sample.chunks) if "special magic" in c}
    assert all(read.values())
    wanted = {i: match[3] for i, match in read.items() if match[2] in keys}
    assert set(sample.support) == set(wanted)
    assert len(wanted) == support
    assert sorted(sample.answer.split(", ")) == sorted(wanted.values())
    assert ("are all" in sample.question) == (support > 1) == asked[1].endswith("s")
    if needles is None:  # nothing but needles
        assert len(read) == len(sample.chunks) > 4
    else:
        assert len(read) == needles
    pairs = {(match[2], match[3]) for match in read.values()}
    assert len(pairs) == len(read) == len({v for _, v in pairs})
    patterns = {"words": r"[a-z]+-[a-z]+", "uuid": UUID, "number": r"[1-9]\d{6}"}
    assert all(re.fullmatch(patterns[key], k) for k, _ in pairs)
    assert all(re.fullmatch(patterns[value], v) for _, v in pairs)
    hay = [chunk for i, chunk in enumerate(sample.chunks) if i not in read]
    if task == "niah_single_1":
        assert set(hay) == {NOISE}
    else:
        numbers = [int(chunk.split()[1]) for chunk in hay]
        assert all((b - a) % 300 == 1 for a, b in pairwise(numbers))


@settings(max_examples=20)
@given(seeds)
def test_a_chain_by_following_it(seed):
    sample = made("vt", 800, seed)
    value = re.search(r"the value (\d{5}) ", sample.question)[1]
    known, lines = {value}, []
    for i, chunk in enumerate(sample.chunks):
        match = re.fullmatch(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", chunk)
        if match and match[2] in known:
            known.add(match[1])
            lines.append(i)
        else:
            assert chunk == NOISE
    assert tuple(lines) == sample.support
    assert len(lines) == 5
    assert known - {value} == set(sample.answer.split(", "))


@settings(max_examples=20)
@given(st.sampled_from(["qa_1", "qa_2"]), seeds, st.sampled_from([20, 60, 500]))
def test_paragraphs_stand_once_among_others(task, seed, tokens):
    sample = made(task, tokens, seed)
    question = next(q for q in QUESTIONS if q.question == sample.question)
    support = {question.chunks[i] for i in question.support}
    assert {sample.chunks[i] for i in sample.support} == support
    assert len(set(sample.chunks)) == len(sample.chunks)
    assert sample.answer == question.answer
    own = set(question.chunks)
    if tokens >= 60:
        assert own <= set(sample.chunks)
    if {chunk for q in QUESTIONS for chunk in q.chunks} - set(sample.chunks):
        assert not any("of the book" in chunk for chunk in sample.chunks), "paragraphs are left"
    if tokens == 500:  # more than all paragraphs: books fill the rest
        assert {chunk for q in QUESTIONS for chunk in q.chunks} <= set(sample.chunks)
        of_books = {chunk for chunk in sample.chunks if "of the book" in chunk}
        assert len(of_books) > 3
        assert of_books <= set(BOOKS.passages().sentences), "the same in every text"


@given(st.sampled_from(TASKS), seeds, st.integers(150, 3000))
def test_texts_are_as_long_as_asked_for(task, seed, tokens):
    sample = made(task, tokens, seed)
    length = sum(len(chunk) + 1 for chunk in sample.chunks)
    passages = BOOKS.passages().sentences if task.startswith("qa") else ()
    longest = max(map(len, [*sample.chunks, *passages])) + 1
    assert 4 * tokens - 2 * longest < length <= 4 * tokens


def test_lengths_from_a_range_and_needles_without_hay():
    lengths = {len(made("niah_single_1", (100, 1000), seed).chunks) for seed in range(60)}
    assert min(lengths) < 10
    assert max(lengths) > 38
    assert len(made("vt", 1).chunks) == 5
    assert len(made("niah_multivalue", 1).chunks) == 4
    assert len(made("qa_2", 1).chunks) == 2


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_reproducible_and_different(task):
    ruler = Ruler(task, (200, 400), BOOKS, words=WORDS, questions=QUESTIONS)
    fixed = FixedSamples(ruler, count=8, seed=3)
    assert list(fixed) == list(fixed)
    assert len({sample.id for sample in fixed}) == 8
    assert len({(sample.question, sample.support) for sample in fixed}) > 4


def test_needles_fall_everywhere():
    places = [made("niah_single_1", 250, seed) for seed in range(300)]
    shares = np.array([s.support[0] / (len(s.chunks) - 1) for s in places])
    assert abs(shares.mean() - 0.5) < 0.06
    assert shares.min() == 0
    assert shares.max() == 1


def test_what_is_missing_is_told():
    with pytest.raises(DatasetError, match="task='cwe' is not known; give one of niah_single_1"):
        Ruler("cwe", 100, BOOKS)
    with pytest.raises(DatasetError, match="give a list of words"):
        Ruler("niah_single_1", 100, BOOKS)
    with pytest.raises(DatasetError, match="qa_1 needs questions"):
        Ruler("qa_1", 100, BOOKS)
    few = Ruler("niah_multikey_2", 500, BOOKS, words=["one", "two"])
    with pytest.raises(DatasetError, match="only about 4 different keys; give more words"):
        few.sample(np.random.default_rng(0))
    for tokens in (0, (5, 4)):
        with pytest.raises(DatasetError, match="is not allowed"):
            Ruler("vt", tokens, BOOKS)


def test_word_lists(tmp_path: Path):
    file = tmp_path / "words.txt"
    file.write_text("A\nab\nzebra\nParis\nna\u00efve\n\nco-op\nextraordinary\n")
    assert read_words(file) == ["zebra"]
    file.write_text("A\n")
    with pytest.raises(DatasetError, match="holds no word"):
        read_words(file)


def squad(tmp_path: Path) -> Path:
    def paragraph(number: int) -> dict[str, object]:
        answers = [{"text": text, "answer_start": 0} for text in (f"a{number}", "it", "it")]
        questions = [
            {"id": f"{number}-{i}", "question": f" What is {number}? ", "answers": answers}
            for i in range(2)
        ]
        questions.append({"id": "no", "question": "?", "answers": [], "is_impossible": True})
        return {"context": f"It is  {number}.", "qas": questions}

    articles = [{"title": "One", "paragraphs": [paragraph(0), paragraph(1)]}]
    articles.append({"paragraphs": [paragraph(2)]})
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": articles}))
    return file


def test_squad(tmp_path: Path):
    samples = read_squad(squad(tmp_path))
    assert [sample.id for sample in samples] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    chunks = ("One. It is 0.", "One. It is 1.")
    assert samples[2] == SupportSample("1-0", "What is 1?", chunks, (1,), "a1", ("it",))
    assert samples[5].chunks == ("It is 2.",)
    wrong = tmp_path / "wrong.json"
    for content in ["[1]", "{}", '{"data": 5}']:
        wrong.write_text(content)
        with pytest.raises(DatasetError, match="not in SQuAD's shape"):
            read_squad(wrong)
    wrong.write_text('{"data": [{"paragraphs": [{"context": "x"}]}]}')
    with pytest.raises(DatasetError, match="article 0: the field 'qas' is missing"):
        read_squad(wrong)
    for content, message in [
        ("{", "not valid JSON"),
        ('{"data": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "deep|nested"),
    ]:
        wrong.write_text(content)
        with pytest.raises(DatasetError, match=message):
            read_squad(wrong)


def test_as_a_source_of_training_and_evaluation(tmp_path: Path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text(" ".join(BOOKS.sentences))
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS))
    needles = {"format": "ruler", "background": str(books), "words": str(words)}
    config = SourceConfig("ruler:niah_multikey_1", **needles, tokens=(100, 200))
    assert not config.is_file
    sample = config.open().sample(np.random.default_rng(0))
    assert len(sample.support) == 1
    with pytest.raises(DatasetError, match="needs 'background'"):
        SourceConfig("ruler:vt", "ruler")
    sets = read_questions("ruler:niah_multivalue", tokens=[200, 400], samples=3, **needles)
    assert list(sets) == [f"ruler:niah_multivalue, {n} tokens" for n in (200, 400)]
    assert all(len(s.support) == 4 for samples in sets.values() for s in samples)
    paragraphs = SourceConfig(
        "ruler:qa_1", "ruler", background=str(books), questions=str(squad(tmp_path))
    )
    assert paragraphs.open().sample(np.random.default_rng(0)).answer.startswith("a")


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "qa_2"])
def test_a_million_tokens(task):
    sample = made(task, 1_000_000)
    assert sum(map(len, sample.chunks)) > 3.8e6
    assert sample.support


def test_every_task_is_there():
    assert len(NEEDLES) == 8
    assert len(TASKS) == 11
