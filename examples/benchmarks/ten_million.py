"""A document of ten million tokens: what its index takes to build and hold, and to be asked.

    python examples/benchmarks/ten_million.py MODEL --background BOOKS --folder FOLDER --json FILE

The first run embeds 400,000 sentences of the books, which begin anew where they end, and saves
their index in FOLDER; if it is stopped, the same command goes on where it was. Equal sentences are
embedded once: the time to build is that of the different ones. A run that finds the index there
loads it, so that memory and time are those of asking alone. Then the stories of bAbI questions are
hidden in the document, one after the other, and it counts how many have all their support found.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
from machine import made_from, model_digest, parse_run, report, told

from qrag_retriever import ChunkIndex, QRAGModel, QRAGRetriever
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.vectors import StorageType
from qrag_train.data import BabiSimulator, BackgroundText, SupportSample


def main() -> None:
    options = parse()
    model = resolve_model(options.model)
    built = options.folder / "built.json"
    sources = made_from(
        {options.model: model_digest(model)}, sorted(options.background.glob("*.txt"))
    )
    asked_for = {"sentences": options.sentences, "dtype": options.dtype, **sources}
    resumed = built.exists()
    if resumed:
        kept = json.loads(built.read_text())
    else:
        kept = {"asked_for": asked_for, "built": build(model, options)}
        built.write_text(json.dumps(kept, indent=2))
    if kept.get("asked_for") != asked_for:
        raise SystemExit(
            f"{options.folder} holds an index of other sentences, of another type or model; "
            "give another --folder."
        )
    start = time.perf_counter()
    index = ChunkIndex.load(options.folder / "index", model=model)
    seconds = time.perf_counter() - start
    results = {
        **sources,
        "built": kept["built"],
        # what was just built is in memory still
        "load_seconds": seconds if resumed else None,
        **ask(index, options),
    }
    print(json.dumps(results, indent=2))
    if options.json:
        report(options.json, options.seed, **results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Q-RAG model, or an embedder to use untrained")
    parser.add_argument("--background", type=Path, required=True, help="a folder of books")
    parser.add_argument("--folder", type=Path, required=True, help="where the index is kept")
    parser.add_argument("--sentences", type=int, default=400_000)
    parser.add_argument("--dtype", default="int8", choices=get_args(StorageType))
    parser.add_argument("--devices", nargs="+", help="that share the embedding")
    parser.add_argument("--task", type=int, default=1, help="of bAbI")
    parser.add_argument("--questions", type=int, default=10)
    return parse_run(parser)


def build(model: QRAGModel, options: argparse.Namespace) -> dict[str, Any]:
    """Embed the sentences, part by part, and save the index."""
    books = BackgroundText.from_folder(options.background).sentences
    sentences = list(itertools.islice(itertools.cycle(books), options.sentences))
    parts = options.folder / "parts"
    resumed = parts.exists()
    start = time.perf_counter()
    index = ChunkIndex.from_texts(
        sentences,
        ids=[str(number) for number in range(len(sentences))],
        model=model,
        dtype=options.dtype,
        devices=options.devices,
        checkpoint=parts,
        show_progress=True,
    )
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    index.save(options.folder / "index")
    saved = time.perf_counter() - start
    shutil.rmtree(parts)
    files = list((options.folder / "index").iterdir())
    return {
        "sentences": len(index),
        "different_sentences": len(set(sentences)),
        "dimension": model.dimension,
        "dtype": options.dtype,
        "build_seconds": None if resumed else round(seconds, 1),  # only the last run's are known
        "save_seconds": round(saved, 1),
        "peak_memory_bytes": peak_memory(),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        "bytes_of_embeddings": index.snapshot().vectors.values.nbytes,
    }


def ask(index: ChunkIndex, options: argparse.Namespace) -> dict[str, Any]:
    """Time the questions on the index as it was loaded, then hide their stories and ask again."""
    rng = np.random.default_rng(options.seed)
    source = BabiSimulator(options.task)
    samples = [source.sample(rng) for _ in range(options.questions)]
    retriever = QRAGRetriever(index=index, q_threshold=None)
    seconds, steps = [], 0
    for sample in samples:
        start = time.perf_counter()
        [trajectory] = retriever.search_batch([sample.question])
        seconds.append(time.perf_counter() - start)
        steps = len(trajectory)
    memory = peak_memory()  # what follows holds the chunks in memory to change some of them
    found = [hide_and_ask(retriever, index, sample, rng) for sample in samples]
    return {
        "steps": steps,
        "first_question_seconds": round(seconds[0], 3),
        "question_seconds": round(statistics.median(seconds), 3),
        "peak_memory_bytes": memory,
        "task": options.task,
        "questions": len(found),
        "fact_em": statistics.mean(found),
    }


def hide_and_ask(
    retriever: QRAGRetriever, index: ChunkIndex, sample: SupportSample, rng: np.random.Generator
) -> bool:
    """Whether all support is found, with a story in place of some sentences of the document."""
    rows = np.sort(rng.choice(len(index), len(sample.chunks), replace=False))
    chunks = index.snapshot().chunks
    before = [chunks[row] for row in rows]
    ids = [chunk.id for chunk in before]
    index.add(list(sample.chunks), ids=ids)
    [trajectory] = retriever.search_batch([sample.question])
    index.add(before)
    support = {ids[number] for number in sample.support}
    return support <= {step.chunk.id for step in trajectory}


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    told(main)
