"""HotpotQA: ten paragraphs a question, two of them supporting."""

from __future__ import annotations

from pathlib import Path

from qrag_train.data.passages import read_supporting_facts
from qrag_train.data.sample import SampleList


def read_hotpotqa(path: str | Path) -> SampleList:
    """Read an official file of the distractor setting (``hotpot_train_v1.1.json`` and the like).

    One chunk per paragraph, ``"Title. text"``; the support are the paragraphs named in
    ``supporting_facts``. Fullwiki files often lack those paragraphs and are refused.

    Args:
        path: The unpacked JSON file.

    Returns:
        One sample per question, in the file's order.

    Raises:
        DatasetError: If the file cannot be read or records are not as described; names them.
    """
    return read_supporting_facts(path)
