"""The curves of a run as a picture."""

from __future__ import annotations

import contextlib
import csv
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from qrag_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = {
    "return": ("return", "val/return"),
    "Fact-EM": ("fact_em", "val/fact_em"),
    "Fact-F1": ("fact_f1", "val/fact_f1"),
    "loss": ("loss",),
    "temperature α": ("alpha",),
}
_LOG_SCALE = ("loss", "temperature α")

Curve = list[tuple[int, float]]


def read_curves(logs: Path) -> dict[str, Curve]:
    """All that a run logged, also in several goes: pairs of update and value by name.

    A resumed run logs to a file of its own and may repeat updates after its checkpoint; the later
    file counts.

    Args:
        logs: Folder with ``version_0/metrics.csv`` and so on.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    files = sorted(logs.glob("version_*/metrics.csv"), key=lambda f: int(f.parent.name[8:]))
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                with contextlib.suppress(TypeError, ValueError):  # a line that was cut short
                    step = int(row["step"])
                    for name, value in row.items():
                        if value and name not in ("step", "epoch"):
                            values[name][step] = float(value)
    return {name: sorted(points.items()) for name, points in values.items()}


def plot_curves(logs: Path, picture: Path) -> None:
    """Draw return, Fact-EM, Fact-F1, loss and α over updates.

    Args:
        logs: Folder of the logs.
        picture: The PNG to write.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError.of("Drawing curves", "matplotlib", "train") from error
    curves = read_curves(logs)
    figure = Figure(figsize=(4 * len(_PANELS), 3), layout="constrained")
    axes: list[Axes] = figure.subplots(1, len(_PANELS))
    for axis, (title, names) in zip(axes, _PANELS.items(), strict=True):
        for name in names:
            points = curves.get(name, [])
            label, marker = ("validation", "o") if name.startswith("val/") else ("training", "")
            updates, values = zip(*points, strict=True) if points else ((), ())
            axis.plot(updates, values, label=label, marker=marker, markersize=3)
        axis.set(title=title, xlabel="update")
        if title in _LOG_SCALE:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    figure.savefig(picture, dpi=120)
