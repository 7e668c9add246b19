"""Batches, beams and concurrent callers, and what a query costs besides its encoder passes.

    python examples/benchmarks/serving.py --json examples/benchmarks/results/serving.json

The chunks are made up and their embeddings random, since neither changes what a step costs. Each
figure is a ratio of medians within this run: batches and beams with the state encoder and without
it (its vectors ready made), as encoders differ more than corpora.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import parse_run, report, take_turns

from qrag_retriever import ChunkIndex, QRAGModel, QRAGRetriever

if TYPE_CHECKING:
    from collections.abc import Iterator

POSITIONS = {
    "none": {},
    "relative": {},
    "truncated": {"truncate_positions": True, "position_endpoint": True},
}


def main() -> None:
    options = parse()
    rows = [
        row
        for positions in options.positions
        for dtype in options.types
        for row in many_at_once(positions, dtype, options)
    ]
    rows += [encoder_alone(options), concurrent(options), encoding_share(options)]
    for row in rows:
        print(*(f"{name}: {value}" for name, value in row.items()), sep="  ")
    if options.json:
        report(options.json, options.seed, repetitions=options.repetitions, figures=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="an embedder; default: the offline one")
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--few-chunks", type=int, default=1000, help="where encoding is the floor")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--positions", nargs="+", default=list(POSITIONS), choices=list(POSITIONS))
    parser.add_argument("--types", nargs="+", default=["float32", "int8"])
    return parse_run(parser, repetitions=5)


def make(
    positions: str, dtype: Any, chunks: int, options: argparse.Namespace
) -> tuple[QRAGRetriever, list[str]]:
    """A retriever over made-up chunks, and queries."""
    settings: Any = POSITIONS[positions]
    mode: Any = "none" if positions == "none" else "relative"
    # with such an alpha no beam is ever dropped: the most that several cost
    model = QRAGModel.from_encoder(options.model, mode, alpha=1000.0, **settings)
    random = np.random.default_rng(options.seed)
    vectors = random.standard_normal((chunks, model.dimension), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"Sailor {number} hid his chest behind the old inn." for number in range(chunks)]
    index = ChunkIndex.from_embeddings(texts, vectors, model=model, dtype=dtype)
    queries = [f"Where did sailor {number} hide it?" for number in range(options.queries)]
    return QRAGRetriever(index=index, k=options.steps), queries


@contextlib.contextmanager
def ready_made(model: QRAGModel, seed: int) -> Iterator[None]:
    """State vectors that cost nothing, of length 1 as the encoder's."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((256, model.dimension), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode(states: Any) -> np.ndarray:
        return vectors[
            [zlib.crc32(f"{query} {len(chunks)}".encode()) % 256 for query, chunks in states]
        ]

    model.encode_states = encode  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.encode_states


def many_at_once(
    positions: str, dtype: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A batch beside its queries one by one, and four beams beside one."""
    retriever, queries = make(positions, dtype, options.chunks, options)
    calls = {
        "one by one": lambda: [retriever.invoke(query) for query in queries],
        "batch": lambda: retriever.batch(queries),
        "one beam": lambda: retriever.search_batch(queries[:1]),
        "four beams": lambda: retriever.search_batch(queries[:1], beams=4),
    }
    for encoder in (True, False):
        free = contextlib.nullcontext() if encoder else ready_made(retriever.model, options.seed)
        with free:
            seconds = take_turns(calls, options.repetitions)
        yield {
            "what": "batch and beams",
            "positions": positions,
            "type": dtype,
            "chunks": options.chunks,
            "queries": len(queries),
            "state_encoder": encoder,
            "queries_per_s_one_by_one": round(len(queries) / seconds["one by one"], 2),
            "queries_per_s_in_a_batch": round(len(queries) / seconds["batch"], 2),
            "batch_times_faster": round(seconds["one by one"] / seconds["batch"], 2),
            "four_beams_times_one": round(seconds["four beams"] / seconds["one beam"], 2),
        }


def encoder_alone(options: argparse.Namespace) -> dict[str, Any]:
    """The encoder passes of a batch beside those of its queries one by one: the most it saves."""
    retriever, queries = make("none", "float32", options.few_chunks, options)
    found = [step.chunk.text for step in retriever.search(queries[0])]
    steps = [[(query, found[:number]) for query in queries] for number in range(len(found))]
    encode = retriever.model.encode_states
    calls = {
        "one by one": lambda: [encode([state]) for states in steps for state in states],
        "batch": lambda: [encode(states) for states in steps],
    }
    seconds = take_turns(calls, options.repetitions)
    return {
        "what": "encoder passes of a batch",
        "queries": len(queries),
        "steps": len(steps),
        "batch_times_faster": round(seconds["one by one"] / seconds["batch"], 2),
    }


def concurrent(options: argparse.Namespace) -> dict[str, Any]:
    """Callers of ``ainvoke`` at the same time, beside the same ones after another."""
    retriever, queries = make("none", "float32", options.few_chunks, options)
    asked = [queries[number % len(queries)] for number in range(options.callers)]
    sizes: list[int] = []
    encode = retriever.model.encode_states

    def counted(states: Any) -> np.ndarray:
        sizes.append(len(states))
        return encode(states)

    async def together() -> None:
        await asyncio.gather(*map(retriever.ainvoke, asked))

    async def in_turn() -> None:
        for query in asked:
            await retriever.ainvoke(query)

    calls = {
        name: (lambda run=run: asyncio.run(run()))
        for name, run in (("together", together), ("in turn", in_turn))
    }
    seconds = take_turns(calls, options.repetitions)
    retriever.model.encode_states = counted  # type: ignore[method-assign, assignment]
    calls["together"]()
    return {
        "what": "concurrent ainvoke",
        "chunks": options.few_chunks,
        "callers": options.callers,
        "encoder_passes": len(sizes),
        "states": sum(sizes),
        "times_faster_than_in_turn": round(seconds["in turn"] / seconds["together"], 2),
    }


def encoding_share(options: argparse.Namespace) -> dict[str, Any]:
    """A query over few chunks beside nothing but its encoder passes."""
    retriever, queries = make("none", "float32", options.few_chunks, options)
    found = [step.chunk.text for step in retriever.search(queries[0])]
    states = [(queries[0], found[:number]) for number in range(len(found))]
    calls = {
        "query": lambda: retriever.invoke(queries[0]),
        "passes": lambda: [retriever.model.encode_states([state]) for state in states],
    }
    seconds = take_turns(calls, max(options.repetitions, 11))
    return {
        "what": "a query beside its encoder passes",
        "chunks": options.few_chunks,
        "steps": len(states),
        "query_milliseconds": round(1e3 * seconds["query"], 2),
        "passes_milliseconds": round(1e3 * seconds["passes"], 2),
        "times_its_passes": round(seconds["query"] / seconds["passes"], 3),
    }


if __name__ == "__main__":
    main()
