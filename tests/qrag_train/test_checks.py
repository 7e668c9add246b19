from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import pytest
from tiny import write_questions

from qrag_retriever.errors import ConfigError, DatasetError
from qrag_train.checks import check_interval, check_run, check_same_config, check_samples
from qrag_train.data.datamodule import SupportDataModule
from qrag_train.data.sample import SupportSample
from qrag_train.data.source import SourceConfig

GOOD = SupportSample("1", "Where?", ("a", "b", "c"), (0, 2))


def test_good_data_passes(tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.jsonl", 5, seed=1)
    val = write_questions(tmp_path / "val.jsonl", 5, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(SupportDataModule(str(train), str(val)), budget=1)


@pytest.mark.parametrize("copied", [False, True])
def test_training_on_the_validation_data_is_told(tmp_path: Path, copied: bool) -> None:
    train = write_questions(tmp_path / "train.jsonl", 5)
    val = tmp_path / "val.jsonl" if copied else train
    if copied:
        shutil.copy(train, val)
    with pytest.warns(UserWarning, match="both training and validation"):
        check_run(SupportDataModule(str(train), str(val)), budget=1)


@pytest.mark.parametrize("given", [{"train_file": "x"}, {"val_file": "x"}])
def test_both_parts_are_needed(tmp_path: Path, given: dict[str, str]) -> None:
    file = write_questions(tmp_path / "x.jsonl", 3)
    data = SupportDataModule(**dict.fromkeys(given, str(file)))
    with pytest.raises(DatasetError, match=r"There is no (train|val) data; give --data"):
        check_run(data, budget=1)


def test_ids_differ(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data.json .*\n  question 2 \(1\): has the id"):
        check_samples("data.json", [GOOD, GOOD], budget=2)
    check_samples("stories", [GOOD, GOOD], budget=2, unique=False)


def test_chunks_have_text() -> None:
    empty = dataclasses.replace(GOOD, id="2", chunks=("a", " \n", "c"))
    with pytest.raises(DatasetError, match=r"question 2 \(2\): chunk 1 is empty"):
        check_samples("data.json", [GOOD, empty], budget=2)


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
        check_run(SupportDataModule(train=train, val_file=files[2]), budget=1)


def test_at_least_one_validation_takes_place() -> None:
    check_interval(0.1, 5)
    check_interval(5, 5)
    with pytest.raises(ConfigError, match="6 is more than the 5 updates"):
        check_interval(6, 5)
