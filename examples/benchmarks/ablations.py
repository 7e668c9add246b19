"""What each part of the method is worth: BabiLong QA2 without it (the paper's Table 3).

    python examples/benchmarks/ablations.py --config examples/configs/babilong_qa2.yaml \
        --questions VALID.txt --background BOOKS --updates 800 --json FILE

Trains one model for each variant with the same number of updates and judges it as babilong.py
does. A training that was interrupted goes on, and one that is finished is not made again.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training_runs
import yaml
from babilong import add_story_options, files_of, judge, show, tasks
from bench import Results, load
from machine import made_from, report, told
from torch import Tensor

from qrag_train.build import build_module
from qrag_train.data import BackgroundText
from qrag_train.rollout import EpisodeStream
from qrag_train.texts import TextTable
from qrag_train.validation import ValidatedTrainingModule

# options of qrag-train fit that differ from the config
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no soft Q": {"model.pqn.alpha": 1e-3},
    "no target networks": {"model.pqn.tau": 1.0},
    "target networks": {"model.pqn.tau": 0.05},
    "supervised": {},
    "untrained": {"model.optimizer.lr": 1e-12, "model.optimizer.warmup_updates": 0},
    "no positions": {"model.positions": "none"},
    "truncated positions": {"model.settings.truncate_positions": True},
    "two critics": {"model.pqn.n_critics": 2},
    "discount 0.99": {"model.pqn.gamma": 0.99},
    "completion reward alone": {"model.pqn.reward.fact_share": 0.0},
    "episodes end with success": {"model.pqn.reward.stop_on_success": True},
    "all chunks embedded at every update": {"model.pqn.refresh_every": 0},
}
_CANDIDATES = 8


class SupervisedModule(ValidatedTrainingModule):
    """Learns to tell missing support from other chunks: cross-entropy, no episodes, no values.

    A state holds some of the support; the logits are Q/α of the missing support and random chunks.
    """

    def training_step(self, batch: EpisodeStream, batch_idx: int) -> Tensor:
        del batch_idx
        if not hasattr(self, "table"):
            self.table = TextTable(self.model)
        rng = np.random.default_rng((self.seed, self.global_step))
        n_states = self.pqn.environments * self.budget
        states, texts, rho, missing = [], [], [], []
        scheme = self.model.config.position_scheme
        for number in range(n_states):
            sample = batch[self.global_step * n_states + number]
            support = rng.permutation(sample.support).tolist()
            found = sorted(support[: rng.integers(len(support))])
            wanted = [chunk for chunk in support if chunk not in found]
            others = [i for i in rng.permutation(len(sample.chunks)).tolist() if i not in support]
            chunks = (wanted + others)[:_CANDIDATES]
            states += [(sample.question, [sample.chunks[i] for i in found])] * len(chunks)
            texts += [sample.chunks[i] for i in chunks]
            rho += scheme.positions(len(sample.chunks), found)[chunks].tolist()
            missing.append([float(i < len(wanted)) / len(wanted) for i in range(len(chunks))])
        state_ids = self.table.state_ids(states)
        action_ids = self.table.action_ids(self.table.numbers(texts).tolist())
        q = self.q_values(state_ids, action_ids, torch.tensor(rho)).sum(dim=-1)
        logits = q.reshape(n_states, _CANDIDATES) / self.pqn.alpha
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(missing))
        self.log("loss", loss.detach(), batch_size=1)
        self.log("transitions_per_s", 0.0, batch_size=1)
        return loss


@functools.wraps(build_module)
def build_supervised(**settings: Any) -> ValidatedTrainingModule:
    module = build_module(**settings)
    return SupervisedModule(
        module.model, module.pqn, module.optimizer_config, seed=settings["seed"]
    )


# the command line wants another name for each
build_supervised.__qualname__ = "build_supervised"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    add_story_options(parser)
    options = parser.parse_args()
    results = Results(options, "babilong")
    (task,) = tasks(options)
    background = BackgroundText.from_folder(options.background)
    rows = []
    models: dict[str, str] = {}
    for variant in options.variants:
        if is_full(variant, options.config):
            print(f"{variant}: {options.config} has that already, so there is nothing to compare")
            continue
        folder = options.folder / variant.replace(" ", "_")
        train(variant, folder, options)
        model = load(folder, background.sentences)
        row = {"variant": variant, **judge(folder, model, task, background, options, results)}
        rows.append(row)
        print(variant, end=" | ")
        show(row)
        models[variant] = model.digest
        sources = made_from(models, [options.config, *files_of(options)])
        report(options.json, options.seed, **sources, config=options.config.name, variants=rows)


def is_full(variant: str, config: Path) -> bool:
    """Whether a config has all settings of a variant, which would be the full method again."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if VARIANTS[variant] else {}

    def value_of(name: str) -> Any:
        return functools.reduce(lambda part, key: (part or {}).get(key), name.split("."), settings)

    given = VARIANTS[variant]
    return bool(given) and all(value_of(name) == value for name, value in given.items())


def train(variant: str, folder: Path, options: argparse.Namespace) -> None:
    updates = 1 if variant == "untrained" else options.updates
    given = {
        "config": options.config,
        "trainer.val_check_interval": max(1, updates // 10),
        **VARIANTS[variant],
    }
    build = build_supervised if variant == "supervised" else build_module
    training_runs.train(folder, updates, given, build)


if __name__ == "__main__":
    told(main)
