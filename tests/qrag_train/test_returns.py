from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_train.returns import annealed_alpha, critic_values, lambda_returns, soft_value

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "reference"

seeds = st.integers(0, 10_000)
alphas = st.sampled_from([0.003, 0.05, 1.0])


def slow_soft_value(q: list[list[float]], available: list[bool], alpha: float, top_k: int | None):
    """Eq. 4 for one state, in plain Python: q[action][critic]."""
    total = 0.0
    for critic in range(len(q[0])):
        best = sorted((row[critic] for row, free in zip(q, available, strict=True) if free))[::-1]
        best = best[:top_k]
        if not best:
            return 0.0
        total += best[0] + alpha * math.log(sum(math.exp((v - best[0]) / alpha) for v in best))
    return total


@given(seeds, alphas, st.sampled_from([1, 2]), st.sampled_from([None, 1, 3, 5, 50]))
def test_soft_value_is_eq_4_over_the_best_available_actions(seed, alpha, critics, top_k):
    rng = np.random.default_rng(seed)
    q = torch.tensor(rng.normal(size=(4, 8, critics)))
    available = torch.tensor(rng.random((4, 8)) < 0.6)
    expected = [
        slow_soft_value(row.tolist(), free.tolist(), alpha, top_k)
        for row, free in zip(q, available, strict=True)
    ]
    actual = soft_value(q, available, alpha, top_k)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_by_default_five_actions_count():
    q = torch.linspace(0, 1, 9).unsqueeze(-1)
    free = torch.ones(9, dtype=torch.bool)
    assert soft_value(q, free, 0.5) == soft_value(q, free, 0.5, top_k=5)
    assert soft_value(q, free, 0.5) < soft_value(q, free, 0.5, top_k=None)


@given(seeds, st.sampled_from([1, 2]))
def test_what_cannot_be_taken_does_not_count(seed, critics):
    # Neither chunks taken, nor padding, nor the neighbours in the batch may change a value.
    rng = np.random.default_rng(seed)
    q = torch.tensor(rng.normal(size=(6, critics)))
    available = torch.tensor([True, False, True, True, False, True])
    alone = soft_value(q[available], torch.ones(4, dtype=torch.bool), 0.1)
    taken = ~available.unsqueeze(-1)
    for filler in (-1e4, 0.0, 1e4):
        padded = torch.cat([q.masked_fill(taken, filler), torch.full((3, critics), filler)])
        mask = torch.cat([available, torch.zeros(3, dtype=torch.bool)])
        batch = torch.stack([torch.full_like(padded, 50.0), padded])
        value = soft_value(batch, torch.stack([torch.ones_like(mask), mask]), 0.1)[1]
        torch.testing.assert_close(value, alone)


def test_soft_value_tends_to_the_maximum():
    q = torch.tensor([[0.3, 0.1], [0.2, 0.4]])
    free = torch.ones(2, dtype=torch.bool)
    assert soft_value(q, free, 1e-4).item() == pytest.approx(0.7)
    assert soft_value(q, free, 0.1).item() > 0.7


def test_a_state_without_actions_is_worth_nothing():
    value = soft_value(torch.ones(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool), 0.1)
    assert value.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("alpha", "top_k"), [(0.0, 5), (-1.0, 5), (float("nan"), 5), (0.1, 0)])
def test_soft_value_refuses(alpha, top_k):
    with pytest.raises(InvalidInputError, match="is not allowed; give"):
        soft_value(torch.ones(2, 1), torch.ones(2, dtype=torch.bool), alpha, top_k)


@given(seeds)
def test_critics_sum_to_the_inner_product(seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 1, 8, generator=generator, dtype=torch.float64)
    actions = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    full = (states * actions).sum(-1)
    two = critic_values(states, actions, critics=2)
    assert two.shape == (3, 5, 2)
    torch.testing.assert_close(two.sum(-1), full)
    torch.testing.assert_close(two[..., 0], (states * actions)[..., :4].sum(-1))
    torch.testing.assert_close(critic_values(states, actions, critics=1), full.unsqueeze(-1))


def test_critics_are_differentiable():
    state, action = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda s, a: critic_values(s, a, 2), (state, action))


@pytest.mark.parametrize(("critics", "dimension"), [(0, 4), (3, 6), (2, 5)])
def test_critics_refused(critics, dimension):
    with pytest.raises(ConfigError, match="can be halved"):
        critic_values(torch.ones(dimension), torch.ones(dimension), critics)


# --- λ-returns --------------------------------------------------------------------------------


def slow_return(t, rewards, dones, values, gamma, lam):
    """G_t of one environment by the paper's recursion; values[t] = V'(s_t), t = 0 … T."""
    if dones[t]:
        return rewards[t]
    if t == len(rewards) - 1:
        return rewards[t] + gamma * values[t + 1]
    following = slow_return(t + 1, rewards, dones, values, gamma, lam)
    return rewards[t] + gamma * ((1 - lam) * values[t + 1] + lam * following)


