"""One relative step of this package beside the straightforward way, corpus size by corpus size.

    python examples/benchmarks/compare.py --json examples/benchmarks/results/compare.json

Straightforward is what the code released with the paper does: give every chunk its ρ, look up the
angles, rotate every chunk, multiply, mask what was taken, take the largest. Encoders are left out
on both sides, and so is the length of the longest embedding, which an index reads once. Both take
turns; medians are compared, and both must choose the same chunk.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
import torch
from machine import machine, parse_run, report, take_turns
from torch import Tensor

from qrag_retriever import SearchOptions
from qrag_retriever.positions import PositionScheme
from qrag_retriever.scoring import score_best
from qrag_retriever.vectors import StoredVectors

SCHEMES = {
    "truncated": PositionScheme("relative", step=20, span=18, endpoint=True, truncate=True),
    "continuous": PositionScheme("relative"),
}
# The best chunks that a greedy step looks at, for it reports the next best ones too.
_BREADTH = SearchOptions(k=1).breadth
# Positions that the released code has angles for.
_ANGLES = 1000


def main() -> None:
    options = parse()
    rows = []
    for dimension in options.dimensions:
        for chunks in options.chunks:
            row = compare(chunks, dimension, options)
            rows.append(row)
            show(row)
    if options.json:
        report(options.json, options.seed, repetitions=options.repetitions, figures=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1_000, 10_000, 100_000, 400_000])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--retrieved", type=int, default=3, help="chunks found before the step")
    return parse_run(parser, repetitions=5)


def compare(chunks: int, dimension: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time a step both ways."""
    torch.manual_seed(options.seed)
    actions, state = torch.randn(chunks, dimension), torch.randn(1, dimension)
    random = np.random.default_rng(options.seed)
    taken = sorted(random.choice(chunks, options.retrieved, replace=False).tolist())
    table = angles(dimension)

    longest = StoredVectors(actions.numpy()).longest
    longest()

    def step(scheme: PositionScheme) -> int:
        (q,) = score_best(state, actions, [taken], scheme, _BREADTH, longest=longest)
        return q.without(np.array(taken)).best(1)[0]

    calls = {
        "straightforward": lambda: straightforward(state[0], actions, taken, table),
        **{name: (lambda scheme=scheme: step(scheme)) for name, scheme in SCHEMES.items()},
    }
    if calls["straightforward"]() != calls["truncated"]():
        raise SystemExit(f"{chunks} x {dimension}: the two ways choose different chunks")
    seconds = take_turns(calls, options.repetitions)
    slow = seconds["straightforward"]
    return {
        "chunks": chunks,
        "dimension": dimension,
        "straightforward_milliseconds": round(1e3 * slow, 2),
        **{
            name: {"milliseconds": round(1e3 * seconds[name], 3), "faster": slow / seconds[name]}
            for name in SCHEMES
        },
    }


def angles(dimension: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions 0, 1, …, for each pair of a half, ``[positions, d/4]``."""
    half = dimension // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2) / half)
    phases = torch.arange(_ANGLES)[:, None] * frequencies
    return phases.cos(), phases.sin()


def straightforward(
    state: Tensor, actions: Tensor, taken: list[int], table: tuple[Tensor, Tensor]
) -> int:
    """Rotate everything, mask, argmax."""
    scheme = SCHEMES["truncated"]
    bounds = [0, *taken, len(actions)]
    rho = torch.empty(len(actions), dtype=torch.long)
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        inside = torch.linspace(0, scheme.span, last - first, dtype=torch.float64)
        rho[first:last] = (inside + number * scheme.step).float().long()
    cos, sin = table[0][rho], table[1][rho]
    rotated = []
    for part in actions.chunk(2, dim=1):
        even, odd = part[:, ::2], part[:, 1::2]
        rotated.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1))
    q = torch.cat([part.flatten(1) for part in rotated], dim=1) @ state
    available = torch.ones(len(actions), dtype=torch.bool)
    available[taken] = False
    return int(q.masked_fill(~available, -torch.inf).argmax())


def show(row: dict[str, Any]) -> None:
    threads = machine()["threads"]
    print(
        f"{row['chunks']:8,} x {row['dimension']}, {threads} thread(s): "
        f"straightforward {row['straightforward_milliseconds']:9.2f} ms",
        *(
            f"{name} {row[name]['milliseconds']:8.3f} ms ({row[name]['faster']:.0f} x faster)"
            for name in SCHEMES
        ),
        sep="   ",
    )


if __name__ == "__main__":
    main()
