from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import write_questions

from qrag_retriever.errors import DatasetError
from qrag_train.cli import read_questions
from qrag_train.data import BackgroundText
from qrag_train.data.background import mimicked, thinned
from qrag_train.data.datamodule import SupportDataModule
from qrag_train.data.sample import FixedSamples
from qrag_train.data.simulator import OBJECTS, PLACES
from qrag_train.data.source import SourceConfig


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(write_questions(tmp_path / f"{i}.jsonl", 30, seed=i)) for i in range(2)]


def test_validation_questions_are_the_same_for_every_seed(files: list[str]) -> None:
    first, second = (
        SupportDataModule(files[0], files[1], val_samples=10, seed=seed).samples("val")
        for seed in (1, 2)
    )
    assert list(first) == list(second)
    assert len({sample.id for sample in first}) == 10
    assert len(SupportDataModule(files[0], files[1]).samples("val")) == 30


def test_several_validation_files_are_united_and_no_question_counts_twice(files: list[str]) -> None:
    plain = [SourceConfig(file) for file in files]
    weighted = [SourceConfig(files[0], weight=1.0), SourceConfig(files[1], weight=3.0)]
    for sources in (plain, weighted):
        data = SupportDataModule(files[0], val=sources, test=sources)
        for part in ("val", "test"):
            assert len({sample.id for sample in data.samples(part)}) == 60
            assert len(data.samples(part)) == 60
        chosen = [s.id for s in SupportDataModule(val=sources, val_samples=20).samples("val")]
        assert len(set(chosen)) == len(chosen) == 20
        firsts = sum(id_.startswith("0-") for id_ in chosen)
        assert 3 <= firsts <= 6 if sources is weighted else 5 <= firsts <= 15


def test_made_up_validation_and_test_questions_are_others(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained the whole day long. Nobody came to see them.")
    made = [SourceConfig("simulated:1", "babilong", background=str(tmp_path), sentences=(10, 12))]
    data = SupportDataModule("unused", val=made, test=made, val_samples=20)
    val, test = ({sample.chunks for sample in data.samples(part)} for part in ("val", "test"))
    assert len(val) == len(test) == 20
    assert not val & test


def test_more_processes_than_validation_questions(files: list[str]) -> None:
    data = SupportDataModule(files[0], files[1], val_samples=3)
    data.trainer = SimpleNamespace(global_rank=0, world_size=4)  # type: ignore[assignment]
    with pytest.raises(DatasetError, match="3 val questions cannot be shared by 4 processes"):
        data.val_dataloader()


def test_what_a_source_cannot_have(files: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"corpus belongs to the format 'corpus'; leave it out"):
        SourceConfig(files[0], "hotpotqa", corpus="corpus.jsonl")
    with pytest.raises(DatasetError, match=r"limit=5 .* have no end"):
        SourceConfig(files[0], "linked", limit=5)
    with pytest.raises(DatasetError, match=r"background_people belongs .* leave it out"):
        SourceConfig("ruler:niah_single_1", "ruler", background="books", background_people=True)
    with pytest.raises(DatasetError, match=r"background_lookalikes belongs .* leave it out"):
        SourceConfig("a.jsonl", background_lookalikes=0.1)
    books = {"background": "books"}
    for format_, file, settings in (
        ("ruler", "ruler:niah_single_2", {**books, "sentences": (5000, 5000)}),
        ("babilong", "simulated:1", {**books, "tokens": (32_000, 32_000)}),
        ("jsonl", "a.jsonl", {"words": "words.txt"}),
        ("jsonl", "a.jsonl", books),
        ("babilong", "qa1.txt", {**books, "moves": 3}),
        ("babilong", "qa1.txt", {**books, "places": 2}),
    ):
        *_, name = settings
        with pytest.raises(DatasetError, match=rf"{name} belongs to .* leave it out beside"):
            SourceConfig(file, format_, **settings)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"background_lookalikes=1.0 is not allowed; give a sh"):
        SourceConfig("a", "babilong", background="books", background_lookalikes=1.0)


