"""MuSiQue: twenty paragraphs a question, two to four of them supporting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qrag_train.data.passages import passage
from qrag_train.data.problems import Problems, read_lines
from qrag_train.data.sample import SampleList, SupportSample


def read_musique(path: str | Path) -> SampleList:
    """Read an official JSONL file (``musique_ans_v1.0_train.jsonl`` and the like).

    One chunk per paragraph, ``"Title. text"``; the support are the paragraphs marked
    ``is_supporting``. Questions marked unanswerable (MuSiQue-Full) are left out: part of their
    support was removed on purpose.

    Args:
        path: The unpacked JSONL file.

    Returns:
        One sample per answerable question, in the file's order.

    Raises:
        DatasetError: If the file cannot be read or records are not as described; names them.
    """
    problems = Problems(path)
    samples = []
    for number, line in read_lines(path):
        with problems.at(f"line {number}"):
            record = json.loads(line)
            if record.get("answerable", True):
                samples.append(_sample(record))
    return problems.checked(samples)


def _sample(record: dict[str, Any]) -> SupportSample:
    paragraphs = record["paragraphs"]
    return SupportSample(
        id=record["id"],
        question=record["question"],
        chunks=tuple(passage(p["title"], p["paragraph_text"]) for p in paragraphs),
        support=tuple(i for i, p in enumerate(paragraphs) if p["is_supporting"]),
        answer=record.get("answer"),
        other_answers=tuple(record.get("answer_aliases", ())),
    )
