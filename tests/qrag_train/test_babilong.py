from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import DatasetError
from qrag_train.data import (
    BabiLong,
    BabiSimulator,
    BackgroundText,
    FixedSamples,
    SampleList,
    SupportSample,
    hide_story,
    split_sentences,
)
from qrag_train.data.background import books

BOOKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "books"
STORY = SupportSample("s", "Where?", ("one.", "two.", "three."), (2, 0), "there")
NUMBERS = BackgroundText([f"Sentence {i}." for i in range(20)])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rained all day. We went home\nin the dark.", 2),
        ('"Is it you?" she asked the man. "Yes, it is me."', 2),
        ('He said to me: "Go away now!" Then he left the room.', 2),
        ("Mr. Bell and Mrs. Hale met Dr. Donne in St. James Street.", 1),
        ("The letter was from J. B. Priestley himself.", 1),
        ("It was half past two p.m. when he came back.", 1),
        ("He paid 3.50 for the old book.", 1),
        ("He waited and waited... Nobody came to the door.", 2),
        ("One paragraph without a stop\n\nAnother paragraph without a stop", 2),
        ("CHAPTER IV\n\nIt was the best of times.", 1),
    ],
)
def test_split_sentences(text, sentences):
    split = split_sentences(text, min_words=3)
    assert len(split) == sentences
    kept = text.removeprefix("CHAPTER IV")
    assert " ".join(split) == " ".join(kept.split())


def test_short_sentences_join_their_neighbour():
    assert split_sentences("No. No. I never said such a thing. Never.", min_words=4) == [
        "No. No. I never said such a thing. Never."
    ]
    assert split_sentences("I never said that. Why? What should I have said?", min_words=4) == [
        "I never said that.",
        "Why? What should I have said?",
    ]


def test_long_sentences_are_cut_evenly():
    words = [f"w{i}" for i in range(95)]
    parts = split_sentences(" ".join(words), max_words=40)
    assert [len(part.split()) for part in parts] == [31, 32, 32]
    assert " ".join(parts).split() == words


def test_what_gutenberg_adds_is_dropped():
    text = (
        "The Project Gutenberg eBook of Emma. Some licence text.\n\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nEmma was handsome and clever.\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\nMore licence text stands here."
    )
    assert split_sentences(text) == ["Emma was handsome and clever."]


@given(st.text(alphabet="aB. \n'\"?"), st.integers(1, 5), st.integers(5, 9))
def test_sentences_keep_words_and_order_and_lengths(text, low, high):
    split = split_sentences(text, min_words=low, max_words=high)
    words = iter(text.split())
    assert all(word in words for sentence in split for word in sentence.split())  # a subsequence
    assert all(1 <= len(sentence.split()) <= high for sentence in split)
    if low == 1:
        assert " ".join(split).split() == text.split()


@pytest.mark.skipif(not BOOKS.exists(), reason="the shared data are not here")
def test_books_give_sentences_of_moderate_length():
    background = BackgroundText.from_folder(BOOKS / "valid")
    lengths = np.array([len(sentence.split()) for sentence in background.sentences])
    assert len(lengths) > 50_000
    assert lengths.max() <= 40
    assert 14 < lengths.mean() < 22
    capital = np.mean([s.lstrip("'\"(“‘[")[:1].isupper() for s in background.sentences])
    assert capital > 0.85  # the rest are the later parts of cut sentences


def test_folders_without_books(tmp_path):
    (tmp_path / "other" / "book.txt").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"book\.txt cannot be read"):
        BackgroundText.from_folder(tmp_path / "other")
    with pytest.raises(DatasetError, match=r"holds 0 \.txt files and no sentence"):
        BackgroundText.from_folder(tmp_path)
    (tmp_path / "b.txt").write_text("The second book is here.")
    (tmp_path / "a.txt").write_bytes("The caf\u00e9 was closed today.".encode("latin-1"))
    assert BackgroundText.from_folder(tmp_path).sentences == (
        "The caf\ufffd was closed today.",
        "The second book is here.",
    )
    with pytest.raises(DatasetError, match="at least one book"):
        BackgroundText([])


def test_sources_share_the_books_of_a_folder_as_they_are_now(tmp_path):
    book = tmp_path / "a.txt"
    book.write_text("The first book is here. It has two sentences.")
    whole, one = books(tmp_path), books(tmp_path, 1)
    assert whole.sentences == ("The first book is here.", "It has two sentences.")
    assert len(one.sentences) == 1
    assert books(tmp_path) is whole
    book.write_text("It was written anew in the meantime.")
    assert books(tmp_path).sentences == ("It was written anew in the meantime.",)
    book.unlink()
    with pytest.raises(DatasetError, match=r"holds 0 \.txt files"):
        books(tmp_path)


