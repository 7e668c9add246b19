"""Judge models on RULER's needles, chains of variables and questions, in texts of any length.

    python examples/benchmarks/ruler.py MODEL --words ruler/english_words.txt \
        --background books/valid --squad ruler/xquad.en.json --hotpotqa hotpotqa/valid.json \
        --tokens 4096 32768 131072 1048576 --count 100 --json FILE

Texts are made here from the word list, unseen books and the paragraphs of the two files, four
characters counted as a token. Fact-EM is the share of questions of which everything was found:
every needle asked for, every assignment of the chain, every paragraph. What was measured is kept
in a journal beside the figures: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import figures
from bench import (
    Judged,
    Method,
    Results,
    add_options,
    bm25,
    length_options,
    load,
    start_of,
)
from machine import told

from qrag_train.data import (
    BackgroundText,
    FixedSamples,
    Ruler,
    read_hotpotqa,
    read_squad,
    read_words,
)
from qrag_train.data.ruler import NEEDLES, TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEPS = {**dict.fromkeys(NEEDLES, 4), "vt": 5, "qa_1": 2, "qa_2": 2}


def main() -> None:
    options = parse()
    results = Results(options, "ruler")
    background = BackgroundText.from_folder(options.background)
    words = read_words(options.words)
    questions = {
        "qa_1": read_squad(options.squad) if options.squad else (),
        "qa_2": read_hotpotqa(options.hotpotqa) if options.hotpotqa else (),
    }
    paragraphs = (chunk for own in questions.values() for one in own for chunk in one.chunks)
    texts = [*background.sentences, *background.passages().sentences, *paragraphs]
    models = [load(path, texts) for path in options.models]
    trained = models[0].model if models else None
    before = start_of(trained, options.encoder, texts)
    tasks = [task for task in options.tasks if questions.get(task, True)]
    for task in sorted({*options.tasks} - {*tasks}):
        print(f"{task} is left out: its questions are missing (--squad, --hotpotqa).")
    if not tasks:
        raise SystemExit("No task is left to judge.")
    for tokens in options.tokens:
        for task in tasks:
            source = Ruler(task, tokens, background, words=words, questions=questions.get(task, ()))
            samples = FixedSamples(source, options.count, options.seed)
            for method in methods(STEPS[task], models, before, tokens <= options.baselines_to):
                data = f"{task}, {figures.short(tokens)}"
                results.measure(method, samples, len(samples), data=data, task=task, tokens=tokens)
    results.rows += averages(results.rows)
    books = sorted(options.background.glob("*.txt"))
    given = [options.words, options.squad, options.hotpotqa, *books]
    figures.over_length(lines(results.rows), options.json)  # a reader may fail
    results.write([*models, before], [file for file in given if file])


def methods(k: int, models: Sequence[Judged], before: Judged, baselines: bool) -> list[Method]:
    """The ways to retrieve that are compared."""
    trained = [model.steps(k, read=True) for model in models]
    return [*trained, *([before.steps(k), before.once(k), bm25(k)] if baselines else [])]


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each length and method the means over the needle tasks."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["task"] in NEEDLES:
            groups.setdefault((row["tokens"], row["retrieval"]), []).append(row)
    return [
        {
            "data": f"mean of {len(group)} NIAH tasks, {figures.short(tokens)}",
            "task": "niah",
            "tokens": tokens,
            "questions": sum(row["questions"] for row in group),
            "retrieval": retrieval,
            **{
                name: round(sum(row[name] for row in group) / len(group), 4)
                for name in ("fact_em", "fact_f1", "steps")
            },
        }
        for (tokens, retrieval), group in groups.items()
    ]


def lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, figures.Lines]:
    """Fact-EM over length: each task by the first method, the mean of the needles by each."""
    first = rows[0]["retrieval"].partition(":")[0]
    by_task: dict[str, dict[int, float]] = {}
    by_method: dict[str, dict[int, float]] = {}
    for row in rows:
        name, _, way = row["retrieval"].partition(": ")
        if name == first and way == f"{STEPS.get(row['task'])} steps":
            by_task.setdefault(row["task"], {})[row["tokens"]] = row["fact_em"]
        if row["task"] == "niah":
            by_method.setdefault(row["retrieval"], {})[row["tokens"]] = row["fact_em"]
    panels = {f"Fact-EM, {first}": by_task, "Fact-EM, mean of NIAH": by_method}
    return {measure: found for measure, found in panels.items() if found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, help="folders of Q-RAG models or of runs")
    parser.add_argument("--words", type=Path, required=True, help="file with a word a line")
    parser.add_argument("--squad", type=Path, help="file in SQuAD's shape, for qa_1")
    parser.add_argument("--hotpotqa", type=Path, help="file in HotpotQA's shape, for qa_2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768, 131_072])
    length_options(parser)
    add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    told(main)
