"""Judge BabiLong models trained with qrag-train: Fact-EM, and Fact-F1 with a calibrated threshold.

    python examples/benchmarks/babilong.py runs/babilong_qa1 --questions VALID.txt \
        --background BOOKS --json FILE

Half of the questions choose the threshold, the other half judge; each stands in a document of its
own from books that training did not see. Questions whose story alone is longer than a document are
left out and counted. Where the run chose its best model on the same file, as the configs here do,
the figures are a little flattering. The minutes of training are those between its first and its
last validation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from machine import report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qrag_retriever import QRAGModel, SearchOptions
from qrag_train.calibration import calibrate
from qrag_train.data import BackgroundText, SupportSample, hide_story, read_babi
from qrag_train.evaluation import search_samples, steps_above
from qrag_train.metrics import retrieval_metrics


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    stories = read_babi(options.questions)
    background = BackgroundText.from_folder(options.background)
    rows = []
    for run in options.runs:
        row = judge(run, stories, background, options)
        rows.append(row)
        show(row)
    if options.json:
        report(options.json, options.seed, questions=options.questions.name, runs=rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of qrag-train fit")
    add_options(parser)
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `judge` needs."""
    parser.add_argument("--questions", type=Path, required=True, help="bAbI file of unseen stories")
    parser.add_argument("--background", type=Path, required=True, help="folder of unseen books")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1200])
    parser.add_argument("--count", type=int, default=200, help="questions of each length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")


def judge(
    run: Path, stories: list[SupportSample], background: BackgroundText, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one run."""
    model = QRAGModel.from_pretrained(run / "model", device="cpu")
    budget = model.config.max_steps
    halves = stories[::2], stories[1::2]
    chosen = calibrate(
        model,
        [
            sample
            for length in options.lengths
            if length <= 200  # longer ones take their time
            for sample in hidden(halves[0], background, length, options)[0]
        ],
    )
    figures = []
    for length in options.lengths:
        samples, left_out = hidden(halves[1], background, length, options)
        beams = search_samples(model, samples, SearchOptions(budget, runners_up=0))
        supports = [sample.support for sample in samples]
        whole = retrieval_metrics([beam.retrieved for beam in beams], supports)
        lengths = [steps_above(beam, chosen.q_threshold) for beam in beams]
        found = [beam.retrieved[:n] for beam, n in zip(beams, lengths, strict=True)]
        stopped = retrieval_metrics(found, supports)
        figures.append(
            {
                "sentences": length,
                "questions": len(samples),
                "left_out": left_out,
                "fact_em": round(whole["fact_em"], 4),
                "with_threshold": {
                    name: round(stopped[name], 4) for name in ("fact_em", "fact_f1", "steps")
                },
            }
        )
    return {
        "run": run.name,
        **training(run),
        "budget": budget,
        "q_threshold": round(chosen.q_threshold, 4),
        "figures": figures,
    }


def hidden(
    stories: list[SupportSample],
    background: BackgroundText,
    length: int,
    options: argparse.Namespace,
) -> tuple[list[SupportSample], int]:
    """Documents of a length for questions drawn without replacement, and how many did not fit."""
    rng = np.random.default_rng((options.seed, length))
    drawn = [stories[i] for i in rng.permutation(len(stories))]
    fitting = [story for story in drawn if len(story.chunks) <= length]
    taken = fitting[: options.count]
    return [hide_story(s, background, length, rng) for s in taken], len(drawn) - len(fitting)


def training(run: Path) -> dict[str, Any]:
    """What the run's folder says of its training."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    log = EventAccumulator(str(next((run / "logs").glob("version_*"))))
    log.Reload()
    judged = log.Scalars("val/fact_em")  # at the start, in between and at the end
    return {
        "training_seed": settings["seed_everything"],
        "updates": settings["trainer"]["max_steps"],
        "training_minutes": round((judged[-1].wall_time - judged[0].wall_time) / 60, 1),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['run']}: seed {row['training_seed']}, {row['updates']} updates in "
        f"{row['training_minutes']} minutes, threshold {row['q_threshold']}"
    )
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
