"""A trajectory as text, HTML, plain values and a plot."""

from __future__ import annotations

import html.parser
import io
import json
import math
import sys

import numpy as np
import pytest

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import InvalidInputError, MissingDependencyError
from qrag_retriever.trajectory import RunnerUp, Step, Trajectory

pytest.importorskip("matplotlib").use("Agg")

SCRIPT = "<script>alert('x')</script> & \"more\""


def step(number, index, text="Some text.", q_value=0.5, **changes):
    chunk = Chunk(changes.pop("id", f"id-{index}"), text, {"page": index})
    return Step(number, chunk, index, q_value, position=2.0 * index, **changes)


def draw(figure):
    figure.savefig(io.BytesIO(), format="png")


def q_values(*rows):
    return tuple(np.array(row, dtype=np.float32) for row in rows)


@pytest.fixture
def trajectory():
    steps = (
        step(1, 2, "First the dog.", 0.75, runners_up=(RunnerUp("id-0", 0, 0.25),)),
        step(2, 0, "Then\n the   cat.", -0.5),
    )
    kept = q_values([0.25, 0.0, 0.75], [-0.5, -1.0, -np.inf])
    return Trajectory("Who barked?", steps, "budget", 3, kept)


def test_length_and_iteration(trajectory):
    assert len(trajectory) == 2
    assert tuple(trajectory) == trajectory.steps
    assert trajectory.chunk_ids == ["id-2", "id-0"]
    first = trajectory.steps[0]
    assert (first.chunk_id, first.text, first.metadata) == ("id-2", "First the dog.", {"page": 2})


def test_equality_leaves_out_what_was_only_kept(trajectory):
    other = Trajectory(trajectory.query, trajectory.steps, "budget", 3)
    assert other == trajectory
    assert hash(other) == hash(trajectory)
    assert Trajectory("Who else?", trajectory.steps, "budget", 3) != trajectory


def test_table(trajectory, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert str(trajectory).splitlines() == [
        "Query: Who barked?",
        "step        Q       ρ    chunk  text",
        "   1    0.750    4.00        2  First the dog.",
        "   2   -0.500    0.00        0  Then the cat.",
        "2 chunks of 3; stopped because the budget was used up.",
    ]


def test_a_long_text_is_cut_to_three_lines_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(Trajectory("q", (step(1, 0, "word " * 200),), "threshold", 1)).splitlines()
    assert len(lines) == 2 + 3 + 1
    assert max(map(len, lines[2:5])) <= 60
    assert lines[4].endswith("…")
    assert lines[-1] == "1 chunk of 1; stopped because the best Q fell below the threshold."


@pytest.mark.parametrize("text", ["", " \n", "x" * 500])
def test_texts_without_words_or_spaces(text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    shown = Trajectory("q", (step(1, 0, text),), "exhausted", 1_234_567)
    assert str(shown).endswith("1 chunk of 1,234,567; stopped because no candidate was left.")
    assert shown._repr_html_()
    shown = Trajectory("q", shown.steps, "exhausted", 1, q_values([0.5]))
    draw(shown.plot())


def test_an_empty_trajectory_shows_itself():
    nothing = Trajectory("q", (), "threshold", 5)
    assert "0 chunks of 5" in str(nothing)
    assert "0 chunks of 5" in nothing._repr_html_()
    assert nothing.to_dict()["steps"] == []


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.titles = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text.append(data)


def test_candidates_that_nobody_counted():
    shown = str(Trajectory("q", (step(1, -1),), "threshold", None))
    assert shown.endswith("1 chunk; stopped because the best Q fell below the threshold.")


def test_html_shows_texts_and_never_runs_them():
    steps = (step(1, 0, SCRIPT, id=SCRIPT, runners_up=(RunnerUp(SCRIPT, 1, 0.25),)),)
    page = Tags()
    page.feed(Trajectory(SCRIPT, steps, "budget", 2)._repr_html_())
    assert set(page.tags) <= {"p", "b", "table", "thead", "tbody", "tr", "th", "td", "br"}
    assert page.text.count(SCRIPT) == 2  # the query and the chunk
    assert page.titles == [SCRIPT]
    assert "1 (0.250)" in page.text


def test_plain_values_survive_json(trajectory):
    plain = trajectory.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain == {
        "query": "Who barked?",
        "stopped": "budget",
        "n_candidates": 3,
        "steps": [
            {
                "step": 1,
                "chunk_id": "id-2",
                "index": 2,
                "text": "First the dog.",
                "metadata": {"page": 2},
                "q_value": 0.75,
                "position": 4.0,
                "runners_up": [{"chunk_id": "id-0", "index": 0, "q_value": 0.25}],
            },
            {
                "step": 2,
                "chunk_id": "id-0",
                "index": 0,
                "text": "Then\n the   cat.",
                "metadata": {"page": 0},
                "q_value": -0.5,
                "position": 0.0,
                "runners_up": [],
            },
        ],
    }


def test_writing_into_the_plain_values_changes_no_chunk(trajectory):
    trajectory.to_dict()["steps"][0]["metadata"]["page"] = "other"
    assert trajectory.steps[0].metadata == {"page": 2}


def test_one_panel_a_step(trajectory):
    figure = trajectory.plot(width=8.0)
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[0, 0.25], [1, 0], [2, 0.75]])
    np.testing.assert_array_equal(second.lines[0].get_xydata(), [[0, -0.5], [1, -1]])
    assert first.get_title(loc="left") == "1. First the dog."
    assert second.get_title(loc="left") == "2. Then the cat."
    assert figure.get_size_inches()[0] == 8.0
    draw(figure)


