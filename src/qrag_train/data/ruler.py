"""RULER: needles, chains of variables and paragraphs hidden in a haystack of any length."""

from __future__ import annotations

import dataclasses
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.babilong import scatter
from qrag_train.data.books import BackgroundText
from qrag_train.data.problems import read_lines
from qrag_train.data.sample import SupportSample

CHARACTERS_PER_TOKEN = 4
"""Lengths are counted without a tokenizer; English prose has about so many characters a token."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

_VALUES = 4  # of multi-value, and keys of multi-key and multi-query
_HOPS = 4
_DRAWS = 1000  # in a row that give nothing new: there is nothing new


@dataclasses.dataclass(frozen=True)
class _Needles:
    """A needle-in-a-haystack task, as published.

    Attributes:
        haystack: One line again and again, sentences of books, or needles with other keys.
        keys: Number of keys with needles.
        asked: How many of them are asked about.
        values: Number of values, each in a needle of its own, of a key.
        key: Kind of key.
        value: Kind of value.
    """

    haystack: Literal["noise", "books", "needles"] = "books"
    keys: int = 1
    asked: int = 1
    values: int = 1
    key: Literal["words", "uuid"] = "words"
    value: Literal["number", "uuid"] = "number"


NEEDLES = {
    "niah_single_1": _Needles("noise"),
    "niah_single_2": _Needles(),
    "niah_single_3": _Needles(value="uuid"),
    "niah_multikey_1": _Needles(keys=_VALUES),
    "niah_multikey_2": _Needles("needles"),
    "niah_multikey_3": _Needles("needles", key="uuid", value="uuid"),
    "niah_multivalue": _Needles(values=_VALUES),
    "niah_multiquery": _Needles(keys=_VALUES, asked=_VALUES),
}
"""The eight tasks of the kind needle in a haystack."""

TASKS = (*NEEDLES, "vt", "qa_1", "qa_2")
"""All tasks: needles, variable tracking, questions on one paragraph and on several."""


class Ruler:
    """Draws samples of a RULER task; nothing is kept between them.

    A chunk is a sentence, a needle, an assignment, or for questions a paragraph; the support are
    the needles asked for, the assignments of the chain, or the paragraphs with the answer.

    Args:
        task: One of `TASKS`.
        tokens: Length of the text, four characters a token; a pair: drawn anew for each sample
            between the two, both included.
        background: Books, for haystacks, and for questions where the paragraphs do not suffice.
        words: For needles: what keys are made of, see `read_words`.
        questions: For ``qa_1`` and ``qa_2``: questions with their own paragraphs. Those of all
            questions fill the text, a question's own first.

    Raises:
        DatasetError: If there is no such task, it lacks words or questions, or no token.

    Example:
        >>> books = BackgroundText(["It rained all day.", "Nobody came."])
        >>> ruler = Ruler("niah_single_2", 60, books, words=["calm", "tiger", "moss", "lake"])
        >>> sample = ruler.sample(np.random.default_rng(0))
        >>> sample.question
        'What is the special magic number for lake-moss mentioned in the provided text?'
        >>> sample.chunks[sample.support[0]]
        'One of the special magic numbers for lake-moss is: 5600228.'
    """

    def __init__(
        self,
        task: str,
        tokens: int | tuple[int, int],
        background: BackgroundText,
        *,
        words: Sequence[str] = (),
        questions: Sequence[SupportSample] = (),
    ) -> None:
        if task not in TASKS:
            raise DatasetError(f"task={task!r} is not known; give one of {', '.join(TASKS)}.")
        if task in NEEDLES and len(words) < 2:
            raise DatasetError(f"{task} makes its keys of words; give a list of words.")
        if task.startswith("qa") and not questions:
            raise DatasetError(f"{task} needs questions with paragraphs; give some.")
        low, high = (tokens, tokens) if isinstance(tokens, int) else tokens
        if not 1 <= low <= high:
            raise DatasetError(
                f"tokens={tokens!r} is not allowed; give a number of at least 1, or the least and "
                "the greatest such number."
            )
        self.task = task
        self._low, self._high = low, high
        self._background = background.passages() if task.startswith("qa") else background
        self._words = words
        self._questions = questions
        self._pool = tuple(dict.fromkeys(chunk for q in questions for chunk in q.chunks))

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """A new sample; it is never shorter than what has to be found in it."""
        room = CHARACTERS_PER_TOKEN * int(rng.integers(self._low, self._high, endpoint=True))
        if self.task in NEEDLES:
            return self._needles(NEEDLES[self.task], room, rng)
        return self._chain(room, rng) if self.task == "vt" else self._paragraphs(room, rng)

    def _name(self, rng: np.random.Generator) -> str:
        return f"{self.task}-{rng.integers(2**63):016x}"

    def _needles(self, task: _Needles, room: int, rng: np.random.Generator) -> SupportSample:
        kind = f"{task.value}s"
        keys = _different(lambda: self._key(task.key, rng))
        values = _different(lambda: _value(task.value, rng))

        def needles(key: str, count: int) -> list[tuple[str, str, str]]:
            drawn = [next(values) for _ in range(count)]
            return [
                (key, value, f"One of the special magic {kind} for {key} is: {value}.")
                for value in drawn
            ]

        told = [needle for _ in range(task.keys) for needle in needles(next(keys), task.values)]
        asked = list(dict.fromkeys(key for key, _, _ in told))[: task.asked]
        told = [told[i] for i in rng.permutation(len(told))]
        texts = [text for _, _, text in told]
        room -= _length(texts)
        if task.haystack == "books":
            noise = self._background.stretch_of(max(room, 0), rng)
        elif task.haystack == "noise":
            noise = [NOISE] * (room // (len(NOISE) + 1))
        else:
            noise = _within((needles(key, 1)[0][2] for key in keys), room)
        chunks, places = scatter(texts, noise, rng)
        wanted = [i for i, (key, _, _) in enumerate(told) if key in asked]
        return SupportSample(
            self._name(rng),
            _asking(asked, task.value, several=len(wanted) > 1),
            chunks,
            tuple(places[i] for i in wanted),
            ", ".join(told[i][1] for i in wanted),
        )

    def _key(self, kind: str, rng: np.random.Generator) -> str:
        if kind == "uuid":
            return _value("uuid", rng)
        first, second = rng.integers(len(self._words), size=2).tolist()
        return f"{self._words[first]}-{self._words[second]}"

    def _chain(self, room: int, rng: np.random.Generator) -> SupportSample:
        """A value handed on from variable to variable, told in that order."""
        letters = _different(
            lambda: "".join(string.ascii_uppercase[i] for i in rng.integers(26, size=5))
        )
        variables = [next(letters) for _ in range(_HOPS + 1)]
        value = str(rng.integers(10_000, 100_000))
        sources = [value, *(f"VAR {variable}" for variable in variables)]
        told = [f"VAR {name} = {source}" for name, source in zip(variables, sources, strict=False)]
        noise = [NOISE] * ((room - _length(told)) // (len(NOISE) + 1))
        chunks, places = scatter(told, noise, rng)
        question = f"Find all variables that are assigned the value {value} in the text above."
        return SupportSample(self._name(rng), question, chunks, tuple(places), ", ".join(variables))

    def _paragraphs(self, room: int, rng: np.random.Generator) -> SupportSample:
        """A question's paragraphs among those of others, and of books if need be, shuffled."""
        asked = self._questions[int(rng.integers(len(self._questions)))]
        support = [asked.chunks[i] for i in asked.support]
        rest = [chunk for chunk in dict.fromkeys(asked.chunks) if chunk not in support]
        own = {*support, *rest}
        order = rng.permutation(len(self._pool)).tolist()
        paragraphs = [*rest, *(self._pool[i] for i in order if self._pool[i] not in own)]
        room -= _length(support)
        noise = _within(paragraphs, room)
        if len(noise) == len(paragraphs):  # they do not suffice
            noise += self._background.stretch_of(max(room - _length(noise), 0), rng)
        noise = [noise[i] for i in rng.permutation(len(noise))]
        chunks, places = scatter([support[i] for i in rng.permutation(len(support))], noise, rng)
        return dataclasses.replace(
            asked, id=f"{asked.id}-{self._name(rng)}", chunks=chunks, support=tuple(places)
        )


