from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import ConfigError
from qrag_train.rewards import RewardConfig, path_return, step_rewards

configs = st.builds(
    RewardConfig,
    completion=st.floats(0.1, 3),
    fact_share=st.floats(0, 1),
    per_fact=st.floats(0, 1),
    penalize_extra_steps=st.booleans(),
    stop_on_success=st.booleans(),
)
episodes = st.lists(
    st.tuples(st.sets(st.integers(0, 6), min_size=1, max_size=4), st.permutations(range(7))),
    min_size=1,
    max_size=5,
)


def slow_rewards(support: set[int], order: list[int], config: RewardConfig) -> list[float]:
    """Rewards of one whole episode that is never ended, with sets."""
    rewards = []
    for step in range(len(order)):
        before, after = set(order[:step]), set(order[: step + 1])
        share = config.fact_share * config.completion / len(support)
        reward = (share + config.per_fact) * len((after - before) & support)
        if support <= after and not support <= before:
            completion = config.completion * (1 - config.fact_share)
            if config.penalize_extra_steps:
                completion *= 0.5 + 0.5 * len(support) / len(after)
            reward += completion
        rewards.append(reward)
    return rewards


def all_steps(batch, config):
    """Rewards and ends of all episodes, step by step, all at once: [7, E]."""
    width = max(len(support) for support, _ in batch)
    facts = torch.full((len(batch), width), -1)
    for row, (support, _) in zip(facts, batch, strict=True):
        row[: len(support)] = torch.tensor(sorted(support))
    orders = torch.tensor([list(order) for _, order in batch])

    def found(step):
        return (facts.unsqueeze(-1) == orders[:, None, :step]).any(-1)

    steps = [
        step_rewards(found(t), found(t + 1), facts >= 0, torch.full((len(batch),), t + 1), config)
        for t in range(7)
    ]
    return torch.stack([r for r, _ in steps]), torch.stack([end for _, end in steps])


@given(batch=episodes, config=configs)
def test_rewards_of_many_episodes_at_once(batch, config):
    rewards, ends = all_steps(batch, config)
    assert rewards.dtype == torch.float32
    for e, (support, order) in enumerate(batch):
        torch.testing.assert_close(
            rewards[:, e], torch.tensor(slow_rewards(support, list(order), config))
        )
        complete = [support <= set(order[: t + 1]) for t in range(7)]
        assert ends[:, e].tolist() == [c and config.stop_on_success for c in complete]


@given(batch=episodes, share=st.floats(0, 1))
def test_the_share_of_facts_moves_the_reward_but_does_not_change_its_sum(batch, share):
    rewards, _ = all_steps(batch, RewardConfig(completion=2.0, fact_share=share))
    torch.testing.assert_close(rewards.sum(0), torch.full((len(batch),), 2.0))


@given(batch=episodes, config=configs, gamma=st.floats(0.1, 1), length=st.integers(1, 7))
def test_the_return_of_a_path_is_the_discounted_sum_of_its_rewards(batch, config, gamma, length):
    for support, order in batch:
        path = list(order)[:length]
        slow = sum(r * gamma**t for t, r in enumerate(slow_rewards(support, path, config)))
        assert path_return(path, sorted(support), config, gamma) == pytest.approx(slow, abs=1e-6)


def test_the_default_is_one_at_completion_only():
    rewards, ends = all_steps([({2, 4}, [2, 0, 4, 1, 3, 5, 6])], RewardConfig())
    assert rewards[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert ends[:, 0].tolist() == [False, False, *[True] * 5]


def test_extra_steps_are_penalized():
    batch = [({2, 4}, [2, 4, 0, 1, 3, 5, 6]), ({2, 4}, [2, 0, 1, 4, 3, 5, 6])]
    rewards, ends = all_steps(batch, RewardConfig(penalize_extra_steps=True, stop_on_success=False))
    assert rewards[1, 0] == 1.0
    assert rewards[3, 1] == 0.75
    assert not ends.any()


@pytest.mark.parametrize(
    "wrong", [{"fact_share": 1.1}, {"fact_share": -0.1}, {"completion": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="is not allowed; give"):
        RewardConfig(**wrong)
