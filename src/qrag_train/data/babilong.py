"""BabiLong: the statements of a bAbI story scattered over the sentences of books."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.books import BackgroundText
from qrag_train.data.sample import SampleSource, SupportSample

_ATTEMPTS = 1000


class BabiLong:
    """Draws stories hidden in books, up to any length; nothing is kept between samples.

    Args:
        stories: Where stories come from: ``read_babi(path)`` or ``BabiSimulator(task)``.
        background: The sentences to hide them in.
        n_sentences: Number of chunks of a document, statements included; a pair: drawn anew for
            each document between the two, both included. The paper's 1K, 4K, 32K, 128K, 1M and
            10M tokens are 50, 160, 1,200, 4,600, 40,000 and 400,000 sentences.

    Raises:
        DatasetError: If ``n_sentences`` is below 1 or its two values are in the wrong order.

    Example:
        >>> from qrag_train.data import BabiSimulator
        >>> background = BackgroundText(["It rained.", "It poured.", "It stopped."])
        >>> babilong = BabiLong(BabiSimulator(task=1), background, n_sentences=50)
        >>> sample = babilong.sample(np.random.default_rng(0))
        >>> len(sample.chunks), sample.chunks[sample.support[0]]
        (50, 'Daniel moved to the kitchen.')
    """

    def __init__(
        self,
        stories: SampleSource,
        background: BackgroundText,
        n_sentences: int | tuple[int, int],
    ) -> None:
        low, high = (n_sentences, n_sentences) if isinstance(n_sentences, int) else n_sentences
        if not 1 <= low <= high:
            raise DatasetError(
                f"n_sentences={n_sentences!r} is not allowed; give a number of at least 1, or the "
                "least and the greatest such number."
            )
        self._stories = stories
        self._background = background
        self._low, self._high = low, high

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """A new document; stories with more statements than it has room for are passed over.

        Raises:
            DatasetError: If no story short enough turns up.
        """
        length = int(rng.integers(self._low, self._high, endpoint=True))
        for _ in range(_ATTEMPTS):
            story = self._stories.sample(rng)
            if len(story.chunks) <= length:
                return hide_story(story, self._background, length, rng)
        raise DatasetError(
            f"{_ATTEMPTS} stories in a row had more than n_sentences={length} statements; give "
            "more sentences."
        )


def hide_story(
    story: SupportSample, background: BackgroundText, length: int, rng: np.random.Generator
) -> SupportSample:
    """Scatter a story, its order kept, at random over a stretch of background.

    Args:
        story: Question and statements.
        background: The sentences around them.
        length: Number of chunks of the document.
        rng: Where chance comes from.

    Returns:
        The document with the story's question, answer and, at its new places, support.

    Raises:
        DatasetError: If the story has more than ``length`` statements.
    """
    told = len(story.chunks)
    if told > length:
        raise DatasetError(
            f"Story {story.id!r} has {told} statements, more than length={length}; give more room."
        )
    chunks, places = scatter(story.chunks, background.stretch(length - told, rng), rng)
    return SupportSample(
        id=story.id,
        question=story.question,
        chunks=chunks,
        support=tuple(places[i] for i in story.support),
        answer=story.answer,
    )


def scatter(
    statements: Sequence[str], noise: Sequence[str], rng: np.random.Generator
) -> tuple[tuple[str, ...], list[int]]:
    """Put statements, in their order, at random places among others, in theirs.

    Returns:
        All chunks, and the places of the statements.
    """
    length = len(statements) + len(noise)
    places = np.sort(rng.choice(length, size=len(statements), replace=False, shuffle=False))
    chunks: list[str] = []
    for before, (statement, place) in enumerate(zip(statements, places.tolist(), strict=True)):
        chunks += noise[len(chunks) - before : place - before]
        chunks.append(statement)
    chunks += noise[len(chunks) - len(statements) :]
    return tuple(chunks), places.tolist()