def read_words(path: str | Path) -> list[str]:
    """The words of a list, one a line: those of 3 to 10 small letters.

    Raises:
        DatasetError: If the file cannot be read or has no such word.
    """
    words = [line.strip() for _, line in read_lines(path)]
    words = [word for word in words if word.isascii() and word.isalpha() and word.islower()]
    words = [word for word in words if 3 <= len(word) <= 10]
    if not words:
        raise DatasetError(f"{path} holds no word of small letters; give one word a line.")
    return words


def _asking(keys: Sequence[str], kind: str, *, several: bool) -> str:
    names = ", ".join(keys) if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    what = f"are all the special magic {kind}s" if several else f"is the special magic {kind}"
    return f"What {what} for {names} mentioned in the provided text?"


def _value(kind: str, rng: np.random.Generator) -> str:
    if kind == "uuid":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(rng.integers(1_000_000, 10_000_000))


def _different(draw: Callable[[], str]) -> Iterator[str]:
    """Draws without end, none of them twice."""
    seen: set[str] = set()
    while True:
        text = next((text for text in (draw() for _ in range(_DRAWS)) if text not in seen), None)
        if text is None:
            raise DatasetError(f"There are only about {len(seen)} different keys; give more words.")
        seen.add(text)
        yield text


def _within(texts: Iterable[str], room: int) -> list[str]:
    """The first texts that fit into so many characters."""
    taken: list[str] = []
    for text in texts:
        room -= len(text) + 1
        if room < 0:
            break
        taken.append(text)
    return taken


def _length(texts: Iterable[str]) -> int:
    return sum(len(text) + 1 for text in texts)
