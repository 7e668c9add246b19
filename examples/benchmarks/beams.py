"""What several beams find and cost, beside the first number of beams, on the same questions.

    python examples/benchmarks/beams.py MODEL FILE --format hotpotqa --json OUT
    python examples/benchmarks/beams.py MODEL QA2.txt --format babilong \
        --background BOOKS --sentences 1200 --json OUT

Each question is searched among its own chunks, whose embeddings are made beforehand, with every
number of beams in turn; once for the whole budget, and once down to the model's threshold if it
has one. The cost of a search is told in states that the encoder reads, and as a ratio of times.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from machine import made_from, model_digest, parse_run, report, told
from storage_types import lasting_texts, questions
from tqdm import tqdm

from qrag_retriever import ChunkIndex, SearchOptions
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.model_choice import resolve_model
from qrag_train.data.source import Format
from qrag_train.evaluation import EmbeddedTexts
from qrag_train.metrics import retrieval_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qrag_retriever import QRAGModel
    from qrag_train.data import SupportSample


def main() -> None:
    options = parse()
    model = resolve_model(options.model)
    known = EmbeddedTexts(model, lasting_texts(options.background))
    samples = questions(options.file, options)
    k = options.steps or model.config.max_steps
    thresholds = dict.fromkeys([None, model.config.q_threshold])
    searches = [
        SearchOptions(k, q_threshold=threshold, beams=beams)
        for threshold in thresholds
        for beams in options.beams
    ]
    rows = judge(model, samples, searches, known)
    for row in rows:
        print(*(f"{name}: {value}" for name, value in row.items()), sep="  ")
    if options.json:
        read = [Path(options.file)] if Path(options.file).is_file() else []
        books = sorted(Path(options.background).glob("*.txt")) if options.background else []
        sources = made_from({options.model: model_digest(model)}, [*read, *books])
        report(options.json, options.seed, **sources, figures=rows)


def judge(
    model: QRAGModel,
    samples: Sequence[SupportSample],
    searches: Sequence[SearchOptions],
    known: EmbeddedTexts,
) -> list[dict[str, Any]]:
    """What each search finds, and what it costs beside the first with the same threshold."""
    paths: list[list[list[int]]] = [[] for _ in searches]
    seconds, states = [0.0] * len(searches), [0] * len(searches)
    for sample in tqdm(samples, unit="question"):
        (vectors,) = known.actions([sample])
        index = ChunkIndex.from_embeddings(sample.chunks, vectors.cpu().numpy(), model=model)
        retriever = MultiStepRetriever(model, index)
        retriever.search(sample.question, searches[0])  # what the first search takes longer
        for place, search in enumerate(searches):
            with counted(model) as sizes:
                start = time.perf_counter()
                trajectory = retriever.search(sample.question, search)
                seconds[place] += time.perf_counter() - start
            states[place] += sum(sizes)
            paths[place].append([step.index for step in trajectory])
    supports = [sample.support for sample in samples]
    rows = []
    for place, search in enumerate(searches):
        first = next(i for i, o in enumerate(searches) if o.q_threshold == search.q_threshold)
        figures = retrieval_metrics(paths[place], supports, ks=[search.k])
        rows.append(
            {
                "questions": len(samples),
                "k": search.k,
                "q_threshold": search.q_threshold,
                "beams": search.beams,
                "fact_em": round(figures["fact_em"], 4),
                "fact_f1": round(figures["fact_f1"], 4),
                "states_per_question": round(states[place] / len(samples), 2),
                "times_as_long": round(seconds[place] / seconds[first], 2),
            }
        )
    return rows


@contextlib.contextmanager
def counted(model: QRAGModel) -> Iterator[list[int]]:
    """The numbers of states that the encoder reads at once."""
    sizes: list[int] = []
    encode = model.encode_states

    def counting(states: Any) -> Any:
        sizes.append(len(states))
        return encode(states)

    model.encode_states = counting  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        del model.encode_states


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Q-RAG model, or an embedder to use untrained")
    parser.add_argument("file", help="questions with their support")
    parser.add_argument("--format", default="jsonl", choices=get_args(Format))
    parser.add_argument("--background", help="for babilong: a folder of books")
    parser.add_argument("--sentences", type=int, default=1200, help="of a babilong document")
    parser.add_argument(
        "--beams", type=int, nargs="+", default=[1, 2, 4], help="the others beside the first"
    )
    parser.add_argument("--questions", type=int, default=100, help="at most")
    parser.add_argument("--steps", type=int, help="default: the model's")
    return parse_run(parser)


if __name__ == "__main__":
    told(main)
