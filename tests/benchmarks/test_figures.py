from __future__ import annotations

import bench
import figures
import pytest
from bench import Found


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        *((1_000, "1K"), (4_000, "4K"), (32_000, "32K"), (128_000, "128K"), (10**6, "1M")),
        *((4_096, "4K"), (131_072, "128K"), (1 << 20, "1M"), (10**7, "10M"), (1_250, "1250")),
    ],
)
def test_lengths_are_written_short(tokens, name):
    assert figures.short(tokens) == name


def found(retrieved: list[int], q_values: list[float]) -> Found:
    return Found("1", "?", "x", (), [4, 1], retrieved, q_values, [f"text {i}" for i in retrieved])


BOTH = [found([1, 4, 7], [0.9, 0.8, 0.1]), found([4, 2, 1], [0.7, 0.4, 0.3])]


def test_q_over_steps_by_hand():
    assert bench.q_over_steps(BOTH, 3) == [
        {"step": 1, "missing": 0.8, "complete": None, "share_complete": 0.0},
        {"step": 2, "missing": 0.6, "complete": None, "share_complete": 0.0},
        {"step": 3, "missing": 0.3, "complete": 0.1, "share_complete": 0.5},
    ]


def test_stopping_by_hand():
    table = {row["q_threshold"]: row for row in bench.stopping(BOTH, 3)}
    assert (min(table), max(table), len(table)) == (0.1, 0.9, 31)
    # both searches go on to the end, one step too far for the first
    lowest = table[0.1]
    assert (lowest["stop_late"], lowest["stop_perfect"], lowest["steps"]) == (0.5, 0.5, 3.0)
    # the first stops after two steps, the second before its last
    middle = next(row for value, row in table.items() if value > 0.3)
    assert (middle["stop_perfect"], middle["stop_early"], middle["steps"]) == (0.5, 0.5, 2.0)
    assert middle["fact_em"] == 0.5
    # the second takes nothing at all
    highest = table[0.9]
    assert (highest["stop_early"], highest["steps"], highest["fact_em"]) == (1.0, 0.5, 0.0)


def test_a_reader_gets_what_lies_above_the_threshold_in_document_order():
    assert BOTH[1].task(None).passages == ["text 1", "text 2", "text 4"]
    assert BOTH[1].task(0.35).passages == ["text 2", "text 4"]
    assert BOTH[1].task(0.9).passages == []


def test_many_panels_stand_in_rows(tmp_path):
    table = bench.stopping(BOTH, 3)
    file = figures.stops({f"set {i}; method": table for i in range(6)}, tmp_path / "x.json")
    assert file == tmp_path / "x_stopping.png"
    assert file.read_bytes().startswith(b"\x89PNG")
    lines = {"m": {1_000: 0.5, 128_000: 1.0}}
    assert figures.over_length({"Fact-EM": lines}, tmp_path / "x.json").exists()
    assert figures.over_length({"Fact-EM": {"m": {1_000: 0.5}}}, tmp_path / "y.json") is None
    assert not list(tmp_path.glob("y*"))
