"""Annotations of one's own as JSON lines: a document per question, or one corpus for all.

``schemas/*.json`` describe the lines of each file (JSON Schema, draft 2020-12).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qrag_train.data.problems import Problems, beyond_limits, read_lines, unwritable
from qrag_train.data.sample import SampleList, SupportSample


class _Field(NamedTuple):
    allowed: str
    fits: Callable[[Any], bool]
    required: bool = True


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _are_indices(value: Any) -> bool:
    # type(), not isinstance(): true and false are no indices
    return _are_different(value) and all(type(index) is int and index >= 0 for index in value)


def _are_names(value: Any) -> bool:
    return _are_different(value) and all(_is_name(name) for name in value)


def _are_different(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and len({repr(v) for v in value}) == len(value)


_ID = _Field("a string that is not empty", _is_name)
_METADATA = _Field("an object", lambda value: isinstance(value, dict), required=False)
_QUESTION = {
    "id": _ID,
    "question": _Field("a string that is not blank", _is_text),
    "answer": _Field(
        "a string or null", lambda value: value is None or isinstance(value, str), required=False
    ),
    "metadata": _METADATA,
}
_DOCUMENT_LINE = {
    **_QUESTION,
    "chunks": _Field("a list of strings, at least one", _are_texts),
    "support": _Field(
        "a list of different chunk numbers, counted from 0, at least one", _are_indices
    ),
}
_QUESTION_LINE = {
    **_QUESTION,
    "support": _Field("a list of different chunk ids of the corpus, at least one", _are_names),
}
_CORPUS_LINE = {
    "id": _ID,
    "text": _Field("a string that is not blank", _is_text),
    "metadata": _METADATA,
}


def read_documents_jsonl(path: str | Path) -> SampleList:
    """Read questions that each bring their own document.

    A line is ``{"id": "7", "question": "…", "chunks": ["…", …], "support": [0, 4]}``, and, if
    wanted, ``"answer"`` (string) and ``"metadata"`` (object, not read). See
    ``schemas/documents.json``.

    Args:
        path: The JSONL file, UTF-8; blank lines are skipped.

    Returns:
        One sample per line, in order.

    Raises:
        DatasetError: If the file cannot be read or lines are not as described; names each line.
    """
    problems = Problems(path)
    samples = []
    for line, record in _records(path, _DOCUMENT_LINE, problems):
        outside = [i for i in record["support"] if i >= len(record["chunks"])]
        blank = [i for i, text in enumerate(record["chunks"]) if not text.strip()]
        if blank:
            problems.add(f"line {line}", f"chunk {blank[0]} is blank; give its text")
        elif outside:
            problems.add(
                f"line {line}",
                f"'support' holds {outside[0]}, but the {len(record['chunks'])} chunks are "
                f"numbered 0 to {len(record['chunks']) - 1}",
            )
        else:
            samples.append(_sample(record, tuple(record["chunks"]), tuple(record["support"])))
    return problems.checked(samples)


def read_corpus_jsonl(corpus_path: str | Path, questions_path: str | Path) -> SampleList:
    """Read questions on one corpus.

    A line of the corpus is ``{"id": "p1", "text": "…"}`` and, if wanted, ``"metadata"``; a
    line of the questions is ``{"id": "7", "question": "…", "support": ["p1", "p9"]}`` and, if
    wanted, ``"answer"`` and ``"metadata"``. See ``schemas/corpus.json`` and
    ``schemas/questions.json``.

    Args:
        corpus_path: The JSONL file of the chunks, in document order.
        questions_path: The JSONL file of the questions.

    Returns:
        One sample per question, in order; all share one tuple of chunks.

    Raises:
        DatasetError: If a file cannot be read or lines are not as described; names each line.
    """
    problems = Problems(corpus_path)
    texts: dict[str, str] = {}
    for _, record in _records(corpus_path, _CORPUS_LINE, problems):
        texts[record["id"]] = record["text"]
    if not texts:
        problems.add("line 1", "the corpus has no valid chunk")
    problems.raise_if_any()

    chunks = tuple(texts.values())
    places = {name: place for place, name in enumerate(texts)}
    problems = Problems(questions_path)
    samples = []
    for line, record in _records(questions_path, _QUESTION_LINE, problems):
        unknown = [name for name in record["support"] if name not in places]
        if unknown:
            problems.add(
                f"line {line}",
                f"'support' holds {unknown[0]!r}, which is no id in {Path(corpus_path).name}",
            )
        else:
            support = tuple(places[name] for name in record["support"])
            samples.append(_sample(record, chunks, support))
    return problems.checked(samples)


def _sample(
    record: Mapping[str, Any], chunks: tuple[str, ...], support: tuple[int, ...]
) -> SupportSample:
    return SupportSample(record["id"], record["question"], chunks, support, record.get("answer"))


def _records(
    path: str | Path, fields: Mapping[str, _Field], problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of every valid line; what is wrong with the others is noted."""
    first_line: dict[str, int] = {}
    for number, line in read_lines(path):
        record, wrong = _parsed(line, fields)
        if not wrong:
            earlier = first_line.setdefault(record["id"], number)
            if earlier != number:
                wrong = [f"the id {record['id']!r} stands in line {earlier} already"]
        for message in wrong:
            problems.add(f"line {number}", message)
        if not wrong:
            yield number, record


def _parsed(line: str, fields: Mapping[str, _Field]) -> tuple[dict[str, Any], list[str]]:
    """The record of a line, and what is wrong with it."""
    try:
        record = json.loads(line)
        if isinstance(record, dict):
            return record, _wrong(record, fields)
    except json.JSONDecodeError as error:
        return {}, [f"not valid JSON ({error.msg}, column {error.colno})"]
    except (RecursionError, ValueError) as error:
        return {}, [f"{beyond_limits(error)}; give {', '.join(map(repr, fields))} as described"]
    return {}, [f"expected an object with {', '.join(map(repr, fields))}"]


def _wrong(record: Mapping[str, Any], fields: Mapping[str, _Field]) -> list[str]:
    wrong = [
        f"unknown key {key!r}; allowed: {', '.join(map(repr, fields))}"
        for key in record
        if key not in fields
    ]
    for key, field in fields.items():
        if key not in record:
            if field.required:
                wrong.append(f"{key!r} is missing; give {field.allowed}")
        elif not field.fits(record[key]):
            given = json.dumps(record[key], ensure_ascii=False)
            given = given if len(given) <= 60 else given[:57] + "…"
            wrong.append(f"{key!r} is {given}; give {field.allowed}")
        else:
            wrong += _unwritable(key, record[key])
    return wrong


def _unwritable(key: str, value: Any) -> list[str]:
    """What of a text, or of a list of them, is no text in UTF-8."""
    texts = {repr(key): value}
    if isinstance(value, list):
        texts = {f"{key!r}[{place}]": part for place, part in enumerate(value)}
    return [
        f"{name} holds {character}, half of a character; give the whole character"
        for name, text in texts.items()
        if isinstance(text, str) and (character := unwritable(text)) is not None
    ]
