"""What storage types of embeddings cost in Fact-EM: the same searches over what each type keeps.

python examples/benchmarks/storage_types.py MODEL FILE --format hotpotqa --json OUT
python examples/benchmarks/storage_types.py MODEL BABI.txt --format babilong --background BOOKS \
        --sentences 1200 --json OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from machine import report

from qrag_retriever import SearchOptions
from qrag_retriever.model import resolve_model
from qrag_retriever.vectors import StorageType, StoredVectors
from qrag_train.data.sample import FixedSamples
from qrag_train.data.source import Format, SourceConfig
from qrag_train.evaluation import evaluate

if TYPE_CHECKING:
    import numpy as np


def main() -> None:
    options = parse()
    model = resolve_model(options.model)
    settings: dict[str, Any] = {"file": options.file, "format": options.format}
    if options.background:
        settings |= {"background": options.background, "sentences": (options.sentences,) * 2}
    source: Any = SourceConfig(**settings).open()
    endless = not isinstance(source, Sequence)
    samples = (
        FixedSamples(source, options.questions, options.seed)
        if endless
        else source[: options.questions]
    )
    search = SearchOptions(options.steps or model.config.max_steps)
    encode, rows = model.encode_actions, []
    for dtype in options.types:

        def stored(texts: Sequence[str], dtype: Any = dtype, **settings: Any) -> np.ndarray:
            return StoredVectors.of(encode(texts, **settings), dtype).float32().copy()

        model.encode_actions = stored  # type: ignore[method-assign, assignment]
        row = {"type": dtype, **evaluate(model, samples, search)}
        rows.append(row)
        lost = rows[0]["fact_em"] - row["fact_em"]
        print(f"{dtype:9} Fact-EM {row['fact_em']:.4f}  points lost {100 * lost:.2f}", flush=True)
    if options.json:
        report(options.json, options.seed, questions=len(samples), steps=search.k, figures=rows)


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
