"""What to use for how many chunks, and what it needs: a Markdown table from the other results.

    python examples/benchmarks/corpus_sizes.py

Reads what scoring.py, serving.py, encoding.py and ann.py wrote into the folder of results. A
figure measured at that size is printed as it is; one computed from measured parts begins with ≈.
What grows with the number of chunks is taken to grow in proportion from the largest size that was
measured, and a query is its encoder passes and a scan at each step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ADVICE = {
    1_000: "`QRAGRetriever.from_texts`, in memory",
    10_000: "the same; `save_local` keeps the index",
    100_000: "the same; several questions at once in `batch`",
    1_000_000: '`dtype="int8"`, mapped from disk; without positions `ann="hnsw"`',
    10_000_000: '`dtype="int8"`, `checkpoint=`, `devices=`; without positions `ann="ivfpq"`, '
    "or a vector store",
    100_000_000: "a vector store on a few machines, filled by `qrag_retriever.bulk`; or "
    "`from_retriever` over the search you have",
    1_000_000_000: "the same, with the store's shards and compression",
}
_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).with_name("results")
    parser.add_argument("--results", type=Path, default=results, help="folder of the figures")
    print(table(parser.parse_args().results))


def table(folder: Path) -> str:
    """The table in Markdown."""
    parts = Parts(folder)
    exact, approximate = "a question, 4 steps: relative, int8", f"without positions, {parts.ann}"
    lines = [
        f"| chunks | use | float32 / int8 | {exact} | {approximate} | to embed them |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for chunks, advice in ADVICE.items():
        cells = [
            f"{chunks:,}",
            advice,
            f"{size(4 * chunks * parts.dimension)} / {size(chunks * (parts.dimension + 4))}",
            parts.exact(chunks),
            parts.approximate(chunks),
            f"≈ {duration(chunks / parts.embedded_per_s)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Parts:
    """What was measured, and what follows from it.

    Args:
        folder: Where the JSON files of the benchmarks lie.
    """

    def __init__(self, folder: Path) -> None:
        scoring, serving, encoding, ann = (
            json.loads((folder / f"{name}.json").read_text())
            for name in ("scoring", "serving", "encoding", "ann")
        )
        self.dimension: int = scoring["matrix"]["dimension"]
        self._scanned: int = scoring["matrix"]["chunks"]
        self._scan = 1e-3 * sum(
            find(scoring, type="int8", positions="continuous", states=1, retrieved=taken)[
                "milliseconds"
            ]
            for taken in range(_STEPS)
        )
        floor = find(serving, what="a query beside its encoder passes")
        self._few: int = floor["chunks"]
        self._few_seconds = 1e-3 * floor["query_milliseconds"]
        self._passes = 1e-3 * floor["passes_milliseconds"]
        batch = find(serving, positions="relative", type="int8", state_encoder=True)
        self._many: int = batch["chunks"]
        self._many_seconds = 1 / batch["queries_per_s_one_by_one"]
        self.embedded_per_s: float = find(encoding, texts="even")["chunk_index_per_s"]
        found = find(ann, type="float32", kind="hnsw")
        self.ann = "HNSW"
        self._indexed: int = ann["chunks"]
        self._lookup = 1e-3 * _STEPS * found["approximate_milliseconds"]

    def exact(self, chunks: int) -> str:
        """Seconds of a question that scans everything at each step."""
        measured = {self._few: self._few_seconds, self._many: self._many_seconds}
        if chunks in measured:
            return duration(measured[chunks])
        return f"≈ {duration(self._passes + self._scan * chunks / self._scanned)}"

    def approximate(self, chunks: int) -> str:
        """Seconds of a question that asks an approximate index at each step."""
        if chunks > 10 * self._indexed or chunks < self._many:
            return "–"
        return f"≈ {duration(self._passes + self._lookup)}"


def find(results: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The one row of figures that has these values."""
    rows: list[dict[str, Any]] = results["figures"]
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row


def size(count: float) -> str:
    """Bytes, in the unit that suits them."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} TB"


def duration(seconds: float) -> str:
    """A time, in the unit that suits it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * length:
            count = seconds / length
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"
    return f"{1e3 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