def test_chunks_taken_from_one_state_share_a_panel():
    steps = (step(1, 0), step(1, 2), step(2, 1))
    kept = q_values([0.5, 0.1, 0.5], [-np.inf, 0.5, -np.inf])
    figure = Trajectory("q", steps, "budget", 3, kept).plot()
    assert len(figure.axes) == 2


def test_a_filtered_search_is_drawn_where_its_chunks_lie():
    candidates = np.array([4, 7, 9])
    steps = (step(1, 7),)
    shown = Trajectory("q", steps, "budget", 3, q_values([0.1, 0.5, 0.2]), candidates)
    [axis] = shown.plot().axes
    assert axis.lines[0].get_xdata().tolist() == [4, 7, 9]


def test_a_long_document_is_drawn_by_the_highest_q_of_each_stretch():
    values = np.random.default_rng(0).normal(size=10_001).astype(np.float32)
    values[:100] = -np.inf
    steps = (step(1, int(values.argmax()), q_value=float(values.max())),)
    [axis] = Trajectory("q", steps, "budget", len(values), (values,)).plot(bins=500).axes
    places, heights = axis.lines[0].get_data()
    assert len(places) <= 500
    assert np.all(np.diff(places) > 0)
    np.testing.assert_array_equal(heights, values[places])
    assert heights.max() == values.max()
    assert np.isfinite(heights).all()


@pytest.mark.parametrize("text", ["costs $5_{ or $6", "100 % \\alpha {", "<b>&", "日本語"])
@pytest.mark.filterwarnings("ignore:Glyph")  # not every font has them all
def test_signs_that_mean_something_elsewhere_are_drawn_as_they_are(text):
    shown = Trajectory(text, (step(1, 0, text),), "budget", 1, q_values([0.5]))
    draw(shown.plot())


@pytest.mark.parametrize("kept", [(), q_values([0.5])])
def test_nothing_to_draw_is_an_error_that_says_what_to_do(kept):
    steps = () if kept else (step(1, 0),)
    reason = r"\(stopped: threshold\).*a lower q_threshold" if kept else "keep_q_values=True"
    with pytest.raises(InvalidInputError, match=reason):
        Trajectory("q", steps, "threshold", 1, kept).plot()


def test_a_terminal_is_told_nothing_by_a_text():
    text = "red\x1b[31m \x07bell \u202eturned ไทย नमस्\u200dते"
    shown = str(Trajectory(text, (step(1, 0, text),), "budget", 1, ()))
    assert not any(sign in shown for sign in "\x1b\x07\u202e")
    assert shown.count("red\ufffd[31m \ufffdbell \ufffdturned ไทย नमस्\u200dते") == 2


def test_a_picture_has_a_size(trajectory):
    for wrong in ({"bins": 0}, {"bins": 2.5}, {"width": 0}, {"width": -1}):
        with pytest.raises(InvalidInputError, match="give a width above 0"):
            trajectory.plot(**wrong)
    trajectory.plot(width=0.5, bins=1)


def test_drawing_without_matplotlib_names_the_extra(trajectory, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"qrag-retriever\[plot\]"):
        trajectory.plot()


def test_search_keeps_what_the_plot_needs():
    from corpus import QUERY, make_index, shared_model

    from qrag_retriever.engine import MultiStepRetriever
    from qrag_retriever.search import SearchOptions

    engine = MultiStepRetriever(shared_model(), make_index())
    options = SearchOptions(k=5, chunks_per_step=2)
    kept = engine.search(QUERY, options, keep_q_values=True)
    assert len(kept.plot().axes) == 3
    assert json.loads(json.dumps(kept.to_dict())) == kept.to_dict()
    assert all(math.isfinite(step.q_value) for step in kept)
    with pytest.raises(InvalidInputError, match="keep_q_values"):
        engine.search(QUERY, options).plot()
