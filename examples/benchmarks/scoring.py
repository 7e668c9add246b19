"""What one retrieval step costs beside a bare scan, ``matrix @ vector``, of the same matrix.

    python examples/benchmarks/scoring.py --json examples/benchmarks/results/scoring.json
    python examples/benchmarks/scoring.py --types float32 bfloat16 int8 --json FILE

The step is a greedy one, which finds the best chunks; the length of the longest embedding, which an
index reads once, is known. The bare scan is that of the float32 matrix, for all storage types.
Time: every case and the bare scan take turns, and medians are compared. Memory: the process's peak
resident size (VmHWM, reset through /proc/self/clear_refs, so on Linux only) during the case's first
call on the whole matrix, less its resident size before; result and all temporaries count.
"""

from __future__ import annotations

import argparse
import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch
from machine import parse_run, report, take_turns

from qrag_retriever import SearchOptions
from qrag_retriever.positions import PositionScheme
from qrag_retriever.scoring import score_best
from qrag_retriever.vectors import StorageType, StoredVectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from qrag_retriever.q_values import QValues

SCHEMES = {
    "truncated": PositionScheme("relative", truncate=True),
    "continuous": PositionScheme("relative"),
    "absolute": PositionScheme("absolute"),
    "none": PositionScheme("none"),
}


_FEW = 20_000  # enough for a rough scan
# The best chunks that a greedy step looks at, for it reports the next best ones too.
_BREADTH = SearchOptions(k=1).breadth


class Case(NamedTuple):
    """One way to call ``score_best``."""

    type: str
    positions: str
    states: int
    retrieved: int


def main() -> None:
    """Measure, print a table, and write the figures to a file if asked to."""
    options = parse()
    torch.manual_seed(options.seed)
    matrix = torch.randn(options.chunks, options.dimension)
    stored = {name: StoredVectors.of(matrix.numpy(), name) for name in options.types}
    for vectors in stored.values():
        print(f"{vectors.dtype}: no embedding is longer than {vectors.longest():.2f}")
    cases = [
        Case(name, positions, states, retrieved)
        for name in options.types
        for positions in options.positions
        for states in options.states
        for retrieved in (options.retrieved if SCHEMES[positions].mode == "relative" else [0])
    ]
    calls = {case: step(case, stored[case.type], options.seed) for case in cases}
    for case in cases:  # what only the first call of all takes is no part of a step
        step(case, stored[case.type].take(slice(_FEW)), options.seed)()
    memory = {case: peak(call, size(stored[case.type])) for case, call in calls.items()}
    vector = torch.randn(options.dimension)
    times = take_turns({None: lambda: matrix @ vector, **calls}, options.repetitions)
    bare = times.pop(None)
    figures = [
        {
            **case._asdict(),
            "milliseconds": round(1e3 * seconds, 2),
            "times_bare_scan": round(seconds / bare, 3),
            "peak_share_of_matrix": memory[case],
        }
        for case, seconds in times.items()
    ]
    show(figures, bare, matrix)
    if options.json:
        report(
            options.json,
            options.seed,
            matrix={"chunks": options.chunks, "dimension": options.dimension},
            repetitions=options.repetitions,
            bare_scan_milliseconds=round(1e3 * bare, 2),
            figures=figures,
        )


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=400_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--types", nargs="+", default=["float32"], choices=get_args(StorageType))
    parser.add_argument("--positions", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--states", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--retrieved", type=int, nargs="+", default=list(range(7)))
    return parse_run(parser, repetitions=11)


def step(case: Case, stored: StoredVectors, seed: int) -> Callable[[], list[QValues]]:
    """A call that finds the best chunks of the whole matrix once."""
    random = np.random.default_rng(seed)
    states = torch.randn(case.states, stored.shape[1])
    retrieved = [
        random.choice(len(stored), case.retrieved, replace=False).tolist()
        for _ in range(case.states)
    ]
    matrix, longest, scheme = stored.tensor(), stored.longest, SCHEMES[case.positions]
    return lambda: score_best(states, matrix, retrieved, scheme, _BREADTH, longest=longest)


def size(stored: StoredVectors) -> int:
    """Bytes of a matrix as it is stored."""
    return stored.values.nbytes + (0 if stored.scales is None else stored.scales.nbytes)


def peak(call: Callable[[], object], whole: int) -> float | None:
    """What a call adds to the peak resident size, as a share; ``None`` where it cannot be read."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not hide what is taken now
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return round((resident("VmHWM") - before) / whole, 4)


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def show(figures: list[dict[str, Any]], bare: float, matrix: torch.Tensor) -> None:
    """Print one line per case."""
    shape = " x ".join(f"{size:,}" for size in matrix.shape)
    print(f"bare scan of {shape} float32: {1e3 * bare:.1f} ms\n")
    print("type      positions   states  retrieved      ms  x bare  peak memory, % of stored")
    for row in figures:
        share = row["peak_share_of_matrix"]
        print(
            f"{row['type']:8}  {row['positions']:10}  {row['states']:6}  {row['retrieved']:9}  "
            f"{row['milliseconds']:6.1f}  {row['times_bare_scan']:6.2f}  "
            + ("-" if share is None else f"{100 * share:.1f}")
        )


if __name__ == "__main__":
    main()
