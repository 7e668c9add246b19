"""2WikiMultiHopQA: ten paragraphs a question, or one corpus for all questions."""

from __future__ import annotations

from pathlib import Path

from qrag_train.data.passages import (
    first_places,
    passage,
    read_supporting_facts,
    support_by_title,
)
from qrag_train.data.problems import Problems, read_records, record_name
from qrag_train.data.sample import SampleList, SupportSample


def read_twowiki(path: str | Path) -> SampleList:
    """Read an official file (``train.json``, ``dev.json``): the shape of HotpotQA.

    One chunk per paragraph, ``"Title. text"``; the support are the two to four paragraphs named
    in ``supporting_facts``.

    Args:
        path: The unpacked JSON file.

    Returns:
        One sample per question, in the file's order.

    Raises:
        DatasetError: If the file cannot be read or records are not as described; names them.
    """
    return read_supporting_facts(path)


def read_twowiki_open(corpus_path: str | Path, questions_path: str | Path) -> SampleList:
    """Read questions that share one pooled corpus.

    Args:
        corpus_path: JSON list of ``{"title", "text"}``.
        questions_path: JSON list of records in the official shape without ``context``.

    Returns:
        One sample per question; all share one tuple of chunks.

    Raises:
        DatasetError: If a file cannot be read or records are not as described; names them.
    """
    problems = Problems(corpus_path)
    titles: list[str] = []
    chunks: list[str] = []
    for number, record in enumerate(read_records(corpus_path)):
        with problems.at(record_name(number, record, "title")):
            chunks.append(passage(record["title"], record["text"]))
            titles.append(record["title"])
    problems.raise_if_any()

    corpus, places = tuple(chunks), first_places(titles)
    problems = Problems(questions_path)
    samples = []
    for number, record in enumerate(read_records(questions_path)):
        with problems.at(record_name(number, record, "_id")):
            samples.append(
                SupportSample(
                    id=record["_id"],
                    question=record["question"],
                    chunks=corpus,
                    support=support_by_title(places, record["supporting_facts"]),
                    answer=record.get("answer"),
                )
            )
    return problems.checked(samples)
