"""Soft values and λ-returns, the targets of training (METHOD §2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qrag_retriever.errors import ConfigError, InvalidInputError


def critic_values(states: Tensor, actions: Tensor, critics: int) -> Tensor:
    """Q-values of one or two critics that are read off the same vectors.

    Each critic is the inner product over its part of the dimensions, so that their sum is
    ``Q(s, a) = ⟨E_s(s), R(ρ) E_a(a)⟩``.

    Args:
        states: [..., d] state embeddings.
        actions: [..., d] action embeddings, already rotated; broadcast with ``states``.
        critics: 1, or 2 for one critic on each half of the dimensions.

    Returns:
        [..., critics], differentiable.

    Raises:
        ConfigError: If ``critics`` is neither 1 nor 2, or d cannot be halved.

    Example:
        >>> state, actions = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
        >>> critic_values(state, actions, critics=2)
        tensor([[1., 2.],
                [0., 6.]])
    """
    dimension = states.shape[-1]
    if critics not in (1, 2) or dimension % critics:
        raise ConfigError(
            f"critics={critics!r} of embeddings with {dimension} dimensions is not allowed; give "
            "1, or 2 if the dimensions can be halved."
        )
    states = states.reshape(*states.shape[:-1], critics, -1)
    actions = actions.reshape(*actions.shape[:-1], critics, -1)
    # differences between chunks are smaller than what half precision resolves
    wide = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        return torch.einsum("...cd,...cd->...c", states.to(wide), actions.to(wide))


def soft_value(q: Tensor, available: Tensor, alpha: float, top_k: int | None = 5) -> Tensor:
    """Soft state value ``V(s) = Σ_critics α·log Σ_a exp(Q_critic(s, a)/α)`` (eq. 4).

    The sum over actions runs over the available ones only, and for each critic over its own
    ``top_k`` best of them.

    Args:
        q: [..., N, critics] Q-values of all chunks.
        available: bool [..., N], false for chunks already retrieved and for padding.
        alpha: Temperature α, above 0.
        top_k: Number of actions in the sum; ``None``: all, as in eq. 4.

    Returns:
        [...]; 0 where no action is available, the value of an end.

    Raises:
        InvalidInputError: If ``alpha`` is not above 0 or ``top_k`` below 1.

    Example:
        >>> q = torch.tensor([[0.5], [0.5], [9.0]])
        >>> soft_value(q, torch.tensor([True, True, False]), alpha=0.1)
        tensor(0.5693)
    """
    if not alpha > 0:
        raise InvalidInputError(f"alpha={alpha!r} is not allowed; give a number above 0.")
    if top_k is not None and top_k < 1:
        raise InvalidInputError(f"top_k={top_k!r} is not allowed; give at least 1, or None.")
    q = q.masked_fill(~available.unsqueeze(-1), -torch.inf)
    if top_k is not None and top_k < q.shape[-2]:
        q = q.topk(top_k, dim=-2, sorted=False).values
    value = alpha * torch.logsumexp(q / alpha, dim=-2).sum(-1)
    return torch.where(available.any(-1), value, 0.0)


def lambda_returns(
    rewards: Tensor,
    dones: Tensor,
    next_values: Tensor,
    *,
    gamma: float,
    lam: float,
    reference_compat: bool = False,
) -> Tensor:
    """λ-returns of a rollout of T steps in E environments that start anew by themselves.

    ``G_t = r_t + γ(1-d_t)·[(1-λ)·V'(s_{t+1}) + λ·G_{t+1}]``, and
    ``G_{T-1} = r_{T-1} + γ(1-d_{T-1})·V'(s_T)``.

    Args:
        rewards: float [T, E], r_t.
        dones: bool [T, E], d_t: the episode ended with step t.
        next_values: float [T, E], V'(s_{t+1}); not used, but finite, where an episode ended.
        gamma: Discount γ.
        lam: λ; 0 is the one-step target, 1 the return bootstrapped at the end of the rollout.
        reference_compat: Repeat two slips of the code released with the paper: the last step has
            no target, and V'(s_{T-1}) takes the place of V'(s_{T-2}). For comparison with it only.

    Returns:
        float [T, E] targets G, or [T - 1, E] with ``reference_compat``.

    Raises:
        InvalidInputError: If the shapes differ or have not two dimensions.

    Example:
        >>> column = lambda *values: torch.tensor(values).unsqueeze(-1)
        >>> lambda_returns(column(0.0, 1.0, 0.0), column(False, True, False),
        ...                column(0.5, 0.5, 0.5), gamma=0.5, lam=0.5).squeeze(-1)
        tensor([0.3750, 1.0000, 0.2500])
    """
    if rewards.dim() != 2 or not rewards.shape == dones.shape == next_values.shape:
        raise InvalidInputError(
            f"rewards {tuple(rewards.shape)}, dones {tuple(dones.shape)} and next_values "
            f"{tuple(next_values.shape)} must have one shape [T, E]."
        )
    alive = (~dones).to(rewards.dtype)
    if reference_compat:
        rewards, alive, next_values = rewards[:-1], alive[:-1], next_values[:-1].clone()
        if len(next_values) > 1:
            next_values[-2] = alive[-1] * next_values[-1]
    returns = torch.empty_like(rewards)
    following = next_values[-1]  # makes the last step's λ-mixture V'(s_T)
    for t in range(len(rewards) - 1, -1, -1):
        mixture = (1 - lam) * next_values[t] + lam * following
        following = returns[t] = rewards[t] + gamma * alive[t] * mixture
    return returns


def annealed_alpha(start: float, decay: float, floor: float = 1e-3) -> float:
    """Temperature α of a step: proportional to the decay of the learning rate, never below a floor.

    It does not follow the warm-up, during which a policy near the argmax would not explore, and
    the floor keeps ``softmax(Q/α)`` finite when the decay ends at 0.

    Args:
        start: α at the beginning.
        decay: `OptimizerConfig.decay` of the update.
        floor: Least α; ``start`` where that is less.

    Raises:
        ConfigError: If ``start`` or ``floor`` is not above 0.

    Example:
        >>> [annealed_alpha(0.01, decay) for decay in (1.0, 0.5, 0.0)]
        [0.01, 0.005, 0.001]
    """
    if not (start > 0 and floor > 0):
        raise ConfigError(f"start={start!r} and floor={floor!r} of alpha must be above 0.")
    return max(start * decay, min(start, floor))
