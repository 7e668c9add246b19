"""Trained transitions per second with all-MiniLM-L6-v2, and where the time of an update goes.

    python examples/benchmarks/training_speed.py --json FILE

The setting in which the code released with the paper makes 3.5 transitions a second on one thread:
6 layers, documents of 50 chunks of about 8 words, a budget of 6 steps, both encoders trained.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from machine import machine, report

from qrag_train.build import build_module
from qrag_train.data import BabiLong, BabiSimulator, BackgroundText, split_sentences
from qrag_train.loader import RolloutLoader
from qrag_train.settings import PQNConfig

BOOK = Path(__file__).parents[1] / "data" / "treasure_island.txt"
RELEASED_CODE = 3.5
STEPS, CHUNKS = 6, 50
CASES: dict[str, dict[str, Any]] = {
    "float32": {"precision": "32-true"},
    "bfloat16": {"precision": "bf16-mixed"},
    "bfloat16, background refreshed every 20 updates": {"precision": "bf16-mixed", "refresh": 20},
    "bfloat16, no target networks": {"precision": "bf16-mixed", "tau": 1.0},
}
# functions of an update by the file and the name they have there, and by who calls them
PHASES: dict[str, tuple[str, ...]] = {
    "chunks, without gradient": ("texts.py", "_embed"),
    "states, to choose by": ("rollout.py", "_states", "_step"),
    "states, for the values after them": ("rollout.py", "_next_values"),
    "loss, chosen chunks": ("module.py", "loss"),
    "loss, backward": ("~", "<method 'run_backward' of 'torch._C._EngineBase' objects>"),
    "optimiser": ("adam.py", "adam"),
    "target networks follow": ("module.py", "update_target"),
}


class Clock(Callback):
    """Times each update, and profiles those that count."""

    def __init__(self, skip: int) -> None:
        self._skip = skip
        self.seconds: list[float] = []  # for each transition, update by update
        self.profile = cProfile.Profile()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step >= self._skip:
            self.profile.enable()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        self.profile.disable()
        if trainer.global_step > self._skip:
            self.seconds.append(1 / float(trainer.callback_metrics["transitions_per_s"]))


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    sentences = split_sentences(BOOK.read_text(encoding="utf-8"))
    short = BackgroundText([s for s in sentences if 5 <= len(s.split()) <= 11])
    source = BabiLong(BabiSimulator(task=3), short, (CHUNKS, CHUNKS))
    rows = [measure(name, source, options) for name in options.cases]
    show(rows)
    if options.json:
        report(
            options.json,
            options.seed,
            released_code_per_s=RELEASED_CODE,
            environments=options.environments,
            cases=rows,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--environments", type=int, default=32)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def measure(name: str, source: BabiLong, options: argparse.Namespace) -> dict[str, Any]:
    """Train for a few updates, of which the first two do not count.

    Where embeddings are refreshed now and then it is as many updates as they last, after as many.
    """
    case = CASES[name]
    refresh = case.get("refresh", 0)
    skip, updates = 2 + refresh, max(options.updates, refresh)
    lightning.seed_everything(options.seed, verbose=False)
    pqn = PQNConfig(
        environments=options.environments,
        random_transitions=0,
        refresh_every=refresh,
        tau=case.get("tau", PQNConfig.tau),
    )
    module = build_module(positions="relative", max_steps=STEPS, pqn=pqn, seed=options.seed)
    clock = Clock(skip)
    trainer = lightning.Trainer(
        max_steps=skip + updates,
        precision=case["precision"],
        accelerator="cpu",
        gradient_clip_val=2.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, RolloutLoader(source, skip + updates, seed=options.seed))
    assert module.collector is not None
    speed = 1 / (statistics.mean if refresh else statistics.median)(clock.seconds)
    return {
        "case": name,
        "transitions_per_s": round(speed, 2),
        "times_released_code": round(speed / RELEASED_CODE, 2),
        "updates": updates,
        "share_of_time": shares(clock.profile),
    }


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """How much of the time each phase took."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(row[2] for row in stats.values())
    ran = {(Path(path).name, function) for path, _, function in stats}
    if renamed := [phase for phase, place in PHASES.items() if place[:2] not in ran]:
        raise SystemExit(f"No function ran for {renamed}; correct their names in PHASES.")
    found = {phase: seconds_in(stats, *place) for phase, place in PHASES.items()}
    parts = {phase: round(seconds / total, 3) for phase, seconds in found.items()}
    return {**parts, "the rest": round(1 - sum(parts.values()), 3)}


def seconds_in(stats: dict[Any, Any], file: str, name: str, caller: str | None = None) -> float:
    """Time in a function and what it calls, of all its calls or those from one other function."""
    found = 0.0
    for (path, _, function), (*_, seconds, callers) in stats.items():
        if (Path(path).name, function) == (file, name):
            calls = [times[3] for (_, _, by), times in callers.items() if by == caller]
            found += seconds if caller is None else sum(calls)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{machine()['threads']} thread(s)\n")
    for row in rows:
        print(f"{row['case']}: {row['transitions_per_s']:.1f} transitions/s", end="")
        print(f" ({row['times_released_code']:.1f} x the released code)")
        for phase, share in row["share_of_time"].items():
            print(f"    {phase:33} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
