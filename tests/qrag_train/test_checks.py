from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import write_questions

from qrag_retriever.errors import ConfigError, DatasetError
from qrag_train.checks import (
    check_interval,
    check_run,
    check_same_config,
    check_samples,
    check_trainer,
    check_twins,
)
from qrag_train.data.candidates import twins
from qrag_train.data.datamodule import SupportDataModule
from qrag_train.data.sample import SupportSample, finite
from qrag_train.data.source import SourceConfig

GOOD = SupportSample("1", "Where?", ("a", "b", "c"), (0, 2))


def test_good_data_passes(tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.jsonl", 5, seed=1)
    val = write_questions(tmp_path / "val.jsonl", 5, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(SupportDataModule(str(train), str(val)), episode=1, budget=1)


def test_validation_retrieves_more_than_an_episode_of_training(tmp_path: Path) -> None:
    one, two = (
        str(write_questions(tmp_path / f"{count}.jsonl", 5, seed=count, support=count))
        for count in (1, 2)
    )
    check_run(SupportDataModule(one, two), episode=1, budget=2)
    for train, val, budget in ((two, one, 2), (one, two, 1)):
        with pytest.raises(ConfigError, match="max_steps=1 chunks are retrieved"):
            check_run(SupportDataModule(train, val), episode=1, budget=budget)


@pytest.mark.parametrize("copied", [False, True])
def test_training_on_the_validation_data_is_told(tmp_path: Path, copied: bool) -> None:
    train = write_questions(tmp_path / "train.jsonl", 5)
    val = tmp_path / "val.jsonl" if copied else train
    if copied:
        shutil.copy(train, val)
    with pytest.warns(UserWarning, match="both training and validation"):
        check_run(SupportDataModule(str(train), str(val)), episode=1, budget=1)


@pytest.mark.parametrize("given", [{"train_file": "x"}, {"val_file": "x"}])
def test_both_parts_are_needed(tmp_path: Path, given: dict[str, str]) -> None:
    file = write_questions(tmp_path / "x.jsonl", 3)
    data = SupportDataModule(**dict.fromkeys(given, str(file)))
    with pytest.raises(DatasetError, match=r"There is no (train|val) data; give --data"):
        check_run(data, episode=1, budget=1)


def test_ids_differ(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data.json .*\n  question 2 \(1\): has the id"):
        check_samples("data.json", [GOOD, GOOD], budget=2)
    check_samples("stories", [GOOD, GOOD], budget=2, unique=False)


def test_chunks_have_text() -> None:
    empty = dataclasses.replace(GOOD, id="2", chunks=("a", " \n", "c"))
    with pytest.raises(DatasetError, match=r"question 2 \(2\): chunk 1 is empty"):
        check_samples("data.json", [GOOD, empty], budget=2)


def test_texts_can_be_written() -> None:
    broken = dataclasses.replace(GOOD, id="2", question="\ud83d?", chunks=("a", "b", "\udc00"))
    with pytest.raises(DatasetError) as error:
        check_samples("data.json", [GOOD, broken], budget=2)
    lines = str(error.value).splitlines()[1:]
    assert [line.partition(", ")[0] for line in lines] == [
        r"  question 2 (2): the question holds \ud83d",
        r"  question 2 (2): chunk 2 holds \udc00",
    ]


def test_copies_of_support_that_are_no_support_are_told(tmp_path: Path) -> None:
    one = dataclasses.replace(GOOD, id="2", chunks=("a", "b", "a", "b", "a"), support=(2, 3))
    both = dataclasses.replace(GOOD, id="3", chunks=("a", "b", "a", "c", "c"), support=(0, 2))
    with pytest.warns(UserWarning, match="mark all of them as support, or leave") as caught:
        check_twins("data.json", [GOOD, one, both])
    assert str(caught[0].message).splitlines()[1:] == [
        "  question 2 (2): chunk 0 has the text of support chunk 2",
        "  question 2 (2): chunk 4 has the text of support chunk 2",
        "  question 2 (2): chunk 1 has the text of support chunk 3",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_twins("data.json", [GOOD, both])


def test_copies_are_told_of_a_corpus_before_training(tmp_path: Path) -> None:
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    lines = [{"id": f"c{i}", "text": text} for i, text in enumerate(["a", "b", "a"])]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"id": str(i), "question": "?", "support": ["c2"]} for i in range(30)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    val = write_questions(tmp_path / "val.jsonl", 3)
    train = [SourceConfig(str(questions), "corpus", str(corpus))]
    with pytest.warns(
        UserWarning, match="questions.jsonl has chunks that are no support"
    ) as caught:
        check_run(SupportDataModule(train=train, val_file=str(val)), episode=1, budget=1)
    told = str(caught[0].message).splitlines()[1:]
    assert told[0] == "  question 1 (0): chunk 0 has the text of support chunk 2"
    assert (len(told), told[-1]) == (21, "  … and 10 more")


def test_what_happens_twice_in_a_story_is_no_copy(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It rained. It rained. It snowed. It rained. " * 9)
    story = SourceConfig(
        "simulated:1", "babilong", background=str(tmp_path), sentences=(12, 16), places=2, things=1
    )
    data = SupportDataModule(train=[story], val=[story])
    assert any(dict(t) for t in twins(finite(story.open())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(data, episode=2, budget=2)


def test_the_budget_is_enough_for_the_largest_support() -> None:
    small = dataclasses.replace(GOOD, id="2", support=(1,))
    check_samples("data.json", [GOOD, small], budget=2)
    with pytest.raises(
        ConfigError, match=r"max_steps=1 .* question 1 \(1\) .* --model.max_steps 2"
    ):
        check_samples("data.json", [GOOD, small], budget=1)


def test_what_differs_between_two_configs_is_named() -> None:
    before = {"model": {"encoder": "a", "pqn": {"tau": 0.1}}, "resume": False, "seed": 1}
    check_same_config(before, {**before, "resume": True, "output_dir": "elsewhere"})
    now = {"model": {"encoder": "b", "pqn": {"tau": 0.1}}, "seed": 1, "more": None}
    with pytest.raises(ConfigError) as error:
        check_same_config({**before, "gone": 3}, now)
    lines = str(error.value).splitlines()[1:]
    assert lines == ["  gone: 3 before, None now", "  model.encoder: 'a' before, 'b' now"]


@pytest.mark.parametrize(("format_", "missing"), [("corpus", "corpus"), ("babilong", "background")])
def test_a_source_has_what_its_format_needs(format_: str, missing: str) -> None:
    with pytest.raises(DatasetError, match=f"needs '{missing}'"):
        SourceConfig("x.txt", format_)


def test_weights_of_a_mixture_are_looked_at(tmp_path: Path) -> None:
    files = [str(write_questions(tmp_path / f"{i}.jsonl", 3, seed=i)) for i in range(3)]
    train = [SourceConfig(files[0], weight=1), SourceConfig(files[1])]
    with pytest.raises(DatasetError, match="Some train sources have a weight"):
        check_run(SupportDataModule(train=train, val_file=files[2]), episode=1, budget=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"precision": "bf16-true"}, "give bf16-mixed"),
        ({"precision": "16-true"}, "give 16-mixed"),
        ({"limit_val_batches": 0}, "leaves no validation"),
    ],
)
def test_options_of_the_trainer(option: dict[str, Any], message: str) -> None:
    usual = {"precision": "bf16-mixed", "limit_val_batches": None}
    check_trainer(SimpleNamespace(**usual))
    with pytest.raises(ConfigError, match=message):
        check_trainer(SimpleNamespace(**{**usual, **option}))


def test_at_least_one_validation_takes_place() -> None:
    check_interval(0.1, 5)
    check_interval(5, 5)
    with pytest.raises(ConfigError, match="6 is more than the 5 updates"):
        check_interval(6, 5)
    for never in (0, -1, 0.0):
        with pytest.raises(ConfigError, match="give a number of updates from 1"):
            check_interval(never, 5)
