"""Questions on one corpus, each with a small set of candidates to learn from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.sample import SupportSample

if TYPE_CHECKING:
    from collections.abc import Sequence


class CandidateSets:
    """Draws questions with a candidate set: the support, hard negatives and random chunks.

    The candidates stand in document order. Hard negatives are what a model would rather retrieve;
    until `hard_negatives` is given some, random chunks take their place.

    Args:
        questions: Questions that share one corpus as their chunks.
        size: Number of candidates; the whole corpus where it is smaller.
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

    def __len__(self) -> int:
        return len(self.questions)

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw a question with its candidates."""
        number = int(rng.integers(len(self.questions)))
        question = self.questions[number]
        total = len(question.chunks)
        chosen = dict.fromkeys((*question.support, *self.hard_negatives[number][: self._hard]))
        size = min(self._size, total)
        # as many random ones as could be needed, were all of those chosen already among them
        for chunk in rng.choice(total, size=min(size + len(chosen), total), replace=False).tolist():
            if len(chosen) >= size:
                break
            chosen.setdefault(chunk)
        candidates = sorted(list(chosen)[:size])
        place = {chunk: i for i, chunk in enumerate(candidates)}
        return SupportSample(
            question.id,
            question.question,
            tuple(question.chunks[chunk] for chunk in candidates),
            tuple(place[chunk] for chunk in question.support),
            question.answer,
        )
