"""A small model and an easy source of samples, for tests of training."""

from __future__ import annotations

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


def tiny_model(folder: Path, positions: str = "relative", **settings: object) -> QRAGModel:
    texts = [f"where is the {colour} {thing} and fell" for colour in COLOURS for thing in THINGS]
    config = ScratchConfig(layers=1, dimension=32, heads=2, vocabulary=200, max_tokens=64)
    encoder = make_encoder(folder, texts, config)
    return QRAGModel.from_encoder(
        encoder, positions, device="cpu", max_steps=settings.pop("max_steps", 2), **settings
    )
