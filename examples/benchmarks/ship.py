"""Make a trained run a model of the package: calibrated, in compact form, with its log.

    python examples/benchmarks/ship.py runs/multihop_en_further --name multihop-en \
        --beside multihop-en --share 0.2 --keep-em 0.04 \
        --set max_chunk_tokens=256 max_chunk_tokens_in_state=128 max_state_tokens=512 alpha=0.1
    python examples/benchmarks/ship.py runs/babilong_lookalikes --last --beside babilong \
        --name babilong --balance --set max_steps=6 alpha=0.01 \
        --questions examples/configs/babilong_threshold.yaml

Of several runs, stages of one training, the model is the mean of their weights; its card has the
settings of the first. With ``--last`` the weights at the end of each run count beside its best, and
``--beside`` takes a further model in, such as the one that the package had, with a ``--share`` of
the mean.
With ``--balance`` the components of action embeddings are made equally large, which changes no Q
but keeps more of it in an index of int8; a balanced model is none to be taken in ``--beside`` runs
that did not start from it.
The threshold is chosen on the last run's own validation questions, or on the sources that
``--questions`` names, by the compact model, whose weights are a little coarser. Writes the model
to src/qrag_retriever/models and the trainings' configs, logs and curves to
examples/benchmarks/results.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from qrag_retriever import QRAGConfig, QRAGModel, SearchOptions, compact
from qrag_retriever.config import CONFIG_FILE
from qrag_retriever.search import Beam
from qrag_train.balance import balance
from qrag_train.calibration import (
    Calibration,
    choose_threshold,
    judge_thresholds,
    model_config,
    write_threshold,
)
from qrag_train.card import model_card
from qrag_train.data import SupportSample, finite
from qrag_train.data.source import SourceConfig
from qrag_train.evaluation import judge, search_samples
from qrag_train.run_folder import RunFolder, model_of

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "src" / "qrag_retriever" / "models"
LOGS = ROOT / "examples" / "benchmarks" / "results" / "models"
_CHUNKS = 5000  # to balance on


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        plain, small = Path(place, options.name), Path(place, "compact")
        shutil.copytree(options.runs[0].model, plain)
        parts = [run.model for run in options.runs]
        if options.last:
            parts += [last_weights(run, Path(place, str(i))) for i, run in enumerate(options.runs)]
        shares = [1 / len(parts)] * len(parts)
        if options.beside is not None:
            parts.append(unpacked(model_of(options.beside), Path(place, "beside")))
            shares = [*((1 - options.share) * share for share in shares), options.share]
        average(parts, plain, shares)
        change(plain / CONFIG_FILE, dict(options.set))
        samples = questions(options)
        if options.balance:
            even_out(plain, samples)
        model = pack(plain, small)
        budget = model.config.max_steps
        beams = search_samples(model, samples, SearchOptions(budget, runners_up=0))
        supports = [sample.support for sample in samples]
        if len(parts) > 1 or options.set:
            describe(plain / CONFIG_FILE, options, judge(beams, supports, budget))
        chosen = calibrated(beams, supports, options.keep_em)
        card = model_card(plain.name, model_config(plain))
        (plain / "README.md").write_text(card, encoding="utf-8")
        write_threshold(plain, chosen, budget)
        pack(plain, small)
        target = MODELS / options.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(small, target)
    for run in options.runs:
        keep_log(run, LOGS / options.name / (run.path.name if len(options.runs) > 1 else ""))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
    print(f"{options.name}: {size:.1f} MB, {chosen}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=run_folder, help="folders of qrag-train fit")
    parser.add_argument("--name", required=True, help="name of the model in the package")
    parser.add_argument(
        "--last", action="store_true", help="take the mean of each run's best and last weights"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="MODEL",
        help="a model of the same start, or a run, whose weights are part of the mean",
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the model beside in the mean, from 0 to 1"
    )
    parser.add_argument(
        "--balance",
        action="store_true",
        help="make the components of action embeddings equally large",
    )
    parser.add_argument(
        "--keep-em",
        type=float,
        help="Fact-EM that stopping early may cost; left out: the best Fact-F1 is chosen",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        help="YAML file, a list of sources as in a config, to choose the threshold on",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        type=setting,
        metavar="NAME=NUMBER",
        help="settings of the model other than in training, such as max_chunk_tokens=160",
    )
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        parser.error(f"--share {options.share} is not allowed; give a number from 0 to 1")
    return options


def run_folder(text: str) -> RunFolder:
    return RunFolder(Path(text))


def setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else float(value)


def change(file: Path, values: dict[str, float]) -> None:
    """Change settings of a model folder."""
    config = QRAGConfig.from_json(file.read_text(encoding="utf-8"))
    file.write_text(config.replace(**values).to_json(), encoding="utf-8")


def average(folders: Sequence[Path], target: Path, shares: Sequence[float]) -> None:
    """Replace the weights of a model folder by the weighted mean over folders of the same kind."""
    for file in sorted(target.rglob("*.safetensors")):
        parts = [load_file(folder / file.relative_to(target)) for folder in folders]
        means = {
            name: sum(
                share * part[name].double() for share, part in zip(shares, parts, strict=True)
            ).to(tensor.dtype)
            for name, tensor in parts[-1].items()
        }
        save_file(means, file, metadata={"format": "pt"})


def even_out(folder: Path, samples: Sequence[SupportSample]) -> None:
    """Balance the weights of a model folder, on the chunks of some questions."""
    chunks = dict.fromkeys(chunk for sample in samples for chunk in sample.chunks)
    model = QRAGModel.from_pretrained(folder, device="cpu")
    balance(model, list(itertools.islice(chunks, _CHUNKS)))
    with tempfile.TemporaryDirectory() as place:
        balanced = model.save_pretrained(Path(place, "model"))
        for file in folder.rglob("*.safetensors"):
            shutil.copy(balanced / file.relative_to(folder), file)


def last_weights(run: RunFolder, target: Path) -> Path:
    """Write a model folder with the weights at the end of a run, means over its last updates."""
    state = torch.load(run.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = QRAGModel.from_pretrained(run.model, device="cpu")
    averaged = {name: value for name, value in state.items() if name.startswith("averaged.")}
    model.load_state_dict({name.partition(".")[2]: value for name, value in averaged.items()})
    return model.save_pretrained(target)


def unpacked(model: str, target: Path) -> Path:
    """Write a model as a plain folder."""
    return QRAGModel.from_pretrained(model, device="cpu").save_pretrained(target)


def describe(file: Path, options: argparse.Namespace, found: dict[str, float]) -> None:
    """Say in a model's settings which weights it is the mean of, if of several, and how it does."""
    config = QRAGConfig.from_json(file.read_text(encoding="utf-8"))
    names = [run.path.name for run in options.runs]
    parts = [
        *names,
        *(f"the end of {name}" for name in names if options.last),
        *([f"{options.beside.name}, {options.share:g} of the mean"] if options.beside else []),
    ]
    training = {
        **config.training,
        **({"mean_of": parts} if len(parts) > 1 else {}),
        "max_steps": config.max_steps,
        "updates": sum(updates(run, options.last) for run in options.runs),
        "figures": {name: found[name] for name in ("fact_em", "fact_f1")},
    }
    file.write_text(config.replace(training=training).to_json(), encoding="utf-8")


