"""Judge BabiLong models trained with qrag-train: Fact-EM, and Fact-F1 with a calibrated threshold.

    python examples/benchmarks/babilong.py runs/babilong_qa1 --questions VALID.txt \
        --background BOOKS --lengths 50 160 1200 4600 40000 400000 --json FILE

Half of the questions choose the threshold, in documents of up to 1,200 sentences, unless the model
brings its own; the other half judge, each in a document of its own from books that training did not
see. Fact-EM with the whole budget, which no threshold enters, is given for both halves too. Several
files are several tasks; ``simulated:1`` to ``simulated:5`` make up questions. Those whose story
alone is longer than a document are left out and counted. Where the run chose its best model on the
same file, as the configs here do, the figures are a little flattering. The minutes of training are
those from the first to the last entry of its log, or of each of them where it was interrupted.

A sentence of the books may read like a fact of a story, and then the question asks for it rightly:
``--without-facts`` leaves such sentences out and names them in the results.

The books are embedded once, and documents are made one after the other: 400,000 sentences, ten
million tokens, take the memory of their embeddings. What was measured is kept in a journal beside
the figures: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import figures
import numpy as np
import yaml
from bench import (
    Found,
    Judged,
    Results,
    add_options,
    bm25,
    length_options,
    load_all,
    scores,
    start_of,
)
from machine import told
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qrag_train.calibration import choose_threshold, judge_thresholds
from qrag_train.data import BackgroundText, SupportSample, finite, hide_story
from qrag_train.data.simulator import DROPS, GIVERS, MOVES, PEOPLE, TAKES
from qrag_train.data.source import stories

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# METHOD: of the released code
TOKENS = {50: 1_000, 160: 4_000, 1_200: 32_000, 4_600: 128_000, 40_000: 10**6, 400_000: 10**7}
_CALIBRATED = 1200


class Task(NamedTuple):
    """A task of bAbI.

    Attributes:
        name: ``qa1`` and so on.
        file: The file of its questions, or what they are made by.
        k: Budget T; ``None``: the model's own.
        stories: Its questions: every other one helps to choose a threshold, the rest judge.
    """

    name: str
    file: str
    k: int | None
    stories: Sequence[SupportSample]


def main() -> None:
    options = parse()
    results = Results(options, "babilong")
    background = BackgroundText.from_folder(options.background)
    facts = facts_in(background.sentences) if options.without_facts else []
    if facts:
        background = BackgroundText([s for s in background.sentences if s not in facts])
    models = load_all(options.runs, background.sentences)
    before = start_of(models[0].model, options.encoder, background.sentences)
    runs = []
    for task in tasks(options):
        for run, model in zip(options.runs, models, strict=True):
            runs.append(judge(run, model, task, background, options, results))
            show(runs[-1])
        baselines(runs[-1]["budget"], before, task, background, options, results)
    names = ", ".join(Path(file).name for file in options.questions)
    plot(results.rows, options.json)  # a reader may fail
    results.write(
        [*models, before], files_of(options), questions=names, runs=runs, facts_left_out=facts
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of qrag-train fit, or models")
    parser.add_argument(
        "--without-facts", action="store_true", help="leave out what in the books reads like a fact"
    )
    add_story_options(parser)
    return parser.parse_args()


def add_story_options(parser: argparse.ArgumentParser) -> None:
    """Add what `judge` needs."""
    parser.add_argument(
        "--questions",
        nargs="+",
        required=True,
        help="bAbI files of unseen stories, one a task, or simulated:1 …",
    )
    parser.add_argument("--k", type=int, nargs="+", help="budget of each; left out: the model's")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1200])
    length_options(parser)
    add_options(parser)


def files_of(options: argparse.Namespace) -> list[Path]:
    """The files that `add_story_options` asked for: questions, if there are any, and books."""
    questions = [Path(file) for file in options.questions if Path(file).exists()]
    return [*questions, *sorted(options.background.glob("*.txt"))]


def facts_in(sentences: Sequence[str]) -> list[str]:
    """Sentences of books that read like a fact of a story.

    Example:
        >>> facts_in(["Mary went back to the stable.", "Mary went to bed.", "It was dark."])
        ['Mary went back to the stable.']
    """
    people, moves, acts = ("|".join(words) for words in (PEOPLE + GIVERS, MOVES, TAKES + DROPS))
    fact = re.compile(rf"(?:{people}) (?:{moves}|{acts}) the \w+(?: there)?\.")
    return sorted({sentence for sentence in sentences if fact.fullmatch(sentence)})


def tasks(options: argparse.Namespace) -> list[Task]:
    """The tasks asked for, with all stories of a file, or as many as both halves take."""
    budgets = options.k or [None] * len(options.questions)
    if len(budgets) != len(options.questions):
        raise SystemExit(f"Give --k once for each of {len(options.questions)} --questions.")
    found = []
    for file, k in zip(options.questions, budgets, strict=True):
        told = finite(stories(file), 2 * options.count, options.seed)
        found.append(Task(Path(file).stem.partition("_")[0], file, k, list(told)))
    return found


def judge(
    run: Path,
    model: Judged,
    task: Task,
    background: BackgroundText,
    options: argparse.Namespace,
    results: Results,
) -> dict[str, Any]:
    """The figures of one run on one task."""
    config = model.model.config
    k, threshold = task.k or config.max_steps, config.q_threshold
    first_half: dict[int, list[Found]] = {}
    if threshold is None:
        first_half = search_first_half(model, k, task, background, options, results)
        threshold = choose(first_half)
    method = model.steps(k, q_threshold=threshold, read=True)
    rows = []
    for length in options.lengths:
        documents = Documents(task.stories[1::2], background, length, options)
        data = f"{task.name}, {length} sentences"
        found = results.measure(
            method, documents, len(documents), data=data, task=task.name, sentences=length
        )
        whole, stopped = scores(found, k), scores(found, k, threshold)
        rows.append(
            {
                "sentences": length,
                "questions": len(found),
                "different_questions": documents.different,
                "left_out": documents.left_out,
                "fact_em": whole["fact_em"],
                **both_halves(first_half.get(length), found, k),
                "with_threshold": {n: stopped[n] for n in ("fact_em", "fact_f1", "steps")},
            }
        )
    results.follow(f"{data}; {model.name}", found, k)
    about = {"run": model.name, "task": task.name, **training(run), "budget": k}
    return {**about, "q_threshold": round(threshold, 4), "figures": rows}


def search_first_half(
    model: Judged,
    k: int,
    task: Task,
    background: BackgroundText,
    options: argparse.Namespace,
    results: Results,
) -> dict[int, list[Found]]:
    """What the questions that choose the threshold find, in documents not too long."""
    found = {}
    for length in options.lengths:
        if length <= _CALIBRATED:  # longer ones take their time
            documents = Documents(task.stories[::2], background, length, options)
            found[length] = results.search(model.steps(k), documents, len(documents))
    if not found:
        raise SystemExit(f"Give a length of at most {_CALIBRATED}, to choose the threshold on.")
    return found


def choose(found: Mapping[int, Sequence[Found]]) -> float:
    """The threshold of best Fact-F1."""
    beams = [one.beam for some in found.values() for one in some]
    supports = [one.support for some in found.values() for one in some]
    return choose_threshold(judge_thresholds(beams, supports)).q_threshold


def both_halves(first: Sequence[Found] | None, found: Sequence[Found], k: int) -> dict[str, Any]:
    """Fact-EM with the whole budget, which no threshold enters, of all questions of a file."""
    if first is None:
        return {}
    every = [*first, *found]
    return {"both_halves": {"questions": len(every), "fact_em": scores(every, k)["fact_em"]}}


class Documents:
    """Documents of a length for the questions in random order, made anew whenever read.

    Where more documents are wanted than there are questions, each stands in several.

    Args:
        told: The stories.
        background: The books.
        length: Number of sentences of a document.
        options: ``seed`` and ``count``, the number of documents.

    Attributes:
        different: Number of different questions; if less than ``count``, some stand in several
            documents.
        left_out: Number of questions whose story is longer than a document.
    """

    def __init__(
        self,
        told: Sequence[SupportSample],
        background: BackgroundText,
        length: int,
        options: argparse.Namespace,
    ) -> None:
        self._seed = (options.seed, length)
        self._all = told
        self._background = background
        self._length = length
        order = np.random.default_rng(self._seed).permutation(len(told))
        fitting = [told[i] for i in order if len(told[i].chunks) <= length]
        if not fitting:
            shortest = min(len(story.chunks) for story in told)
            raise SystemExit(f"No story fits in {length} sentences, the shortest has {shortest}.")
        self._taken = list(itertools.islice(itertools.cycle(fitting), options.count))
        self.different = min(len(fitting), options.count)
        self.left_out = len(told) - len(fitting)

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[SupportSample]:
        rng = np.random.default_rng(self._seed)
        rng.permutation(len(self._all))  # what chose them
        for story in self._taken:
            yield hide_story(story, self._background, self._length, rng)


def baselines(
    budget: int,
    before: Judged,
    task: Task,
    background: BackgroundText,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """The same questions by an untrained encoder and BM25, in documents that are not too long."""
    for length in options.lengths:
        if tokens_of(length) <= options.baselines_to:
            documents = Documents(task.stories[1::2], background, length, options)
            data = f"{task.name}, {length} sentences"
            for method in (before.steps(budget), before.once(budget), bm25(budget)):
                results.measure(
                    method, documents, len(documents), data=data, task=task.name, sentences=length
                )


def tokens_of(sentences: int) -> int:
    return TOKENS.get(sentences, 25 * sentences)


def training(run: Path) -> dict[str, Any]:
    """What the run's folder says of its training; of a model alone nothing."""
    if not (run / "config.yaml").exists():
        return {}
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    seconds = sum(logged_seconds(folder) for folder in (run / "logs").glob("version_*"))
    return {
        "training_seed": settings["seed_everything"],
        "updates": settings["trainer"]["max_steps"],
        "training_minutes": round(seconds / 60, 1),
    }


