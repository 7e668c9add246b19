"""Questions on one corpus, each with a small set of candidates to learn from."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.sample import SupportSample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class CandidateSets:
    """Draws questions with a candidate set: the support, hard negatives and random chunks.

    The candidates stand in document order. Hard negatives are what a model would rather retrieve;
    until `hard_negatives` is given some, random chunks take their place. A chunk that is no support
    but has the text of one is no candidate: it cannot be told from what is to be found.

    Args:
        questions: Questions that share one corpus as their chunks.
        size: Number of candidates; the whole corpus, without such chunks, where it is smaller.
        hard: Most hard negatives among them.

    Attributes:
        questions: As given.
        hard_negatives: For each question chunk numbers, the hardest first; may be empty.

    Raises:
        DatasetError: If ``size`` leaves no room for a wrong chunk beside the largest support, or
            ``hard`` is below 0.

    Example:
        >>> corpus = tuple(f"chunk {number}" for number in range(1000))
        >>> sets = CandidateSets([SupportSample("1", "Where?", corpus, (7, 900))], size=10, hard=5)
        >>> sample = sets.sample(np.random.default_rng(0))
        >>> len(sample.chunks), [sample.chunks[i] for i in sample.support]
        (10, ['chunk 7', 'chunk 900'])
    """

    def __init__(self, questions: Sequence[SupportSample], size: int, hard: int) -> None:
        largest = max(len(question.support) for question in questions)
        if size <= largest:
            raise DatasetError(
                f"candidates={size} leaves no wrong chunk beside {largest} support chunks; give "
                f"at least {largest + 1}."
            )
        if hard < 0:
            raise DatasetError(f"hard_negatives={hard} is not allowed; give at least 0.")
        self.questions = questions
        self.hard_negatives: list[list[int]] = [[] for _ in questions]
        self._size = size
        self._hard = hard
        self._twins = list(twins(questions))

    def __len__(self) -> int:
        return len(self.questions)

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw a question with its candidates."""
        number = int(rng.integers(len(self.questions)))
        question = self.questions[number]
        total, twin = len(question.chunks), self._twins[number]
        hard = [chunk for chunk in self.hard_negatives[number] if chunk not in twin]
        chosen = dict.fromkeys((*question.support, *hard[: self._hard]))
        size = min(self._size, total - len(twin))
        # as many random ones as could be needed, were all of those chosen or refused among them
        most = min(size + len(chosen) + len(twin), total)
        for chunk in rng.choice(total, size=most, replace=False).tolist():
            if len(chosen) >= size:
                break
            if chunk not in twin:
                chosen.setdefault(chunk)
        candidates = sorted(list(chosen)[:size])
        place = {chunk: i for i, chunk in enumerate(candidates)}
        return dataclasses.replace(
            question,
            chunks=tuple(question.chunks[chunk] for chunk in candidates),
            support=tuple(place[chunk] for chunk in question.support),
        )


def twins(questions: Iterable[SupportSample]) -> Iterator[dict[int, int]]:
    """For each question the chunks that are no support but have the text of one.

    Args:
        questions: The questions; the chunks of those on one corpus are compared once.

    Yields:
        The number of each such chunk, with that of the support chunk.

    Example:
        >>> list(twins([SupportSample("1", "Where?", ("a", "b", "a"), (0, 1))]))
        [{2: 0}]
    """
    chunks: tuple[str, ...] = ()
    places: dict[str, list[int]] = {}
    for question in questions:
        if question.chunks is not chunks:
            chunks, places = question.chunks, _repeated(question.chunks)
        yield {
            twin: chunk
            for chunk in question.support
            for twin in places.get(chunks[chunk], ())
            if twin not in question.support
        }


def _repeated(chunks: Sequence[str]) -> dict[str, list[int]]:
    """The texts that stand in several places, and where."""
    places: dict[str, list[int]] = {text: [] for text, n in Counter(chunks).items() if n > 1}
    if places:
        for place, text in enumerate(chunks):
            if text in places:
                places[text].append(place)
    return places