def test_sources_are_mixed_by_weight(files: list[str]) -> None:
    sources = [SourceConfig(files[0], weight=1.0), SourceConfig(files[1], weight=3.0)]
    source = SupportDataModule(train=sources).source("train")
    rng = np.random.default_rng(0)
    firsts = [source.sample(rng).id.startswith("0-") for _ in range(400)]
    assert 0.18 < np.mean(firsts) < 0.32


def test_sources_without_weights_count_by_their_size(files: list[str]) -> None:
    source = SupportDataModule(train=[SourceConfig(file) for file in files]).source("train")
    rng = np.random.default_rng(0)
    firsts = [source.sample(rng).id.startswith("0-") for _ in range(400)]
    assert 0.42 < np.mean(firsts) < 0.58


def test_weights_are_given_to_all_or_none(files: list[str]) -> None:
    sources = [SourceConfig(files[0], weight=1.0), SourceConfig(files[1])]
    with pytest.raises(DatasetError, match="one to all or to none"):
        SupportDataModule(train=sources).source("train")


def test_a_file_and_sources_exclude_each_other(files: list[str]) -> None:
    with pytest.raises(DatasetError, match="train_file or train, not both"):
        SupportDataModule(files[0], train=[SourceConfig(files[1])])
    with pytest.raises(DatasetError, match="give each source of train its own corpus"):
        SupportDataModule(train=[SourceConfig(files[1])], corpus="corpus.jsonl")


def test_val_samples_is_checked() -> None:
    with pytest.raises(DatasetError, match="val_samples=0"):
        SupportDataModule(val_samples=0)


def test_training_needs_an_end(files: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"--trainer\.max_steps"):
        SupportDataModule(files[0], files[1]).train_dataloader()


@pytest.mark.parametrize("count", [1, 20, 37, 400, 2000])
def test_a_thinned_background_keeps_runs_and_spreads(count: int) -> None:
    kept = thinned(BackgroundText([str(i) for i in range(1000)]), count).sentences
    numbers = np.array([int(sentence) for sentence in kept])
    assert len(numbers) == min(count, 1000)
    assert len(set(numbers.tolist())) == len(numbers)
    if 40 <= count < 1000:
        assert numbers[0] == 0
        assert numbers[-1] >= 980
        assert np.mean(np.diff(numbers) == 1) >= 0.94


def test_sentences_of_books_may_name_people_of_the_stories(tmp_path: Path) -> None:
    book = ["He went back to the stable.", "Here she sat all day.", "She took the old lamp."]
    (tmp_path / "book.txt").write_text("\n\n".join(book * 8))
    settings: dict[str, Any] = {"background": str(tmp_path), "sentences": (60, 60)}
    plain, peopled = (
        SourceConfig("simulated:1", "babilong", background_people=people, **settings)
        .open()
        .sample(np.random.default_rng(0))
        for people in (False, True)
    )
    assert (plain.question, plain.support) == (peopled.question, peopled.support)
    named = set()
    for before, after in zip(plain.chunks, peopled.chunks, strict=True):
        pronoun, rest = before.split(" ", 1)
        if pronoun in ("He", "She"):
            assert after.split(" ", 1)[1] == rest
            named.add(after.split(" ", 1)[0])
        else:
            assert after == before
    assert named == {"Daniel", "John", "Mary", "Sandra"}


