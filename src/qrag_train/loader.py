"""Loaders: one that drives training, one update at a time, and one for judging a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qrag_train.rollout import EpisodeStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qrag_train.data.sample import SampleSource, SupportSample


class RolloutLoader:
    """Hands the stream of episodes to `QRAGTrainingModule` once for every update.

    It has a length, because Lightning fetches from a loader without one ahead of time.

    Args:
        source: Where samples are drawn from.
        updates: Number of batches.
        seed: Seed of the episodes.
        rank: Number of this process; each draws its own episodes.
    """

    def __init__(self, source: SampleSource, updates: int, *, seed: int = 0, rank: int = 0) -> None:
        self.stream = EpisodeStream(source, (seed, rank))
        self._updates = updates

    def __len__(self) -> int:
        return self._updates

    def __iter__(self) -> Iterator[EpisodeStream]:
        for _ in range(self._updates):
            yield self.stream


class SampleLoader:
    """Hands out questions in batches that are searched together.

    Args:
        samples: The questions.
        size: Most questions of a batch.

    Example:
        >>> list(SampleLoader("abcde", size=2))
        ['ab', 'cd', 'e']
    """

    def __init__(self, samples: Sequence[SupportSample], size: int = 64) -> None:
        self._samples = samples
        self._size = size

    def __len__(self) -> int:
        return math.ceil(len(self._samples) / self._size)

    def __iter__(self) -> Iterator[Sequence[SupportSample]]:
        for first in range(0, len(self._samples), self._size):
            yield self._samples[first : first + self._size]
