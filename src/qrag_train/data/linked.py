"""Questions made up from passages that name one another, where nobody has annotated any."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.passages import passage
from qrag_train.data.problems import Problems, read_lines, read_records
from qrag_train.data.sample import SupportSample

T = TypeVar("T")

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_IN_BRACKETS = re.compile(r"\s*\([^)]*\)$")
# Words that occur in more passages than this say too little to look like a question.
_COMMON = 200
_LONGEST = 3  # passages on the way from the first to the last
_LONGEST_NAME = 6  # words
_SHORTEST_NAME = 8  # letters
# Part of the candidates that resemble the question most, if there are as many; others are random.
_HARD = 0.7
_ASKING = ("what", "which", "who", "that", "the one")


class Passage(NamedTuple):
    """A titled text."""

    title: str
    text: str


class Link(NamedTuple):
    """A passage whose sentence names the title of another passage."""

    source: int
    target: int
    sentence: str


class LinkedPassages:
    """Makes up questions whose evidence lies in two or three passages, without end.

    Where passage A names the title of passage B, a question describes A, what it says of B without
    the name, and something that stands only in B: A has to be found to know that B is needed. The
    other candidates share rare words with the question or are linked to its passages. The
    questions are no English that a person would write; they train what annotated questions are
    too few for.

    Args:
        passages: Titled texts, such as the paragraphs of an encyclopaedia.
        candidates: Number of chunks of a sample.

    Raises:
        DatasetError: If no passage names another one's title.

    Example:
        >>> source = LinkedPassages(
        ...     [
        ...         Passage("Treasure Island", "A novel by Robert Louis Stevenson of 1881."),
        ...         Passage("Robert Louis Stevenson", "He was born in Edinburgh in 1850."),
        ...     ],
        ...     candidates=2,
        ... )
        >>> sorted(source.sample(np.random.default_rng(0)).support)
        [0, 1]
    """

    def __init__(self, passages: Iterable[Passage], candidates: int = 10) -> None:
        by_text = {passage(*p): p for p in passages}
        self._chunks, self._passages = list(by_text), list(by_text.values())
        self._candidates = min(candidates, len(self._chunks))
        self._from: dict[int, list[Link]] = defaultdict(list)
        self._to: dict[int, list[Link]] = defaultdict(list)
        for link in find_links(self._passages):
            self._from[link.source].append(link)
            self._to[link.target].append(link)
        if not self._from:
            raise DatasetError("No passage names another one's title; give passages that do.")
        self._targets = sorted(self._to)
        self._rare = _rare_words(self._chunks)

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw a way along links and describe it."""
        links = self._way(rng)
        question = self._question(links, rng)
        support = [links[0].source, *(link.target for link in links)]
        others = self._lookalikes(question, links, set(support), rng)
        chosen = rng.permutation(support + others[: self._candidates - len(support)]).tolist()
        return SupportSample(
            id="-".join(map(str, support)),
            question=question,
            chunks=tuple(self._chunks[i] for i in chosen),
            support=tuple(sorted(chosen.index(i) for i in support)),
        )

    def _way(self, rng: np.random.Generator) -> list[Link]:
        """Links that lead from a passage to a second one and perhaps further."""
        # by target, as few passages are named by very many
        last = _one_of(self._to[_one_of(self._targets, rng)], rng)
        links = [last]
        while len(links) < _LONGEST - 1 and rng.random() < 0.25:
            on_way = {link.target for link in links}
            before = [
                link for link in self._to.get(links[0].source, []) if link.source not in on_way
            ]
            if not before:
                break
            links.insert(0, _one_of(before, rng))
        return links

    def _question(self, links: Sequence[Link], rng: np.random.Generator) -> str:
        first, end = self._passages[links[0].source], self._passages[links[-1].target]
        parts = [first.title] if rng.random() < 0.7 else []
        for link in links:
            name = bare(self._passages[link.target].title)
            said = link.sentence.replace(name, str(rng.choice(_ASKING)))
            said = said.replace(bare(self._passages[link.source].title), "")
            parts.append(_fragment(said, rng))
        told = [s.replace(bare(end.title), "") for s in _SENTENCE.split(end.text)]
        parts.append(_fragment(_one_of(told, rng), rng))
        if rng.random() < 0.3:
            parts.reverse()
        return ", ".join(part for part in parts if part) + "?"

    def _lookalikes(
        self, question: str, links: Sequence[Link], support: set[int], rng: np.random.Generator
    ) -> list[int]:
        """Passages that are no support but share rare words or links with it, the most first."""
        score: dict[int, float] = defaultdict(float)
        for word in dict.fromkeys(_words(question)):  # in the same order in every process
            for number in self._rare.get(word, ()):
                score[number] += 1 / len(self._rare[word])
        for link in links:
            for near in (*self._from.get(link.source, ()), *self._to.get(link.target, ())):
                for number in (near.source, near.target):
                    score[number] += 0.05
        # a passage that names the target as well would answer as well
        same = {near.source for link in links for near in self._to[link.target]}
        ranked = sorted(score, key=lambda number: -score[number])
        found = [number for number in ranked if number not in support | same]
        known = support | same | set(found)
        rest = [number for number in self._some(rng) if number not in known]
        hard = found[: max(1, int(_HARD * self._candidates))]
        return hard + rest + found[len(hard) :]

    def _some(self, rng: np.random.Generator) -> list[int]:
        count = min(4 * self._candidates, len(self._chunks))
        numbers: list[int] = rng.choice(len(self._chunks), size=count, replace=False).tolist()
        return numbers