def updates(run: RunFolder, last: bool) -> int:
    """Updates that a run's best, or last, weights took."""
    if last:
        return int(run.settings()["trainer"]["max_steps"])
    text = (run.model / CONFIG_FILE).read_text(encoding="utf-8")
    return int(QRAGConfig.from_json(text).training.get("updates", 0))


def pack(plain: Path, small: Path) -> QRAGModel:
    """Write the compact form anew and load it."""
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir()
    compact.pack(plain, small)
    return QRAGModel.from_pretrained(small, device="cpu")


def questions(options: argparse.Namespace) -> list[SupportSample]:
    """The questions to choose the threshold on: all of a file, some of what is made up."""
    if options.questions is None:
        sources = options.runs[-1].settings()["data"]["val"]
    else:
        sources = yaml.safe_load(options.questions.read_text(encoding="utf-8"))
    found: list[SupportSample] = []
    for values in sources:
        found += finite(SourceConfig(**values).open())
    return found


def calibrated(
    beams: Sequence[Beam], supports: Sequence[Sequence[int]], keep_em: float | None
) -> Calibration:
    """The threshold, by the best Fact-F1 or by the Fact-EM that remains."""
    thresholds = judge_thresholds(beams, supports)
    target = None if keep_em is None else thresholds.lowest.fact_em - keep_em
    return choose_threshold(thresholds, target)


def keep_log(run: RunFolder, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    config = run.settings_file.read_text(encoding="utf-8")
    # where it ran is nobody's business
    config = re.sub(r"(?m)^output_dir: .*$", f"output_dir: runs/{run.path.name}", config)
    (target / "config.yaml").write_text(config, encoding="utf-8")
    shutil.copy(run.curves, target)
    # a run that was resumed has a log of each part
    parts = sorted(run.logs.glob("*/metrics.csv"), key=lambda file: file.stat().st_mtime)
    for number, part in enumerate(parts):
        shutil.copy(part, target / f"metrics_{number}.csv")


if __name__ == "__main__":
    main()
