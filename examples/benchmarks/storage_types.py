"""What storage types of embeddings cost in Fact-EM: the same searches in an index of each type.

    python examples/benchmarks/storage_types.py MODEL FILE --format hotpotqa --json OUT
    python examples/benchmarks/storage_types.py MODEL QA1.txt QA2.txt --format babilong \
        --steps 3 4 --background BOOKS --sentences 1200 --json OUT

Tells for each type how many points it loses and how many trajectories are others, for each file
and for the questions of all together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from machine import made_from, model_digest, report, told
from tqdm import tqdm

from qrag_retriever import ChunkIndex, SearchOptions
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.vectors import StorageType
from qrag_train.data import BackgroundText
from qrag_train.data.sample import finite
from qrag_train.data.source import Format, SourceConfig
from qrag_train.evaluation import EmbeddedTexts
from qrag_train.metrics import retrieval_metrics

if TYPE_CHECKING:
    from qrag_retriever import QRAGModel
    from qrag_train.data import SupportSample


def main() -> None:
    options = parse()
    model = resolve_model(options.model)
    known = EmbeddedTexts(model, lasting_texts(options.background))
    rows: list[dict[str, Any]] = []
    for file, steps in zip(options.files, options.steps, strict=True):
        search = SearchOptions(steps or model.config.max_steps)
        samples = questions(file, options)
        found = retrieve(model, samples, search, known, options.types)
        rows += judge(file, found, [sample.support for sample in samples], search.k)
    rows += together(rows) if len(options.files) > 1 else []
    for row in rows:
        reference = next(one for one in rows if one["data"] == row["data"])
        lost = 100 * (reference["fact_em"] - row["fact_em"])
        differ = f"{row['other_trajectories']} of {row['questions']} differ"
        print(f"{row['data']}, {row['type']}: points of Fact-EM lost {lost:.2f}, {differ}")
    if options.json:
        read = [Path(file) for file in options.files if Path(file).is_file()]
        books = sorted(Path(options.background).glob("*.txt")) if options.background else []
        sources = made_from({options.model: model_digest(model)}, [*read, *books])
        report(options.json, options.seed, **sources, figures=rows)


def questions(file: str, options: argparse.Namespace) -> Sequence[SupportSample]:
    """At most as many questions of a file as are asked for."""
    settings: dict[str, Any] = {"file": file, "format": options.format}
    if options.background:
        settings |= {"background": options.background, "sentences": (options.sentences,) * 2}
    source = SourceConfig(**settings).open()
    return finite(source, options.questions, options.seed)[: options.questions]


def lasting_texts(background: str | None) -> Sequence[str]:
    """Texts that recur in many documents."""
    return BackgroundText.from_folder(background).sentences if background else ()


def judge(
    data: str, found: dict[str, list[list[int]]], supports: Sequence[Sequence[int]], k: int
) -> list[dict[str, Any]]:
    """The figures of each type beside those of the first."""
    first = next(iter(found.values()))
    return [
        {
            "data": data,
            "questions": len(supports),
            "type": dtype,
            **retrieval_metrics(paths, supports, ks=range(1, k + 1)),
            "other_trajectories": sum(a != b for a, b in zip(paths, first, strict=True)),
        }
        for dtype, paths in found.items()
    ]


def together(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fact-EM and other trajectories of each type on the questions of all files."""
    sums: list[dict[str, Any]] = []
    for dtype in dict.fromkeys(row["type"] for row in rows):
        some = [row for row in rows if row["type"] == dtype]
        asked = sum(row["questions"] for row in some)
        sums.append(
            {
                "data": "all files",
                "questions": asked,
                "type": dtype,
                "fact_em": sum(row["fact_em"] * row["questions"] for row in some) / asked,
                "other_trajectories": sum(row["other_trajectories"] for row in some),
            }
        )
    return sums


def retrieve(
    model: QRAGModel,
    samples: Sequence[SupportSample],
    search: SearchOptions,
    known: EmbeddedTexts,
    types: Sequence[StorageType],
) -> dict[str, list[list[int]]]:
    """What is retrieved for each question from an index of each type."""
    found: dict[str, list[list[int]]] = {dtype: [] for dtype in types}
    for sample in tqdm(samples, unit="question"):
        (vectors,) = known.actions([sample])
        for dtype, paths in zip(types, found.values(), strict=True):
            index = ChunkIndex.from_embeddings(
                sample.chunks, vectors.cpu().numpy(), model=model, dtype=dtype
            )
            trajectory = MultiStepRetriever(model, index).search(sample.question, search)
            paths.append([step.index for step in trajectory])
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Q-RAG model, or an embedder to use untrained")
    parser.add_argument("files", nargs="+", help="questions with their support")
    parser.add_argument("--format", default="jsonl", choices=get_args(Format))
    parser.add_argument("--background", help="for babilong: a folder of books")
    parser.add_argument("--sentences", type=int, default=1200, help="of a babilong document")
    parser.add_argument("--types", nargs="+", default=list(get_args(StorageType)))
    parser.add_argument("--questions", type=int, default=1000, help="of each file, at most")
    parser.add_argument("--steps", type=int, nargs="+", help="for each file; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    options.steps = options.steps or [None] * len(options.files)
    if len(options.steps) != len(options.files):
        parser.error(f"give --steps once for each of {len(options.files)} files")
    return options


if __name__ == "__main__":
    told(main)