def read_passages(path: str | Path) -> list[Passage]:
    """The titled paragraphs of a file, each once.

    Args:
        path: JSON list or JSONL of ``{"title", "text"}``, or an official file of HotpotQA,
            2WikiMultiHopQA or MuSiQue, whose questions are not looked at.

    Raises:
        DatasetError: If the file cannot be read or records are not as described; names them.
    """
    problems = Problems(path)
    lines = [line for _, line in read_lines(path)]
    listed = lines and lines[0].lstrip().startswith("[")
    found: dict[Passage, None] = {}
    for number, record in enumerate(read_records(path) if listed else lines):
        with problems.at(f"record {number}"):
            fields = record if isinstance(record, dict) else json.loads(record)
            found.update(dict.fromkeys(_passages(fields)))
    problems.raise_if_any()
    return list(found)


def _passages(record: dict[str, Any]) -> list[Passage]:
    if "context" in record:
        return [Passage(title, " ".join(text)) for title, text in record["context"]]
    if "paragraphs" in record:
        return [Passage(p["title"], p["paragraph_text"]) for p in record["paragraphs"]]
    return [Passage(record["title"], record["text"])]


def find_links(passages: Sequence[Passage]) -> Iterator[Link]:
    """Where a passage names the title of another one, what is in brackets left out.

    Short titles are passed over: too often they mean something else. So are titles
    that several passages have.
    """
    named: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, (title, _) in enumerate(passages):
        named[tuple(_WORD.findall(bare(title)))].append(number)
    target_of = {
        name: numbers[0]
        for name, numbers in named.items()
        if len(numbers) == 1 and len("".join(name)) >= _SHORTEST_NAME
    }
    for source, (title, text) in enumerate(passages):
        for sentence in _SENTENCE.split(text):
            for name in _runs(_WORD.findall(sentence), _LONGEST_NAME):
                target = target_of.get(name, source)
                whole = bare(passages[target].title) in sentence
                if whole and target != source and name[0] not in title:
                    yield Link(source, target, sentence)


def _runs(words: Sequence[str], longest: int) -> Iterator[tuple[str, ...]]:
    """All runs of consecutive words."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            yield tuple(words[start:end])


def bare(title: str) -> str:
    """A title without what distinguishes it in brackets.

    Example:
        >>> bare("Mercury (planet)")
        'Mercury'
    """
    return _IN_BRACKETS.sub("", title)


def _fragment(sentence: str, rng: np.random.Generator) -> str:
    """Some consecutive words."""
    words = sentence.split()
    count = int(rng.integers(4, 13))
    start = int(rng.integers(max(len(words) - count, 0) + 1))
    return " ".join(words[start : start + count]).strip(" .,;:?!")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _rare_words(chunks: Sequence[str]) -> dict[str, list[int]]:
    """The passages of each word that not too many have."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, chunk in enumerate(chunks):
        for word in set(_words(chunk)):
            places[word].append(number)
    return {word: where for word, where in places.items() if len(where) <= _COMMON}


def _one_of(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]
