"""Judge BabiLong models trained with qrag-train: Fact-EM, and Fact-F1 with a calibrated threshold.

    python examples/benchmarks/babilong.py runs/babilong_qa1 --questions VALID.txt \
        --background BOOKS --lengths 50 160 1200 4600 40000 400000 --json FILE

Half of the questions choose the threshold, in documents of up to 200 sentences, the other half
judge; each stands in a document of its own from books that training did not see. ``simulated:1``
to ``simulated:5`` in place of a file makes up questions. Those whose story alone is longer than a
document are left out and counted. Where the run chose its best model on the same file, as the
configs here do, the figures are a little flattering. The minutes of training are those between its
first and its last validation.

The books are embedded once, and documents are made one after the other: 400,000 sentences, ten
million tokens, take the memory of their embeddings. What was measured is kept in a journal beside
the figures: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import figures
import numpy as np
import yaml
from bench import (
    Judged,
    Results,
    add_options,
    bm25,
    length_options,
    scores,
    start_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qrag_retriever import QRAGModel
from qrag_train.calibration import choose_threshold
from qrag_train.data import BackgroundText, FixedSamples, SupportSample, hide_story
from qrag_train.data.source import stories

if TYPE_CHECKING:
    from collections.abc import Iterator

# METHOD: of the released code
TOKENS = {50: 1_000, 160: 4_000, 1_200: 32_000, 4_600: 128_000, 40_000: 10**6, 400_000: 10**7}
_CALIBRATED = 200  # longer documents take their time


def main() -> None:
    options = parse()
    results = Results(options, "babilong")
    told = read_stories(options)
    background = BackgroundText.from_folder(options.background)
    runs, models = [], []
    for run in options.runs:
        row, model = judge(run, told, background, options, results)
        runs.append(row)
        models.append(model)
        show(row)
    before = Judged("untrained", start_of(models[0].model, options.encoder), background.sentences)
    baselines(max(r["budget"] for r in runs), before, told, background, options, results)
    files = [Path(options.questions)] if Path(options.questions).exists() else []
    results.write([*models, before], files, questions=Path(options.questions).name, runs=runs)
    plot(results.rows, options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of qrag-train fit, or models")
    add_story_options(parser)
    return parser.parse_args()


def add_story_options(parser: argparse.ArgumentParser) -> None:
    """Add what `judge` needs."""
    parser.add_argument(
        "--questions", required=True, help="bAbI file of unseen stories, or simulated:1 …"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1200])
    length_options(parser)
    add_options(parser)


def read_stories(options: argparse.Namespace) -> Sequence[SupportSample]:
    """All stories of the file, or as many simulated ones as both halves take."""
    source = stories(options.questions)
    if isinstance(source, Sequence):
        return source
    return list(FixedSamples(source, 2 * options.count, options.seed))


def judge(
    run: Path,
    told: Sequence[SupportSample],
    background: BackgroundText,
    options: argparse.Namespace,
    results: Results,
) -> tuple[dict[str, Any], Judged]:
    """The figures of one run, and its model."""
    folder = run / "model" if (run / "model").is_dir() else run
    loaded = QRAGModel.from_pretrained(folder)
    model = Judged(run.name, loaded, background.sentences)
    budget = loaded.config.max_steps
    method = model.steps(budget)
    chosen = []
    for length in options.lengths:
        if length <= _CALIBRATED:
            documents = Documents(told[::2], background, length, options)
            chosen += results.search(method, documents, len(documents))
    if not chosen:
        raise SystemExit(f"Give a length of at most {_CALIBRATED}, to choose the threshold on.")
    threshold = choose_threshold([f.beam for f in chosen], [f.support for f in chosen]).q_threshold
    method = model.steps(budget, q_threshold=threshold, read=True)
    rows = []
    for length in options.lengths:
        documents = Documents(told[1::2], background, length, options)
        found = results.measure(
            method, documents, len(documents), data=f"{length} sentences", sentences=length
        )
        whole, stopped = scores(found, budget), scores(found, budget, threshold)
        figures_ = {
            "sentences": length,
            "questions": len(found),
            "left_out": documents.left_out,
            "fact_em": whole["fact_em"],
            "fact_f1": whole["fact_f1"],
            "with_threshold": {name: stopped[name] for name in ("fact_em", "fact_f1", "steps")},
        }
        rows.append(figures_)
        results.follow(f"{run.name}, {length} sentences", found, budget)
    about = {"run": run.name, **training(run), "budget": budget}
    return {**about, "q_threshold": round(threshold, 4), "figures": rows}, model


class Documents:
    """Documents of a length for questions drawn without replacement, made anew whenever read.

    Args:
        told: The stories.
        background: The books.
        length: Number of sentences of a document.
        options: ``seed`` and ``count``, the most documents.

    Attributes:
        left_out: Number of stories longer than a document.
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
        self._taken = fitting[: options.count]
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
    told: Sequence[SupportSample],
    background: BackgroundText,
    options: argparse.Namespace,
    results: Results,
) -> None:
    """The same questions by an untrained encoder and BM25, in documents that are not too long."""
    for length in options.lengths:
        if tokens_of(length) <= options.baselines_to:
            documents = Documents(told[1::2], background, length, options)
            for method in (before.steps(budget), before.once(budget), bm25(budget)):
                results.measure(
                    method, documents, len(documents), data=f"{length} sentences", sentences=length
                )


def tokens_of(sentences: int) -> int:
    return TOKENS.get(sentences, 25 * sentences)


def training(run: Path) -> dict[str, Any]:
    """What the run's folder says of its training; of a model alone nothing."""
    if not (run / "config.yaml").exists():
        return {}
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    log = EventAccumulator(str(next((run / "logs").glob("version_*"))))
    log.Reload()
    judged = log.Scalars("val/fact_em")  # at the start, in between and at the end
    return {
        "training_seed": settings["seed_everything"],
        "updates": settings["trainer"]["max_steps"],
        "training_minutes": round((judged[-1].wall_time - judged[0].wall_time) / 60, 1),
    }


def plot(rows: Sequence[dict[str, Any]], json: Path) -> None:
    """Draw accuracy over length."""
    panels: dict[str, dict[str, dict[int, float]]] = {"Fact-EM": {}, "Fact-F1 with threshold": {}}
    for row in rows:
        stopped = "stop_late" in row
        measure, name = list(panels)[stopped], "fact_f1" if stopped else "fact_em"
        points = panels[measure].setdefault(row["retrieval"], {})
        points[tokens_of(row["sentences"])] = row[name]
    figures.over_length(panels, json)


def show(row: dict[str, Any]) -> None:
    trained = (
        f"seed {row['training_seed']}, {row['updates']} updates in {row['training_minutes']} "
        "minutes, "
        if "updates" in row
        else ""
    )
    print(f"{row['run']}: {trained}threshold {row['q_threshold']}")
    for figure in row["figures"]:
        stopped = figure["with_threshold"]
        print(
            f"  {figure['sentences']:6} sentences, {figure['questions']} questions: "
            f"Fact-EM {figure['fact_em']:.3f} with {row['budget']} steps; with the threshold "
            f"Fact-F1 {stopped['fact_f1']:.3f}, Fact-EM {stopped['fact_em']:.3f}, "
            f"{stopped['steps']:.2f} steps"
        )


if __name__ == "__main__":
    main()
