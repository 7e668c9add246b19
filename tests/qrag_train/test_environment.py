from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrag_retriever.errors import InvalidInputError
from qrag_retriever.positions import PositionScheme
from qrag_train.data.sample import SupportSample
from qrag_train.environment import RetrievalEnvironment
from qrag_train.rewards import RewardConfig


class SlowEpisode:
    """One episode, written down from the rules."""

    def __init__(self, sample: SupportSample, max_steps: int, config: RewardConfig) -> None:
        self.sample, self.max_steps, self.config = sample, max_steps, config
        self.retrieved: list[int] = []
        self.over = False

    def step(self, action: int) -> tuple[float, bool]:
        facts = set(self.sample.support)
        was_complete = facts <= set(self.retrieved)
        self.retrieved.append(action)
        complete = facts <= set(self.retrieved)
        reward = 0.0
        if action in facts:
            share = self.config.completion * self.config.fact_share / len(facts)
            reward += self.config.per_fact + share
        if complete and not was_complete:
            bonus = self.config.completion * (1 - self.config.fact_share)
            if self.config.penalize_extra_steps:
                bonus *= 0.5 + 0.5 * len(facts) / len(self.retrieved)
            reward += bonus
        self.over = (
            (complete and self.config.stop_on_success)
            or len(self.retrieved) == self.max_steps
            or len(self.retrieved) == len(self.sample.chunks)
        )
        return reward, self.over


def make_sample(n: int, support: list[int]) -> SupportSample:
    return SupportSample("s", "q?", tuple(f"chunk {i}" for i in range(n)), tuple(support))


@st.composite
def samples(draw: st.DrawFn) -> SupportSample:
    n = draw(st.integers(1, 9))
    support = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True))
    return make_sample(n, support)


rewards = st.builds(
    RewardConfig,
    completion=st.sampled_from([1.0, 2.5]),
    fact_share=st.sampled_from([0.0, 0.6]),
    per_fact=st.sampled_from([0.0, 0.1]),
    penalize_extra_steps=st.booleans(),
    stop_on_success=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(samples(), min_size=9, max_size=9), rewards, st.integers(1, 5), st.data())
def test_equals_one_episode_at_a_time(
    drawn: list[SupportSample], config: RewardConfig, max_steps: int, data: st.DataObject
) -> None:
    episodes = 3
    queue = list(drawn)
    scheme = PositionScheme("relative")
    environment = RetrievalEnvironment(episodes, max_steps, config)
    slow = [SlowEpisode(queue.pop(), max_steps, config) for _ in range(episodes)]
    environment.reset(range(episodes), [episode.sample for episode in slow])
    while True:
        width = max(len(episode.sample.chunks) for episode in slow)
        assert environment.available.shape == (episodes, width)
        rho = environment.positions(scheme)
        for number, episode in enumerate(slow):
            n = len(episode.sample.chunks)
            free = [i for i in range(n) if i not in episode.retrieved]
            assert environment.available[number].nonzero()[:, 0].tolist() == free
            np.testing.assert_array_equal(
                rho[number, :n].numpy(), scheme.positions(n, episode.retrieved)
            )
            assert not rho[number, n:].any()
        actions = [
            data.draw(st.sampled_from(row.nonzero()[:, 0].tolist()))
            for row in environment.available
        ]
        got_rewards, got_dones = environment.step(torch.tensor(actions))
        expected = [episode.step(a) for episode, a in zip(slow, actions, strict=True)]
        assert got_rewards.tolist() == pytest.approx([reward for reward, _ in expected])
        assert got_dones.tolist() == [done for _, done in expected]
        assert environment.retrieved() == [episode.retrieved for episode in slow]
        ended = [number for number, (_, done) in enumerate(expected) if done]
        if len(queue) < len(ended):
            return
        for number in ended:
            slow[number] = SlowEpisode(queue.pop(), max_steps, config)
        environment.reset(ended, [slow[number].sample for number in ended])


def test_restore_continues_the_same_episode() -> None:
    sample = make_sample(5, [1, 4])
    one = RetrievalEnvironment(1, 3, RewardConfig())
    other = RetrievalEnvironment(1, 3, RewardConfig())
    one.reset([0], [sample])
    other.reset([0], [sample])
    one.step(torch.tensor([4]))
    other.restore(one.retrieved())
    assert torch.equal(one.available, other.available)
    assert (
        other.step(torch.tensor([1]))[0].tolist()
        == one.step(torch.tensor([1]))[0].tolist()
        == [1.0]
    )


@pytest.mark.parametrize("action", [1, 4])
def test_refuses_a_chunk_that_is_taken_or_does_not_exist(action: int) -> None:
    environment = RetrievalEnvironment(2, 3, RewardConfig(stop_on_success=False))
    environment.reset([0, 1], [make_sample(3, [1]), make_sample(5, [1])])
    environment.step(torch.tensor([1, 1]))
    with pytest.raises(InvalidInputError, match="once"):
        environment.step(torch.tensor([action, 0]))


def test_first_reset_is_of_all_episodes() -> None:
    environment = RetrievalEnvironment(2, 3, RewardConfig())
    with pytest.raises(InvalidInputError, match="Reset all 2"):
        environment.reset([1], [make_sample(3, [1])])