def forward_return(t, rewards, dones, values, gamma, lam):
    """The same as a mean of n-step returns: (1-λ)·Σ λ^(n-1)·G^(n), the rest on the longest."""
    last = next((k for k in range(t, len(rewards)) if dones[k]), len(rewards) - 1)
    n_step = []
    for end in range(t, last + 1):
        total = sum(gamma ** (k - t) * rewards[k] for k in range(t, end + 1))
        if not dones[end]:
            total += gamma ** (end + 1 - t) * values[end + 1]
        n_step.append(total)
    mixed = sum((1 - lam) * lam**n * value for n, value in enumerate(n_step[:-1]))
    return mixed + lam ** (len(n_step) - 1) * n_step[-1]


def rollout(seed, steps, envs=4):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(steps, envs)), rng.normal(size=(steps + 1, envs))
    return rewards, rng.random((steps, envs)) < 0.3, values


@given(seeds, st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_lambda_returns_are_the_papers(seed, steps, gamma, lam):
    rewards, dones, values = rollout(seed, steps)
    actual = lambda_returns(
        torch.tensor(rewards),
        torch.tensor(dones),
        torch.tensor(values[1:]),
        gamma=gamma,
        lam=lam,
    ).numpy()
    for oracle in (slow_return, forward_return):
        expected = [
            [
                oracle(t, rewards[:, e], dones[:, e], values[:, e], gamma, lam)
                for e in range(rewards.shape[1])
            ]
            for t in range(steps)
        ]
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_nothing_is_read_across_the_end_of_an_episode():
    rewards, dones, values = (torch.tensor(x) for x in rollout(3, 6))
    dones[2] = True
    changed = rewards.clone()
    changed[3:] += 100
    targets = [
        lambda_returns(r, dones, values[1:] + (r is changed) * dones * 9.0, gamma=0.9, lam=0.7)
        for r in (rewards, changed)
    ]
    torch.testing.assert_close(targets[0][:3], targets[1][:3])


def test_lambda_returns_refuse_shapes_that_differ():
    ones = torch.ones(3, 2)
    with pytest.raises(InvalidInputError, match=r"one shape \[T, E\]"):
        lambda_returns(ones, ones[:2].bool(), ones, gamma=0.9, lam=0.5)
    with pytest.raises(InvalidInputError):
        lambda_returns(ones[0], ones[0].bool(), ones[0], gamma=0.9, lam=0.5)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference fixtures are not here")
@pytest.mark.parametrize("mode", ["relative", "none"])
@pytest.mark.parametrize("micro", [0, 1])
def test_targets_of_the_released_code(mode, micro):
    stored = np.load(REFERENCE / mode / "update.npz")
    rewards, not_done, values, targets = (
        torch.tensor(stored[f"micro{micro}/{name}"])
        for name in ("reward", "not_done", "q_values", "targets")
    )
    # The released code knows V' of the states 0 … T-1 only: no value after the last step.
    unknown = torch.full_like(values[:, :1], torch.nan)
    next_values = torch.cat([values[:, 1:], unknown], dim=1).T
    settings = {"gamma": 0.99, "lam": 0.65}
    actual = lambda_returns(
        rewards.T, not_done.T == 0, next_values, **settings, reference_compat=True
    )
    torch.testing.assert_close(actual.T.reshape(-1), targets, atol=1e-7, rtol=0)
    right = lambda_returns(rewards.T[:-1], not_done.T[:-1] == 0, next_values[:-1], **settings)
    assert not torch.allclose(right.T.reshape(-1), targets, atol=1e-4)


def slow_released_returns(rewards, dones, values, gamma, lam):
    """What the released code computes from V'(s_0) … V'(s_{T-1}) of one environment."""
    last = len(rewards) - 2
    value = 0.0 if dones[last] else values[last + 1]
    returns = [rewards[last] + gamma * value]
    for t in range(last - 1, -1, -1):
        target = rewards[t] + gamma * (value + lam * (returns[0] - value))
        returns.insert(0, rewards[t] if dones[t] else target)
        value = values[t]
    return returns


@given(seeds, st.integers(2, 7))
def test_reference_compat_repeats_the_slips(seed, steps):
    rewards, dones, values = rollout(seed, steps)
    actual = lambda_returns(
        torch.tensor(rewards),
        torch.tensor(dones),
        torch.tensor(values[1:]),
        gamma=0.9,
        lam=0.5,
        reference_compat=True,
    )
    expected = [
        slow_released_returns(rewards[:, e], dones[:, e], values[:, e], 0.9, 0.5) for e in range(4)
    ]
    np.testing.assert_allclose(actual.T.numpy(), expected, atol=1e-12)


# --- schedules --------------------------------------------------------------------------------


def test_alpha_follows_the_decay_down_to_its_floor():
    assert annealed_alpha(0.05, 1.0) == 0.05
    assert annealed_alpha(0.05, 0.5) == 0.025
    assert annealed_alpha(0.05, 0.0) == 0.001
    assert annealed_alpha(0.05, 0.0, floor=0.01) == 0.01
    assert annealed_alpha(1e-4, 0.5) == 1e-4
    for start, floor in ((0.0, 0.1), (0.1, 0.0)):
        with pytest.raises(ConfigError, match="above 0"):
            annealed_alpha(start, 1.0, floor)
