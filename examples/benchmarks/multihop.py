"""Judge models on questions whose evidence lies in several passages.

    python examples/benchmarks/multihop.py MODEL --hotpotqa hotpotqa/valid.json \
        --musique musique/valid.jsonl --2wikimultihopqa 2wikimultihopqa/valid.json \
        --corpus 2wikimultihopqa/open_corpus.json 2wikimultihopqa/open_corpus_valid.json \
        --json FILE

Each question is searched among its own candidates (T = 2, 4 and 4), then among all passages of its
file (five of them retrieved). Beside each model, among a question's own candidates with beams too,
stand BM25, one dense search with the encoder that it started from, and the same loop with that
encoder; without a model those alone are judged. ``--dense`` adds one search by an embedder as it
was published. What was measured is kept in a journal beside the figures: a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import (
    Judged,
    Results,
    add_options,
    bm25,
    load_all,
    start_of,
)
from machine import told

from qrag_retriever import QRAGModel
from qrag_train.data import (
    SampleList,
    pooled,
    read_hotpotqa,
    read_musique,
    read_twowiki,
    read_twowiki_open,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READERS: dict[str, tuple[Callable[[Path], SampleList], int]] = {
    "HotpotQA": (read_hotpotqa, 2),
    "MuSiQue": (read_musique, 4),
    "2WikiMultiHopQA": (read_twowiki, 4),
}
_POOLED_STEPS = 5


class Questions(NamedTuple):
    """Questions with their budget T, each with its own candidates or all on one corpus."""

    name: str
    samples: SampleList
    k: int
    shared: bool


def main() -> None:
    options = parse()
    results = Results(options, "multihop")
    sets = list(question_sets(options))
    if not sets:
        raise SystemExit("There are no questions; give --hotpotqa, --musique or another file.")
    corpora = {id(sample.chunks): sample.chunks for s in sets for sample in s.samples}
    texts = {chunk for chunks in corpora.values() for chunk in chunks}
    models = load_all(options.models, texts)
    trained = models[0].model if models else None
    before = start_of(trained, options.encoder, texts)
    dense = [
        Judged(name.rpartition("/")[2], QRAGModel.from_encoder(name), texts)
        for name in options.dense
    ]
    for name, samples, k, shared in sets:
        greedy = [model.steps(k, read=not shared) for model in models]
        wide = options.beams > 1 and not shared
        plans = [model.steps(k, options.beams) for model in models if wide]
        once = [model.once(k) for model in models]
        single = [embedder.once(k) for embedder in [before, *dense]]
        for method in [*greedy, *plans, *once, before.steps(k), *single, bm25(k)]:
            found = results.measure(method, samples, len(samples), data=name)
            if method in greedy and not shared:
                results.follow(f"{name}; {method.name}", found, k)
    results.write([*models, before, *dense], options.files)


def question_sets(options: argparse.Namespace) -> Iterator[Questions]:
    """The questions of each file with their own candidates and on a corpus."""
    options.files = []
    for name, (read, k) in READERS.items():
        file = getattr(options, name.lower())
        if file is None:
            continue
        options.files.append(file)
        own = read(file)
        candidates = f"{name}, {max(len(sample.chunks) for sample in own)} candidates"
        yield Questions(candidates, own[: options.count], k, False)
        yield on_corpus(name, pooled(own)[: options.count])
    if options.corpus is not None:
        options.files += options.corpus
        yield on_corpus("2WikiMultiHopQA", read_twowiki_open(*options.corpus)[: options.count])


def on_corpus(name: str, samples: SampleList) -> Questions:
    return Questions(f"{name}, pool of {len(samples[0].chunks):,}", samples, _POOLED_STEPS, True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders of Q-RAG models or of runs")
    for name in READERS:
        parser.add_argument(f"--{name.lower()}", type=Path, help=f"official file of {name}")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs=2,
        metavar=("PASSAGES", "QUESTIONS"),
        help="pooled corpus of 2WikiMultiHopQA, and questions on it",
    )
    parser.add_argument("--dense", nargs="*", default=[], help="embedders to search with once")
    parser.add_argument("--beams", type=int, default=4, help="of Plan Q-RAG; 1: leave it out")
    parser.add_argument("--count", type=int, help="most questions of a file; left out: all")
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    told(main)
