"""The sized loader that drives training, one update at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrag_train.rollout import EpisodeStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qrag_train.data.sample import SampleSource


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
