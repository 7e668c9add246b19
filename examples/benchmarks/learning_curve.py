"""What more annotated questions are worth: the same training with shares of them.

    python examples/benchmarks/learning_curve.py \
        --config examples/configs/multihop_en_detours.yaml --shares 0.03 0.1 0.3 --updates 100 \
        --json FILE

Trains one model for each share of each file's questions with the same number of updates, and
judges its last weights on the config's validation files with the model's own budget, HotpotQA with
T = 2. Sources that make up questions are left out, so that the annotated ones are all that differs;
questions that the updates do not get to are worth nothing, so the largest share should not be more
than they read. A training that was interrupted goes on, and one that is finished is not made again;
nor is a share judged again whose figures the file has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import figures
import training_runs
import yaml
from machine import report, told

from qrag_retriever import QRAGModel, SearchOptions
from qrag_retriever.files import sha256_of
from qrag_train.data.sample import SampleList
from qrag_train.data.source import SourceConfig
from qrag_train.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STEPS = {"hotpotqa": 2}  # as its own benchmark; other files have the model's budget


def main() -> None:
    options = parse()
    data = yaml.safe_load(options.config.read_text(encoding="utf-8"))["data"]
    if not data.get("train") or not data.get("val"):
        raise SystemExit(f"{options.config} has no lists data.train and data.val of sources.")
    annotated = [(source, count) for source in data["train"] if (count := questions(source))]
    files = {source["file"]: count for source, count in annotated}
    valid = [SourceConfig(**source) for source in data["val"]]
    for share in options.shares:
        if share in judged(options):
            continue
        used = {name: max(1, round(share * count)) for name, count in files.items()}
        folder = options.folder / f"{share:g}"
        limited = [{**source, "limit": used[source["file"]]} for source, _ in annotated]
        train(folder, limited, options)
        row = {"share": share, "questions": sum(used.values()), **judge(folder, valid)}
        print(*(f"{key}: {value}" for key, value in row.items()), sep="  ", flush=True)
        write([*judged(options).values(), row], options)
    rows = list(judged(options).values())
    write(rows, options)
    draw(rows, [source.format for source in valid], options.json)


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the figures, the smallest share first."""
    rows = sorted(rows, key=lambda row: float(row["share"]))
    report(options.json, options.seed, **training(options), rows=rows)


def training(options: argparse.Namespace) -> dict[str, Any]:
    """What all shares have in common."""
    data = yaml.safe_load(options.config.read_text(encoding="utf-8"))["data"]
    named = {Path(source["file"]) for part in ("train", "val") for source in data[part]}
    files = [options.config, *sorted(file for file in named if file.is_file())]
    return {
        "config": options.config.name,
        "updates": options.updates,
        "files": {str(file): sha256_of(file) for file in files},
    }


def judged(options: argparse.Namespace) -> dict[float, dict[str, Any]]:
    """The figures that are there already, by the share.

    Raises:
        SystemExit: If they are of another training.
    """
    if not options.json.exists():
        return {}
    found = json.loads(options.json.read_text(encoding="utf-8"))
    ours = {**training(options), "seed": options.seed}
    theirs = {name: found.get(name) for name in ours}
    if theirs != ours:
        raise SystemExit(
            f"{options.json} has figures of {theirs}, this run would be of {ours}; give another "
            "file as --json, or remove that one."
        )
    return {row["share"]: row for row in found["rows"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/learning_curve"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    return parser.parse_args()


def questions(source: Mapping[str, Any]) -> int:
    """How many annotated questions a source has: none if it makes them up."""
    opened = SourceConfig(**source).open()
    return len(opened) if isinstance(opened, SampleList) else 0


def train(folder: Path, sources: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    given = {
        "config": options.config,
        "seed_everything": options.seed,
        "data.train": json.dumps(sources),
        "trainer.val_check_interval": options.updates,
    }
    training_runs.train(folder, options.updates, given)


def judge(folder: Path, valid: Sequence[SourceConfig]) -> dict[str, float]:
    """Fact-EM on each validation file."""
    model = QRAGModel.from_pretrained(folder / "model")
    found: dict[str, float] = {}
    for source in valid:
        samples = source.open()
        assert isinstance(samples, SampleList)
        budget = _STEPS.get(source.format, model.config.max_steps)
        judged = evaluate(model, samples, SearchOptions(budget))
        found[source.format] = round(judged["fact_em"], 4)
    return found


def draw(rows: Sequence[Mapping[str, Any]], names: Sequence[str], file: Path) -> None:
    figure, (axis,) = figures.panels(1)
    counts = [row["questions"] for row in rows]
    for name in names:
        axis.plot(counts, [row[name] for row in rows], "o-", label=name)
    axis.set(xscale="log", xlabel="annotated questions", ylabel="Fact-EM", ylim=(0, 1.03))
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figures.save(figure, file, "curve")


if __name__ == "__main__":
    told(main)
