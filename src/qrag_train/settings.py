"""Settings of training: frozen, checked when they are made, the defaults in one place."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Literal

from qrag_retriever.errors import ConfigError
from qrag_train.rewards import RewardConfig

Schedule = Literal["linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class PQNConfig:
    """The algorithm: on-policy Q-learning with λ-returns (METHOD §2).

    Attributes:
        gamma: Discount γ of later rewards, above 0 and at most 1.
        lambda_: λ, from 0 (one-step targets) to 1 (whole returns).
        alpha: Temperature α of the soft policy and the soft value at the start of training.
        alpha_floor: Least α; it falls with the learning rate's decay.
        tau: τ, what the target networks take from the trained ones at each update; 1: no targets,
            which saves embedding every chunk twice.
        top_k_actions: Best available actions that the policy and the soft value look at; ``None``:
            all of them (eq. 3 and 4 as printed).
        n_critics: 2: each half of an embedding is a critic; 1: the whole.
        max_steps: Chunks that a training episode retrieves; ``None``: the model's budget T, with
            which it is judged and exported whatever this is.
        environments: Episodes E that run side by side.
        rollout_steps: Steps L of each of them between two updates; ``None``: those of an episode.
        random_transitions: First transitions drawn by a random policy.
        refresh_every: Updates after which a background chunk (one that never was support) is
            embedded anew; 0: all chunks at every update.
        reward: What a step is worth.
        imitation_updates: First updates that learn from the support itself, without episodes
            (`qrag_train.imitation`); 0: none.
        imitation_negatives: Chunks without support that each question of such an update brings.
        imitation_detours: Part of these questions, 0 to 1, whose states hold a chunk without
            support from some point on, as those of a search that erred.

    Raises:
        ConfigError: If a value is out of range.
    """

    gamma: float = 0.99
    lambda_: float = 0.5
    alpha: float = 0.05
    alpha_floor: float = 1e-3
    tau: float = 0.02
    top_k_actions: int | None = 5
    n_critics: int = 2
    max_steps: int | None = None
    environments: int = 16
    rollout_steps: int | None = None
    random_transitions: int = 200
    refresh_every: int = 0
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    imitation_updates: int = 0
    imitation_negatives: int = 6
    imitation_detours: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "gamma", 0 < self.gamma <= 1, "a number above 0 and at most 1")
        _check(self, "lambda_", 0 <= self.lambda_ <= 1, "a number from 0 to 1")
        _check(self, "alpha", 0 < self.alpha < math.inf, "a number above 0")
        _check(self, "alpha_floor", 0 < self.alpha_floor < math.inf, "a number above 0")
        _check(self, "tau", 0 < self.tau <= 1, "a number above 0 and at most 1")
        _check(self, "n_critics", self.n_critics in (1, 2), "1 or 2")
        for name in ("top_k_actions", "max_steps", "rollout_steps"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "an integer of at least 1, or None")
        _check(self, "environments", self.environments >= 1, "an integer of at least 1")
        _check(
            self, "imitation_negatives", self.imitation_negatives >= 1, "an integer of at least 1"
        )
        detours = self.imitation_detours
        _check(self, "imitation_detours", 0 <= detours <= 1, "a number from 0 to 1")
        for name in ("random_transitions", "refresh_every", "imitation_updates"):
            _check(self, name, getattr(self, name) >= 0, "an integer of at least 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: Learning rate after the warm-up.
        weight_decay: Decay of weight matrices; norms and biases have none.
        betas: Decay of AdamW's two moments.
        eps: AdamW's ε.
        warmup_updates: Updates in which the learning rate rises from 0; fewer than in all.
        schedule: How it falls from there to the end of training.
        final_ratio: What is left of it at the end, 0 to 1.
        average_updates: Judge and keep the running mean of the weights over about so many updates,
            which is steadier than those of a single update; 0: the weights as they are.

    Raises:
        ConfigError: If a value is out of range.
    """

    lr: float = 5e-5
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_updates: int = 50
    schedule: Schedule = "linear"
    final_ratio: float = 0.1
    average_updates: int = 0

    def __post_init__(self) -> None:
        _check(self, "lr", 0 < self.lr < math.inf, "a number above 0")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        _check(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers below 1")
        _check(self, "eps", self.eps > 0, "a number above 0")
        _check(self, "warmup_updates", self.warmup_updates >= 0, "an integer of at least 0")
        _check(self, "schedule", self.schedule in ("linear", "cosine"), "'linear' or 'cosine'")
        _check(self, "final_ratio", 0 <= self.final_ratio <= 1, "a number from 0 to 1")
        _check(self, "average_updates", self.average_updates >= 0, "an integer of at least 0")

    def check_length(self, total: int) -> None:
        """Warn if the warm-up would not end before the training.

        The learning rate would then never be reached, and neither it nor α would fall.

        Args:
            total: Updates of the whole training.
        """
        if self.warmup_updates >= total:
            warnings.warn(
                f"The warm-up of {self.warmup_updates} updates does not end before the {total} "
                "updates of the training, which never reaches its learning rate; give "
                f"--model.optimizer.warmup_updates less than {total}, or --trainer.max_steps more "
                f"than {self.warmup_updates}.",
                stacklevel=2,
            )

    def decay(self, update: int, total: int) -> float:
        """What the schedule leaves of the learning rate, warm-up aside: 1 down to the final ratio.

        Args:
            update: Updates made.
            total: Updates of the whole training.
        """
        falling = max(total - self.warmup_updates, 1)
        progress = min(max(update - self.warmup_updates, 0) / falling, 1.0)
        if self.schedule == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return 1.0 - (1.0 - self.final_ratio) * progress

    def lr_factor(self, update: int, total: int) -> float:
        """The learning rate of an update as a part of ``lr``, warm-up included."""
        warmup = min(1.0, (update + 1) / (self.warmup_updates + 1))
        return warmup * self.decay(update, total)


def _check(config: object, name: str, allowed: bool, what: str) -> None:
    if not allowed:
        raise ConfigError(f"{name}={getattr(config, name)!r} is not allowed; give {what}.")
