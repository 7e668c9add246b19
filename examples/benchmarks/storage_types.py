"""What storage types of embeddings cost in Fact-EM: the same searches in an index of each type.

    python examples/benchmarks/storage_types.py MODEL FILE --format hotpotqa --json OUT
    python examples/benchmarks/storage_types.py MODEL BABI.txt --format babilong \
        --background BOOKS --sentences 1200 --json OUT

Tells for each type how many points it loses and how many trajectories are others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from machine import report
from tqdm import tqdm

from qrag_retriever import ChunkIndex, SearchOptions
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.vectors import StorageType
from qrag_train.data import BackgroundText
from qrag_train.data.sample import FixedSamples
from qrag_train.data.source import Format, SourceConfig
from qrag_train.evaluation import EmbeddedTexts
from qrag_train.metrics import retrieval_metrics

if TYPE_CHECKING:
    from qrag_retriever import QRAGModel
    from qrag_train.data import SupportSample


def main() -> None:
    options = parse()
    model = resolve_model(options.model)
    samples = questions(options)
    search = SearchOptions(options.steps or model.config.max_steps)
    found = retrieve(model, samples, search, options)
    supports = [sample.support for sample in samples]
    rows: list[dict[str, Any]] = []
    for dtype, paths in found.items():
        scores = retrieval_metrics(paths, supports, ks=range(1, search.k + 1))
        first = found[options.types[0]]
        other = sum(a != b for a, b in zip(paths, first, strict=True))
        rows.append({"type": dtype, **scores, "other_trajectories": other})
        lost = 100 * (rows[0]["fact_em"] - scores["fact_em"])
        print(f"{dtype:9} Fact-EM {scores['fact_em']:.4f}, points lost {lost:.2f}, {other} differ")
    if options.json:
        report(options.json, options.seed, questions=len(samples), steps=search.k, figures=rows)


def questions(options: argparse.Namespace) -> Sequence[SupportSample]:
    settings: dict[str, Any] = {"file": options.file, "format": options.format}
    if options.background:
        settings |= {"background": options.background, "sentences": (options.sentences,) * 2}
    source: Any = SourceConfig(**settings).open()
    if isinstance(source, Sequence):
        return source[: options.questions]
    return list(FixedSamples(source, options.questions, options.seed))


def retrieve(
    model: QRAGModel,
    samples: Sequence[SupportSample],
    search: SearchOptions,
    options: argparse.Namespace,
) -> dict[str, list[list[int]]]:
    """What is retrieved for each question from an index of each type."""
    lasting = BackgroundText.from_folder(options.background).sentences if options.background else ()
    known = EmbeddedTexts(model, lasting)
    found: dict[str, list[list[int]]] = {dtype: [] for dtype in options.types}
    for sample in tqdm(samples, unit="question"):
        (vectors,) = known.actions([sample])
        for dtype, paths in found.items():
            index = ChunkIndex.from_embeddings(
                sample.chunks, vectors.cpu().numpy(), model=model, dtype=dtype
            )
            trajectory = MultiStepRetriever(model, index).search(sample.question, search)
            paths.append([step.index for step in trajectory])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Q-RAG model, or an embedder to use untrained")
    parser.add_argument("file", help="questions with their support")
    parser.add_argument("--format", default="jsonl", choices=get_args(Format))
    parser.add_argument("--background", help="for babilong: a folder of books")
    parser.add_argument("--sentences", type=int, default=1200, help="of a babilong document")
    parser.add_argument("--types", nargs="+", default=list(get_args(StorageType)))
    parser.add_argument("--questions", type=int, default=1000, help="at most")
    parser.add_argument("--steps", type=int, help="default: the model's own budget")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
