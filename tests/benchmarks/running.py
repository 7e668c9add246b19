"""What tests of the benchmarks share: small data, a small model, and a way to run a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples" / "benchmarks"), str(ROOT / "tests" / "qrag_train")]

from tiny import COLOURS, THINGS, tiny_model  # noqa: E402


def save_model(tmp_path: Path) -> Path:
    """The folder of a model that says what it was trained from, as qrag-train's do."""
    made = tiny_model(tmp_path / "encoder", "none", scale=0.2)
    start = {"encoder": str(tmp_path / "encoder"), "scratch": None, "settings": {"scale": 0.2}}
    training = {"settings": {"model": start}}
    made.config = made.config.replace(training=training, q_threshold=0.5)
    return made.save_pretrained(tmp_path / "runs" / "mine" / "model")


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
