"""Plots of the benchmarks: accuracy over context length, stopping, Q over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

# for each name the value at each number of tokens
Lines = Mapping[str, Mapping[int, float]]

_STOPS = {"stop_early": "too early", "stop_perfect": "at the right step", "stop_late": "too late"}


_COLUMNS = 4


def panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def save(figure: Figure, json: Path, what: str) -> Path:
    """Write a picture beside the figures."""
    file = json.with_name(f"{json.stem}_{what}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file


def over_length(tables: Mapping[str, Lines], json: Path) -> Path | None:
    """A panel for each measure, a line for each name: over the number of tokens, on a log axis.

    ``None``: of a single length there is nothing to draw.
    """
    if len({tokens for lines in tables.values() for one in lines.values() for tokens in one}) < 2:
        return None
    figure, axes = panels(len(tables))
    for axis, (measure, lines) in zip(axes, tables.items(), strict=True):
        lengths = sorted({tokens for points in lines.values() for tokens in points})
        for name, points in lines.items():
            tokens, values = zip(*sorted(points.items()), strict=True)
            axis.plot(tokens, values, marker="o", markersize=4, label=name)
        axis.set(xscale="log", xlabel="context length in tokens", ylabel=measure, ylim=(0, 1.03))
        axis.set_xticks(lengths, [short(tokens) for tokens in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    return save(figure, json, "length")


def stops(tables: Mapping[str, Sequence[Mapping[str, float]]], json: Path) -> Path:
    """Shares of early, perfect and late stops over the threshold (paper App. B)."""
    figure, axes = panels(len(tables))
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        thresholds = [row["q_threshold"] for row in rows]
        for key, label in _STOPS.items():
            axis.plot(thresholds, [row[key] for row in rows], label=label)
        axis.plot(thresholds, [row["fact_f1"] for row in rows], "k:", label="Fact-F1")
        axis.set_title(name.replace("; ", "\n"), fontsize="medium")
        axis.set(xlabel="threshold of Q", ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return save(figure, json, "stopping")


def q_values(tables: Mapping[str, Sequence[Mapping[str, Any]]], json: Path) -> Path:
    """Mean Q of the chunk taken at each step, before and after all support was found."""
    figure, axes = panels(len(tables))
    labels = {"missing": "support still missing", "complete": "all support found before"}
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        for key, label in labels.items():
            points = [(row["step"], row[key]) for row in rows if row[key] is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axis.plot(steps, values, marker="o", markersize=4, label=label)
        axis.set_title(name.replace("; ", "\n"), fontsize="medium")
        axis.set(xlabel="step", ylabel="mean Q of the chunk taken")
        axis.set_xticks([row["step"] for row in rows])
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return save(figure, json, "q_values")


def short(tokens: int) -> str:
    """128000 → 128K, 1000000 → 1M; powers of two are counted in 1,024: 131072 → 128K."""
    unit = 1000 if tokens & (tokens - 1) else 1024
    for power, letter in ((2, "M"), (1, "K")):
        if tokens % unit**power == 0:
            return f"{tokens // unit**power}{letter}"
    return str(tokens)