def logged_seconds(folder: Path) -> float:
    """Time from the first to the last entry of a log; each resumption has a log of its own."""
    log = EventAccumulator(str(folder))
    log.Reload()
    times = [entry.wall_time for name in log.Tags()["scalars"] for entry in log.Scalars(name)]
    return max(times) - min(times) if times else 0.0


def plot(rows: Sequence[dict[str, Any]], json: Path) -> None:
    """Draw accuracy over length."""
    panels: dict[str, dict[str, dict[int, float]]] = {"Fact-EM": {}, "Fact-F1 with threshold": {}}
    for row in rows:
        stopped = "stop_late" in row
        measure, name = list(panels)[stopped], "fact_f1" if stopped else "fact_em"
        points = panels[measure].setdefault(f"{row['task']}, {row['retrieval']}", {})
        points[tokens_of(row["sentences"])] = row[name]
    figures.over_length(panels, json)


def show(row: dict[str, Any]) -> None:
    trained = (
        f"seed {row['training_seed']}, {row['updates']} updates in {row['training_minutes']} "
        "minutes, "
        if "updates" in row
        else ""
    )
    task = f", {row['task']}" if "task" in row else ""
    print(f"{row['run']}{task}: {trained}threshold {row['q_threshold']}")
    for figure in row["figures"]:
        stopped = figure["with_threshold"]
        print(
            f"  {figure['sentences']:6} sentences, {figure['questions']} questions: "
            f"Fact-EM {figure['fact_em']:.3f} with {row['budget']} steps; with the threshold "
            f"Fact-F1 {stopped['fact_f1']:.3f}, Fact-EM {stopped['fact_em']:.3f}, "
            f"{stopped['steps']:.2f} steps"
        )


if __name__ == "__main__":
    told(main)
