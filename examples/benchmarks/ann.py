"""Approximate beside exact search, for models without positions: what it finds, and how fast.

    python examples/benchmarks/ann.py --json examples/benchmarks/results/ann.json

Recall@1 is the share of queries whose best chunk is found. The vectors are made up: like those of
sentences they vary mostly in a few directions and lie in clusters, and a query lies near a chunk.
What the figures are for your own, ``--embeddings FILE.npy`` tells; its last rows are the queries.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from machine import parse_run, report, take_turns

from qrag_retriever.ann import AnnIndex, AnnKind
from qrag_retriever.positions import PositionScheme
from qrag_retriever.scoring import score
from qrag_retriever.vectors import StorageType, StoredVectors

_DIRECTIONS, _CLUSTER = 48, 200  # of the made-up vectors; chunks of a cluster
_AT_ONCE = 50_000


def main() -> None:
    options = parse()
    random = np.random.default_rng(options.seed)
    if options.embeddings:
        vectors = np.load(options.embeddings).astype(np.float32)
        vectors, queries = np.split(vectors, [len(vectors) - options.queries])
    else:
        vectors, queries = make(options.chunks, options.dimension, options.queries, random)
    rows = []
    for dtype in options.types:
        stored = StoredVectors.of(vectors, dtype)
        exact = [best(stored, query) for query in queries]
        for kind in options.kinds:
            row = {"type": dtype, "kind": kind, **measure(stored, queries, exact, kind, options)}
            print(*(f"{key}: {value}" for key, value in row.items()), sep="  ", flush=True)
            rows.append(row)
    if options.json:
        report(
            options.json,
            options.seed,
            vectors=str(options.embeddings or "made up"),
            chunks=vectors.shape[0],
            dimension=vectors.shape[1],
            queries=len(queries),
            repetitions=options.repetitions,
            figures=rows,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [kind for kind in get_args(AnnKind) if kind != "none"]
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--embeddings", type=Path, help="an array of your own, [N, d]")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--kinds", nargs="+", default=["hnsw", "ivfpq"], choices=kinds)
    parser.add_argument("--types", nargs="+", default=["float32"], choices=get_args(StorageType))
    return parse_run(parser, repetitions=5)


def make(
    chunks: int, dimension: int, queries: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1 in clusters, and queries near some of them."""
    few = min(_DIRECTIONS, dimension)
    directions = random.standard_normal((few, dimension), dtype=np.float32) / few**0.5
    centres = random.standard_normal((chunks // _CLUSTER + 1, few), dtype=np.float32)

    def unit(inner: np.ndarray, noise: float) -> np.ndarray:
        outer = random.standard_normal((len(inner), dimension), dtype=np.float32)
        vectors = inner @ directions + noise * outer
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    vectors = np.empty((chunks, dimension), dtype=np.float32)
    for first in range(0, chunks, _AT_ONCE):
        count = min(_AT_ONCE, chunks - first)
        inside = random.standard_normal((count, few), dtype=np.float32)
        of = centres[random.integers(len(centres), size=count)]
        vectors[first : first + count] = unit(of + 0.7 * inside, 0.2)
    near = vectors[random.choice(chunks, queries)]
    noise = random.standard_normal(near.shape, dtype=np.float32) / dimension**0.5
    near = near + 0.5 * noise
    return vectors, near / np.linalg.norm(near, axis=1, keepdims=True)


def best(stored: StoredVectors, query: np.ndarray) -> int:
    """The chunk of largest Q."""
    scheme = PositionScheme("none")
    return int(score(torch.from_numpy(query[None]), stored.tensor(), [[]], scheme).argmax())


def measure(
    stored: StoredVectors,
    queries: np.ndarray,
    exact: list[int],
    kind: Any,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Build one kind of index, compare what it finds, and time both ways in turns."""
    start = time.perf_counter()
    index = AnnIndex(stored, kind)
    built = time.perf_counter() - start
    found = index.search(queries, 1)[:, 0]
    timed = queries[:20]
    seconds = take_turns(
        {
            "exact": lambda: [best(stored, query) for query in timed],
            "approximate": lambda: [index.search(query[None], 1) for query in timed],
        },
        options.repetitions,
    )
    kept = index.to_bytes()
    return {
        "recall_at_1": round(float(np.mean(found == exact)), 4),
        "build_seconds": round(built, 1),
        "index_bytes": 0 if kept is None else int(kept.nbytes),
        "embedding_bytes": int(stored.values.nbytes),
        "exact_milliseconds": round(1e3 * seconds["exact"] / len(timed), 3),
        "approximate_milliseconds": round(1e3 * seconds["approximate"] / len(timed), 3),
        "times_faster": round(seconds["exact"] / seconds["approximate"], 1),
    }


if __name__ == "__main__":
    main()
