"""A small model and an easy source of samples, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qrag_retriever.model import QRAGModel
from qrag_train.data.sample import SupportSample
from qrag_train.scratch import ScratchConfig, make_encoder

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("cup", "hat", "key", "book", "lamp", "coin")


class Colours:
    """Asks for the place of a thing among ``n`` chunks that each name one thing and a colour."""

    def __init__(self, n: int = 6, support: int = 1) -> None:
        self.n, self.support = n, support

    def sample(self, rng: np.random.Generator) -> SupportSample:
        things = [THINGS[i % len(THINGS)] for i in rng.permutation(self.n)]
        chunks = tuple(f"the {rng.choice(COLOURS)} {thing} fell" for thing in things)
        wanted = tuple(sorted(rng.choice(self.n, size=self.support, replace=False).tolist()))
        names = " and ".join(things[i] for i in wanted)
        return SupportSample(f"{rng.integers(10**9)}", f"where is the {names}", chunks, wanted)


def write_questions(file: Path, count: int, seed: int = 0, support: int = 1) -> Path:
    """A JSONL file of such questions."""
    rng = np.random.default_rng(seed)
    samples = [Colours(support=support).sample(rng) for _ in range(count)]
    lines = [
        {"id": f"{seed}-{i}", "question": s.question, "chunks": s.chunks, "support": s.support}
        for i, s in enumerate(samples)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def fit_options(folder: Path, updates: int = 6, **options: object) -> list[str]:
    """The command that trains a new, tiny encoder; writes its data into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "data.train_file": write_questions(folder / "train.jsonl", 40, seed=1),
        "data.val_file": write_questions(folder / "val.jsonl", 12, seed=2),
        "output_dir": folder / "run",
        "model.scratch.layers": 1,
        "model.scratch.dimension": 32,
        "model.scratch.heads": 2,
        "model.scratch.vocabulary": 200,
        "model.scratch.max_tokens": 64,
        "model.positions": "relative",
        "model.max_steps": 2,
        "model.pqn.environments": 4,
        "model.pqn.random_transitions": 8,
        "model.optimizer.lr": 3e-3,
        "model.optimizer.warmup_updates": 2,
        "trainer.max_steps": updates,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "seed_everything": 3,
        **options,
    }
    return ["fit", *(f"--{name}={value}" for name, value in values.items())]


def tiny_model(folder: Path, positions: str = "relative", **settings: object) -> QRAGModel:
    texts = [f"where is the {colour} {thing} and fell" for colour in COLOURS for thing in THINGS]
    config = ScratchConfig(layers=1, dimension=32, heads=2, vocabulary=200, max_tokens=64)
    encoder = make_encoder(folder, texts, config)
    return QRAGModel.from_encoder(
        encoder, positions, device="cpu", max_steps=settings.pop("max_steps", 2), **settings
    )
