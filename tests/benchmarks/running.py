"""What tests of the benchmarks share: small data, a small model, and a way to run a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qrag_retriever import QRAGModel
from qrag_train.scratch import ScratchConfig, make_encoder

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("cup", "hat", "key", "book", "lamp", "coin")
SENTENCES = [f"the {colour} {thing} fell." for colour in COLOURS for thing in THINGS]


def save_model(
    tmp_path: Path,
    positions: str = "none",
    texts: tuple[str, ...] = (),
    q_threshold: float | None = 0.5,
) -> Path:
    """The folder of a model that says what it was trained from, as qrag-train's do."""
    config = ScratchConfig(layers=1, dimension=32, heads=2, vocabulary=300, max_tokens=256)
    made = make_encoder(tmp_path / "encoder", [*SENTENCES, *texts, "where is"], config)
    start = {"encoder": str(made), "scratch": None, "settings": {"scale": 0.2}}
    training = {"settings": {"model": start}}
    model = QRAGModel.from_encoder(
        made,
        positions,
        device="cpu",
        scale=0.2,
        max_steps=2,
        training=training,
        q_threshold=q_threshold,
    )
    return model.save_pretrained(tmp_path / "runs" / "mine" / "model")


def write_books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "book.txt").write_text(" ".join(text.capitalize() for text in SENTENCES))
    return folder


def write_hotpotqa(tmp_path: Path) -> Path:
    """Three questions in HotpotQA's shape with six paragraphs each, of which they share some."""
    records = []
    for number in range(3):
        context = [
            [f"{COLOURS[(number + i) % 5]} {thing}", ["fell", "where"]]
            for i, thing in enumerate(THINGS)
        ]
        facts = [[context[number][0], 0], [context[number + 1][0], 1]]
        question = f"where is the {context[number][0]}?"
        record = {"_id": str(number), "question": question, "answer": THINGS[number]}
        records.append({**record, "context": context, "supporting_facts": facts})
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps(records))
    return file


def run(module: ModuleType, *arguments: object) -> None:
    """Run a benchmark in this process, as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
        module.main()
