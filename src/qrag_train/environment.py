"""The decision process of retrieval, many episodes at once (METHOD §1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.errors import InvalidInputError
from qrag_train.rewards import step_rewards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qrag_retriever.positions import PositionScheme
    from qrag_train.data.sample import SupportSample
    from qrag_train.rewards import RewardConfig


class RetrievalEnvironment:
    """E episodes side by side: in each, one chunk of a sample is retrieved at a step.

    An episode ends at its budget, when no chunk is left, or, if the rewards say so, with success.
    Ended episodes wait for `reset`.

    Args:
        episodes: Number of episodes E.
        max_steps: Retrieval budget T.
        reward: What a step is worth.

    Attributes:
        samples: The sample of each episode.
        available: Which chunks can be retrieved, bool ``[E, N]``; N chunks in the longest sample,
            false beyond the end of the others.
        picks: The retrieved chunks in retrieval order, int64 ``[E, T]``; -1 where none is yet.
        steps: Number of chunks retrieved, int64 ``[E]``.

    Example:
        >>> from qrag_train.data import SupportSample
        >>> from qrag_train.rewards import RewardConfig
        >>> environment = RetrievalEnvironment(1, max_steps=2, reward=RewardConfig())
        >>> environment.reset([0], [SupportSample("1", "Where?", ("a", "b", "c"), (2,))])
        >>> environment.step(torch.tensor([2]))
        (tensor([1.]), tensor([True]))
    """

    def __init__(self, episodes: int, max_steps: int, reward: RewardConfig) -> None:
        self.max_steps = max_steps
        self.reward = reward
        self.samples: list[SupportSample] = []
        self.available = torch.zeros(episodes, 0, dtype=torch.bool)
        self.picks = torch.full((episodes, max_steps), -1)
        self.steps = torch.zeros(episodes, dtype=torch.long)
        self._support = torch.full((episodes, 1), -1)

    def __len__(self) -> int:
        return len(self.steps)

    def reset(self, episodes: Sequence[int], samples: Sequence[SupportSample]) -> None:
        """Begin some episodes anew.

        Args:
            episodes: Numbers of the episodes; all of them the first time.
            samples: What each of them retrieves from.

        Raises:
            InvalidInputError: If an episode would be left without a sample.
        """
        if not self.samples:
            if list(episodes) != list(range(len(self))):
                raise InvalidInputError(f"Reset all {len(self)} episodes before the first step.")
            self.samples = list(samples)
        for episode, sample in zip(episodes, samples, strict=True):
            self.samples[episode] = sample
        # as wide as the longest sample now in play, not the longest there ever was
        width = max(len(sample.chunks) for sample in self.samples)
        facts = max(len(sample.support) for sample in self.samples)
        self.available = _resized(self.available, width, fill=False)
        self._support = _resized(self._support, facts, fill=-1)
        for episode, sample in zip(episodes, samples, strict=True):
            self.available[episode] = torch.arange(width) < len(sample.chunks)
            self._support[episode] = -1
            self._support[episode, : len(sample.support)] = torch.tensor(sample.support)
            self.picks[episode] = -1
            self.steps[episode] = 0

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Retrieve one chunk in every episode.

        Args:
            actions: Chunk numbers, int64 ``[E]``.

        Returns:
            Rewards, float32 ``[E]``, and which episodes have ended, bool ``[E]``.

        Raises:
            InvalidInputError: If a chunk is not available.
        """
        taken = actions[:, None]
        if not bool(self.available.gather(1, taken).all()):
            raise InvalidInputError("A chunk can be retrieved once in an episode, if it exists.")
        before = self._found()
        self.picks.scatter_(1, self.steps[:, None], taken)
        self.available.scatter_(1, taken, False)
        self.steps += 1
        rewards, succeeded = step_rewards(
            before, self._found(), self._support >= 0, self.steps, self.reward
        )
        exhausted = ~self.available.any(dim=1)
        return rewards, succeeded | exhausted | (self.steps >= self.max_steps)

    def restore(self, retrieved: Sequence[Sequence[int]]) -> None:
        """Put all episodes, just reset, where these chunks had been retrieved."""
        for episode, chunks in enumerate(retrieved):
            self.available[episode, list(chunks)] = False
            self.picks[episode, : len(chunks)] = torch.tensor(chunks, dtype=torch.long)
            self.steps[episode] = len(chunks)

    def retrieved(self) -> list[list[int]]:
        """The chunks retrieved in each episode, in retrieval order."""
        counts = self.steps.tolist()
        return [row[:n] for row, n in zip(self.picks.tolist(), counts, strict=True)]

    def positions(self, scheme: PositionScheme) -> Tensor:
        """ρ of all chunks of all episodes, float64 ``[E, N]``, 0 beyond a sample's end (eq. 6)."""
        rho = np.zeros(self.available.shape)
        if scheme.mode != "none":
            for row, sample, retrieved in zip(rho, self.samples, self.retrieved(), strict=True):
                n = len(sample.chunks)
                row[:n] = scheme.positions(n, retrieved)
        return torch.from_numpy(rho)

    def _found(self) -> Tensor:
        """Which of the support chunks are retrieved, bool ``[E, F]``; false in unused columns."""
        chunks = self._support.clamp(min=0)
        return (self._support >= 0) & ~self.available.gather(1, chunks)


def _resized(table: Tensor, width: int, fill: int | bool) -> Tensor:
    if table.shape[1] >= width:
        return table[:, :width].contiguous()
    wider = table.new_full((len(table), width), fill)
    wider[:, : table.shape[1]] = table
    return wider
