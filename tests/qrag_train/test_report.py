from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Colours, tiny_model

from qrag_retriever.errors import InvalidInputError
from qrag_train.report import markdown, reports, untrained

SAMPLES = [Colours(support=2).sample(np.random.default_rng(i)) for i in range(4)]


def test_a_model_beside_what_it_was_trained_from(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "relative", scale=0.2)
    start = {"encoder": str(tmp_path / "encoder"), "scratch": None, "settings": {"scale": 0.2}}
    model.config = model.config.replace(training={"settings": {"model": start}}, q_threshold=0.5)
    rows = list(reports(model, SAMPLES, 3, baselines=True))
    assert [row.pop("retrieval") for row in rows] == [
        "3 steps",
        "at most 3 steps, until Q < 0.500",
        "the best 3 of one step",
        "before training, 3 steps",
        "before training, the best 3 of one step",
    ]
    # this one was not trained at all
    assert rows[3] == rows[0]
    assert rows[4] == rows[2]


def test_a_budget_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="k=0"):
        next(reports(tiny_model(tmp_path), SAMPLES, 0))


@pytest.mark.parametrize("scratch", [{"layers": 1}, None])
def test_what_nothing_is_known_of_is_left_out(tmp_path: Path, scratch: object) -> None:
    model = tiny_model(tmp_path / "encoder", "none")
    training = {"settings": {"model": {"scratch": scratch}}} if scratch else {}
    model.config = model.config.replace(training=training)
    assert len(list(reports(model, SAMPLES, baselines=True))) == 2


def test_a_start_that_is_gone_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "none")
    start = {"encoder": str(tmp_path / "gone" / "model"), "scratch": None, "settings": None}
    model.config = model.config.replace(training={"settings": {"model": start}})
    with pytest.warns(UserWarning, match="trained from is left out: .*gone"):
        rows = list(reports(model, SAMPLES, 3, baselines=True))
    assert [row["retrieval"] for row in rows] == ["3 steps", "the best 3 of one step"]


def test_a_packaged_model_that_went_on_from_itself_is_no_start(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "encoder", "none")
    before = tiny_model(tmp_path / "encoder", "none")
    start = {"encoder": str(before.save_pretrained(tmp_path / "model")), "scratch": None}
    training = {"settings": {"model": start | {"settings": {"max_chunk_tokens": 9}}}}
    model.config = model.config.replace(training=training)
    with pytest.warns(UserWarning, match="is a name of the model itself"):
        assert untrained(model) is None
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    found = untrained(model)
    assert found is not None
    assert found.config.max_chunk_tokens == 9
    assert torch.equal(next(found.parameters()), next(before.parameters()))


def test_a_plan_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "none")
    rows = list(reports(model, SAMPLES, 3, 0.5, beams=2))
    assert [row["retrieval"] for row in rows] == [
        "3 steps, 2 beams",
        "at most 3 steps, 2 beams, until Q < 0.500",
    ]


def test_a_table_has_the_columns_that_are_used() -> None:
    rows = [{"retrieval": "a", "fact_em": 0.5}, {"retrieval": "b", "fact_em": 1.0, "stop_late": 0}]
    assert markdown(rows).splitlines() == [
        "| retrieval | Fact-EM | late |",
        "| --- | --- | --- |",
        "| a | 0.500 |  |",
        "| b | 1.000 | 0 |",
    ]
