"""What the readers of titled paragraphs have in common (HotpotQA, 2WikiMultiHopQA, MuSiQue)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrag_retriever.errors import DatasetError
from qrag_train.data.problems import Problems, read_records, record_name
from qrag_train.data.sample import SampleList, SupportSample

PASSAGE_FORMAT = "{title}. {text}"
"""The chunk that stands for a paragraph: one form for all datasets, so that they can be mixed."""


def passage(title: str, text: str) -> str:
    """The chunk of one paragraph, white space normalised.

    Example:
        >>> passage("Ada", " Ada was  a mathematician. ")
        'Ada. Ada was a mathematician.'
    """
    return " ".join(PASSAGE_FORMAT.format(title=title, text=text).split())


def first_places(titles: Iterable[str]) -> dict[str, int]:
    """Index of the first paragraph with each title.

    A paragraph that stands twice in a document counts once: finding either copy would be the same
    success, and only one can be asked for.
    """
    places: dict[str, int] = {}
    for index, title in enumerate(titles):
        places.setdefault(title, index)
    return places


def support_by_title(places: Mapping[str, int], facts: Iterable[Sequence[Any]]) -> tuple[int, ...]:
    """Indices of the paragraphs that ``supporting_facts`` names, in document order.

    Raises:
        DatasetError: If a title belongs to no paragraph.
    """
    wanted = {title for title, _ in facts}
    missing = sorted(wanted - places.keys())
    if missing:
        raise DatasetError(f"The supporting paragraph {missing[0]!r} is not among the paragraphs.")
    return tuple(sorted(places[title] for title in wanted))


def read_supporting_facts(path: str | Path) -> SampleList:
    """Read a file in HotpotQA's shape: a JSON list with ``context`` and ``supporting_facts``.

    Raises:
        DatasetError: If the file cannot be read or a record has not this shape.
    """
    problems = Problems(path)
    samples = []
    for number, record in enumerate(read_records(path)):
        with problems.at(record_name(number, record, "_id")):
            samples.append(_sample(record))
    return problems.checked(samples)


def _sample(record: dict[str, Any]) -> SupportSample:
    places = first_places(title for title, _ in record["context"])
    return SupportSample(
        id=record["_id"],
        question=record["question"],
        chunks=tuple(passage(title, " ".join(text)) for title, text in record["context"]),
        support=support_by_title(places, record["supporting_facts"]),
        answer=record.get("answer"),
    )


def pooled(samples: Sequence[SupportSample]) -> SampleList:
    """The same questions on one corpus: the chunks of all of them, equal ones once.

    Args:
        samples: Questions that each bring their own chunks.

    Returns:
        As many samples, which share one tuple of chunks.

    Example:
        >>> one = SupportSample("1", "Who?", ("a", "b"), (1,))
        >>> two = SupportSample("2", "Where?", ("b", "c"), (0, 1))
        >>> [(sample.chunks, sample.support) for sample in pooled([one, two])]
        [(('a', 'b', 'c'), (1,)), (('a', 'b', 'c'), (1, 2))]
    """
    places: dict[str, int] = {}
    for sample in samples:
        for chunk in sample.chunks:
            places.setdefault(chunk, len(places))
    corpus = tuple(places)
    return SampleList(
        dataclasses.replace(
            sample,
            chunks=corpus,
            # a passage that stands twice among a question's own counts once
            support=tuple(dict.fromkeys(places[sample.chunks[i]] for i in sample.support)),
        )
        for sample in samples
    )