def test_stories_may_be_made_up(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained all day long. The sea was grey and cold.\n" * 20)
    config = SourceConfig("simulated:2", "babilong", background=str(tmp_path), sentences=(60, 60))
    sample = config.open().sample(np.random.default_rng(0))
    assert len(sample.chunks) == 60
    assert sample.question.startswith("Where is the")
    assert len(sample.support) == 2
    with pytest.raises(DatasetError, match="simulated:1 to simulated:5 or simulated:14"):
        SourceConfig("simulated:two", "babilong", background=str(tmp_path)).open()


def test_questions_of_simulated_stories(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained all day long. The sea was grey and cold.\n" * 20)
    options: dict[str, Any] = {"background": str(tmp_path), "sentences": [90]}
    (far,) = read_questions("simulated:3", "babilong", moves=3, samples=3, **options).values()
    settings: dict[str, Any] = {"background": str(tmp_path), "sentences": (90, 90)}
    for moves, same in ((3, True), (1, False)):
        source = SourceConfig("simulated:3", "babilong", moves=moves, **settings).open()
        assert (list(FixedSamples(source, 3, seed=0)) == list(far)) is same


def test_stories_of_few_places_and_things(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained all day long. The sea was grey and cold.\n" * 20)
    settings: dict[str, Any] = {"background": str(tmp_path), "sentences": (90, 90)}
    source = SourceConfig("simulated:2", "babilong", places=2, things=1, **settings).open()
    (judged,) = read_questions(
        "simulated:2",
        "babilong",
        background=str(tmp_path),
        sentences=[90],
        samples=5,
        places=2,
        things=1,
    ).values()
    assert list(judged) == list(FixedSamples(source, 5, seed=0))
    for sample in judged:
        told = " ".join(sample.chunks)
        assert sum(f"the {thing}" in told for thing in OBJECTS) == 1
        assert sum(f"to the {place}." in told for place in PLACES) <= 2


def test_a_limit_takes_the_first_questions(files: list[str]) -> None:
    every = list(SourceConfig(files[0]).open())
    assert list(SourceConfig(files[0], limit=7).open()) == every[:7]
    assert list(SourceConfig(files[0], limit=99).open()) == every
    with pytest.raises(DatasetError, match="give 1 or more"):
        SourceConfig(files[0], limit=0)


def test_lookalikes_are_facts_of_things_that_no_story_knows(tmp_path: Path) -> None:
    book = ["They stood before the stable, cold.", "In the kitchen.", "Not in the rain!"] * 300
    (tmp_path / "book.txt").write_text("\n\n".join(book))
    settings: dict[str, Any] = {"background": str(tmp_path), "sentences": (600, 600)}
    plain, changed = (
        SourceConfig("simulated:2", "babilong", background_lookalikes=share, **settings)
        .open()
        .sample(np.random.default_rng(0))
        for share in (0.0, 0.25)
    )
    assert (plain.question, plain.support) == (changed.question, changed.support)
    made_up = [a for b, a in zip(plain.chunks, changed.chunks, strict=True) if a != b]
    assert 0.15 < len(made_up) / 600 < 0.35
    kinds = [  # sentences of bAbI's but for the noun
        re.compile(rf"^\w+ (?:{verbs}) the \w+{rest}\.$")
        for verbs, rest in (
            ("journeyed to|moved to|travelled to|went back to|went to", ""),
            ("got|grabbed|picked up|took|discarded|dropped|left|put down", "(?: there)?"),
            ("gave|handed|passed", r" to \w+"),
        )
    ]
    assert {sum(bool(kind.match(fact)) for kind in kinds) for fact in made_up} == {1}
    assert all(any(kind.match(fact) for fact in made_up) for kind in kinds)
    assert {re.findall(r"the (\w+)", fact)[0] for fact in made_up} == {"stable", "rain"}
    # Another document finds the same sentences in the same places.
    whole = BackgroundText([*book])
    assert mimicked(whole, 0.25).sentences == mimicked(whole, 0.25).sentences
    assert sum(map(str.__ne__, mimicked(whole, 0.25).sentences, book)) == 225


def test_books_without_nouns_make_no_lookalikes() -> None:
    with pytest.raises(DatasetError, match=r"no noun.*leave background_lookalikes out"):
        mimicked(BackgroundText(["It rained.", "He left the kitchen."]), 0.5)
