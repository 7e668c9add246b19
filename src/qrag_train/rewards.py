"""Rewards from support annotations, for many episodes at once (METHOD §1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qrag_retriever.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a step of retrieval is worth.

    With the defaults the reward is sparse: 1 at the step that completes the support F*, else 0.

    Attributes:
        completion: Reward for completing the support.
        fact_share: Part of ``completion`` (0 to 1) that is paid in equal shares as support chunks
            are found, the rest at completion. Helps where chance rarely completes the support.
        per_fact: Reward for each support chunk found, on top of ``completion``.
        penalize_extra_steps: Scale the reward at completion by ``0.5 + 0.5·|F*|/|retrieved|``.
        stop_on_success: Whether completion ends the episode; if not, later steps have reward 0.

    Raises:
        ConfigError: If a value is out of range.
    """

    completion: float = 1.0
    fact_share: float = 0.0
    per_fact: float = 0.0
    penalize_extra_steps: bool = False
    stop_on_success: bool = True

    def __post_init__(self) -> None:
        for name in ("completion", "per_fact"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; give a number.")
        if not 0 <= self.fact_share <= 1:
            raise ConfigError(
                f"fact_share={self.fact_share!r} is not allowed; give a number from 0 to 1."
            )


def step_rewards(
    found_before: Tensor,
    found_after: Tensor,
    support: Tensor,
    n_retrieved: Tensor,
    config: RewardConfig,
) -> tuple[Tensor, Tensor]:
    """Rewards of one step of many episodes.

    Args:
        found_before: bool [..., F], which support chunks were retrieved before the step.
        found_after: bool [..., F], which are after it.
        support: bool [..., F], false where an episode has fewer than F support chunks.
        n_retrieved: int [...], number of chunks retrieved after the step.
        config: What is rewarded.

    Returns:
        float32 [...], the rewards r_t; and bool [...], which episodes their success has ended.

    Example:
        >>> found, support = torch.tensor([[True, False]]), torch.tensor([[True, True]])
        >>> step_rewards(found, support, support, torch.tensor([3]), RewardConfig())
        (tensor([1.]), tensor([True]))
    """
    n_support = support.sum(-1)
    n_new = (found_after & ~found_before & support).sum(-1)
    complete = (found_after | ~support).all(-1)
    completes = complete & ~(found_before | ~support).all(-1)

    at_completion = completes * (config.completion * (1 - config.fact_share))
    if config.penalize_extra_steps:
        at_completion = at_completion * (0.5 + 0.5 * n_support / n_retrieved)
    per_fact = config.per_fact + config.completion * config.fact_share / n_support
    rewards = (at_completion + n_new * per_fact).to(torch.float32)
    return rewards, complete & config.stop_on_success


def path_return(
    retrieved: Sequence[int], support: Sequence[int], config: RewardConfig, gamma: float
) -> float:
    """Discounted sum of the rewards of one episode, Σ_t γ^t r_t.

    Args:
        retrieved: Chunk numbers in the order in which they were retrieved.
        support: F*, chunk numbers.
        config: What is rewarded.
        gamma: Discount γ.

    Example:
        >>> path_return([4, 2, 7], support=[7, 4], config=RewardConfig(fact_share=0.5), gamma=0.5)
        0.4375
    """
    facts = torch.tensor(sorted(set(support)), dtype=torch.long)
    hits = torch.tensor(retrieved, dtype=torch.long)[:, None] == facts
    found = hits.cumsum(0) > 0
    before = torch.cat([torch.zeros(1, len(facts), dtype=torch.bool), found])[:-1]
    steps = torch.arange(len(retrieved))
    rewards, _ = step_rewards(before, found, torch.ones_like(found), steps + 1, config)
    return float((rewards.double() * gamma**steps).sum())
