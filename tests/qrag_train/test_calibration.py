from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Colours, tiny_model

from qrag_retriever import QRAGModel, SearchOptions
from qrag_retriever.errors import InvalidInputError, ModelFormatError
from qrag_retriever.search import Beam, Pick
from qrag_train.calibration import (
    Calibration,
    choose_threshold,
    judge_thresholds,
    search_thresholds,
    write_threshold,
)
from qrag_train.evaluation import evaluate, search_samples, steps_above
from qrag_train.metrics import fact_scores

SAMPLES = [Colours(support=2).sample(np.random.default_rng(i)) for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QRAGModel:
    return tiny_model(tmp_path_factory.mktemp("encoder"), "relative", scale=0.2)


@functools.cache  # one of its searches for each threshold there is takes seconds
def brute_force(model: QRAGModel, k: int) -> list[dict[str, float]]:
    """Every threshold that could make a difference, by searching again with each."""
    beams = search_samples(model, SAMPLES, SearchOptions(k))
    values = sorted({pick.q_value for beam in beams for pick in beam.picks}, reverse=True)
    return [evaluate(model, SAMPLES, SearchOptions(k, q_threshold=value)) for value in values]


def test_the_best_f1_equals_brute_force(model: QRAGModel) -> None:
    chosen = choose_threshold(search_thresholds(model, SAMPLES, k=4))
    runs = brute_force(model, 4)
    assert chosen.fact_f1 == pytest.approx(max(run["fact_f1"] for run in runs))
    again = evaluate(model, SAMPLES, SearchOptions(4, q_threshold=chosen.q_threshold))
    for name in ("fact_em", "fact_f1", "steps"):
        assert getattr(chosen, name) == pytest.approx(again[name])


@pytest.mark.parametrize("target", [0.1, 0.5, 1.0])
def test_a_target_is_reached_with_the_fewest_steps(model: QRAGModel, target: float) -> None:
    chosen = choose_threshold(search_thresholds(model, SAMPLES, k=6), target)
    enough = [run["steps"] for run in brute_force(model, 6) if run["fact_em"] >= target]
    assert chosen.fact_em >= target
    assert chosen.steps == pytest.approx(min(enough))
    again = evaluate(model, SAMPLES, SearchOptions(6, q_threshold=chosen.q_threshold))
    assert again["fact_em"] == pytest.approx(chosen.fact_em)


def test_a_target_out_of_reach_is_told(model: QRAGModel) -> None:
    table = search_thresholds(model, SAMPLES, k=1)
    for nothing in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidInputError, match=f"target_em={nothing} is not allowed"):
            choose_threshold(table, nothing)
    with pytest.raises(InvalidInputError, match=r"target_em=1.0 is not reached: the whole"):
        choose_threshold(table, 1.0)


q_values = st.sampled_from([-0.25, 0.0, 0.1, 0.5, np.float32(0.1) + np.float32(1e-8), 1.0, 2.0])
trajectories = st.lists(
    st.tuples(st.lists(q_values, min_size=1, max_size=5), st.sets(st.integers(0, 6), min_size=1)),
    min_size=1,
    max_size=6,
)


@given(trajectories)
def test_all_thresholds_are_judged_as_one_by_one(
    drawn: list[tuple[list[float], set[int]]],
) -> None:
    beams = [
        Beam(tuple(Pick(i + 1, i, float(np.float32(q)), ()) for i, q in enumerate(values)))
        for values, _ in drawn
    ]
    supports = [sorted(support) for _, support in drawn]
    table = judge_thresholds(beams, supports)
    assert np.all(np.diff(table.values) < 0)
    for row, threshold in enumerate(table.values):
        found = [beam.retrieved[: steps_above(beam, threshold)] for beam in beams]
        scores = [fact_scores(f, s) for f, s in zip(found, supports, strict=True)]
        assert table.fact_em[row] == pytest.approx(np.mean([score.em for score in scores]))
        assert table.fact_f1[row] == pytest.approx(np.mean([score.f1 for score in scores]))
        assert table.steps[row] == pytest.approx(np.mean([len(f) for f in found]))
    # no other threshold leads elsewhere, but for those that retrieve nothing
    everything = {pick.q_value for beam in beams for pick in beam.picks}
    reached = {sum(steps_above(beam, value) for beam in beams) for value in everything}
    assert reached - {0} <= {round(steps * len(beams)) for steps in table.steps}


def test_the_threshold_is_written_and_nothing_else(model: QRAGModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "model")
    others = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    config = folder / "qrag_config.json"
    before = json.loads(others.pop(config))
    card = others.pop(folder / "README.md")
    write_threshold(folder, Calibration(0.25, 0.9, 0.8, 2.5), max_steps=5)
    figures = {"q_threshold": 0.25, "fact_em": 0.9, "fact_f1": 0.8, "steps": 2.5}
    changes = {"q_threshold": 0.25, "max_steps": 5, "training": {"calibration": figures}}
    assert json.loads(config.read_text()) == {**before, **changes}
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != config}
    # the card names the settings
    now = QRAGModel.from_pretrained(folder)
    assert now.config.q_threshold == 0.25
    assert after.pop(folder / "README.md") != card
    assert after == others
    again = now.save_pretrained(tmp_path / "again" / "model")
    assert (again / "README.md").read_bytes() == (folder / "README.md").read_bytes()


def test_a_model_in_compact_form_loads_after_its_threshold_was_written(
    model: QRAGModel, tmp_path: Path
) -> None:
    link, folder = tmp_path / "link", model.save_pretrained(tmp_path / "small", compact=True)
    link.symlink_to(folder)
    write_threshold(link, Calibration(0.25, 0.9, 0.8, 2.5), max_steps=5)
    assert QRAGModel.from_pretrained(folder).config.q_threshold == 0.25
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "small"}


def test_a_threshold_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="no folder of a Q-RAG model"):
        write_threshold(tmp_path, Calibration(0.25, 0.9, 0.8, 2.5), max_steps=5)


def test_of_equal_f1_the_fewest_steps_and_a_value_between() -> None:
    q = (0.75, 0.5, 0.25, 0.125, 0.0, -0.5, -1.0)
    beam, support = Beam(tuple(Pick(i + 1, i, q[i], ()) for i in range(7))), [0, 6, 97, 98, 99]
    table = judge_thresholds([beam], [support])
    assert table.values.tolist() == [0.625, 0.375, 0.1875, 0.0625, -0.25, -0.75, -1.0]
    # 2·1/(1 + 5) after one step, 2·2/(7 + 5) after seven
    assert table.fact_f1[0] == pytest.approx(table.fact_f1[6])
    assert choose_threshold(table) == pytest.approx((0.625, 0.0, 1 / 3, 1.0))