@given(st.integers(0, 70), st.integers(0, 100))
def test_a_stretch_is_contiguous_and_goes_round(length, seed):
    stretch = NUMBERS.stretch(length, np.random.default_rng(seed))
    numbers = [int(sentence[9:-1]) for sentence in stretch]
    assert len(numbers) == length
    assert all((b - a) % 20 == 1 for a, b in pairwise(numbers))


@given(st.integers(0, 900), st.integers(0, 100))
def test_a_stretch_of_some_characters_is_as_long_as_fits(characters, seed):
    stretch = NUMBERS.stretch_of(characters, np.random.default_rng(seed))
    numbers = [int(sentence[9:-1]) for sentence in stretch]
    assert all((b - a) % 20 == 1 for a, b in pairwise(numbers))
    used = sum(len(sentence) + 1 for sentence in stretch)
    assert used <= characters
    if stretch:
        following = NUMBERS.sentences[(numbers[-1] + 1) % 20]
        assert used + len(following) + 1 > characters
    else:
        assert characters < max(len(sentence) + 1 for sentence in NUMBERS.sentences)


def test_stretches_begin_anywhere():
    rng = np.random.default_rng(0)
    assert {NUMBERS.stretch(1, rng)[0] for _ in range(400)} == set(NUMBERS.sentences)


@given(st.integers(3, 60), st.integers(0, 1000))
def test_hidden_stories_keep_their_order_and_support(length, seed):
    hidden = hide_story(STORY, NUMBERS, length, np.random.default_rng(seed))
    assert len(hidden.chunks) == length
    assert [c for c in hidden.chunks if c in STORY.chunks] == list(STORY.chunks)
    assert [hidden.chunks[i] for i in hidden.support] == ["three.", "one."]
    assert (hidden.id, hidden.question, hidden.answer) == ("s", "Where?", "there")
    background = [int(c[9:-1]) for c in hidden.chunks if c not in STORY.chunks]
    assert all((b - a) % 20 == 1 for a, b in pairwise(background))


def test_statements_fall_on_all_places_equally():
    rng = np.random.default_rng(1)
    counts = np.zeros(6)
    for _ in range(3000):
        hidden = hide_story(STORY, NUMBERS, 6, rng)
        counts += [chunk in STORY.chunks for chunk in hidden.chunks]
    assert np.all(np.abs(counts / 3000 - 0.5) < 0.05)


def test_a_story_longer_than_the_document():
    with pytest.raises(DatasetError, match="3 statements, more than length=2"):
        hide_story(STORY, NUMBERS, 2, np.random.default_rng(0))
    with pytest.raises(DatasetError, match="more than n_sentences=2 statements"):
        BabiLong(SampleList([STORY]), NUMBERS, 2).sample(np.random.default_rng(0))
    long = SupportSample("l", "Where?", ("x",) * 9, (0,))
    babilong = BabiLong(SampleList([STORY, long]), NUMBERS, 5)
    rng = np.random.default_rng(0)
    assert {babilong.sample(rng).id for _ in range(20)} == {"s"}


def test_lengths_are_fixed_or_from_a_range():
    rng = np.random.default_rng(2)
    fixed = BabiLong(BabiSimulator(1), NUMBERS, 40)
    assert {len(fixed.sample(rng).chunks) for _ in range(20)} == {40}
    varied = BabiLong(BabiSimulator(1), NUMBERS, (30, 33))
    assert {len(varied.sample(rng).chunks) for _ in range(100)} == {30, 31, 32, 33}
    for wrong in (0, (5, 4), (0, 3)):
        with pytest.raises(DatasetError, match="is not allowed"):
            BabiLong(BabiSimulator(1), NUMBERS, wrong)


def test_documents_are_reproducible():
    babilong = BabiLong(BabiSimulator(2), NUMBERS, (60, 90))
    fixed = FixedSamples(babilong, count=5, seed=1)
    assert list(fixed) == list(fixed)
    assert len({sample.question + str(sample.support) for sample in fixed}) > 1


def test_ten_million_tokens_take_little_memory():
    babilong = BabiLong(BabiSimulator(3), NUMBERS, 400_000)
    tracemalloc.start()
    try:
        sample = babilong.sample(np.random.default_rng(0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(sample.chunks) == 400_000
    assert peak < 40e6  # some pointers per sentence, no copies of text
    assert len({sample.chunks[i] for i in sample.support}) == 3
