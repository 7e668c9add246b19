"""Training as a LightningModule: rollout, λ-returns, loss, optimiser and target networks."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from qrag_retriever.errors import ConfigError
from qrag_retriever.rotary import rotate
from qrag_train.imitation import candidates, imitation_loss
from qrag_train.returns import annealed_alpha, critic_values, lambda_returns
from qrag_train.rollout import Episode, EpisodeStream, Rollout, RolloutCollector
from qrag_train.settings import OptimizerConfig, PQNConfig
from qrag_train.texts import TextTable, embed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

    from qrag_retriever.model import QRAGModel

# Tokens of a padded batch with gradients on a GPU; on a CPU smaller ones are faster.
_GPU_BATCH_TOKENS = 32768
# Longest states for which attention keeps its whole matrix for the backward pass.
_MOST_EAGER_TOKENS = 512
_LOGGED_EPISODES = 200
# Number of the first sample of updates that imitate.
_IMITATED = 1 << 40


class QRAGTrainingModule(lightning.LightningModule):
    """Learns a `QRAGModel` by on-policy Q-learning on support annotations (METHOD §2).

    `training_step` collects its rollout itself with the weights of the moment, so training is
    on-policy whatever the data loader does.

    Args:
        model: The model to train, in place. Parameters with ``requires_grad=False`` stay as they
            are.
        pqn: Settings of the algorithm.
        optimizer: Settings of AdamW and its schedule.
        seed: Seed of everything that training draws.
    """

    def __init__(
        self,
        model: QRAGModel,
        pqn: PQNConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pqn = pqn or PQNConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.model = model
        self.seed = seed
        freeze_unused(model)
        # with τ = 1 the targets are the trained networks: one copy, each text embedded once
        shared = self.pqn.tau == 1
        self.target = model if shared else copy.deepcopy(model).float().requires_grad_(False)
        average = self.optimizer_config.average_updates > 0
        self.averaged = copy.deepcopy(model).float().requires_grad_(False) if average else model
        self.collector: RolloutCollector | None = None
        self._table: TextTable | None = None
        self._restored: Mapping[str, Any] | None = None
        self._episodes: deque[Episode] = deque(maxlen=_LOGGED_EPISODES)
        self._clock = time.monotonic()

    @property
    def alpha(self) -> float:
        """Temperature α of this update."""
        decay = self.optimizer_config.decay(self.global_step, self._total_updates)
        return annealed_alpha(self.pqn.alpha, decay, self.pqn.alpha_floor)

    def training_step(self, batch: EpisodeStream, batch_idx: int) -> Tensor:
        """Collect a rollout with the current weights and return its loss."""
        if self.global_step < self.pqn.imitation_updates:
            parts = self.trainer.accumulate_grad_batches
            return self._imitate(batch, self.global_step * parts + batch_idx % parts)
        if self.collector is None:
            self.collector = self._make_collector(batch)
        rollout = self.collector.collect(self.alpha, self.global_step)
        self.model.train()
        loss = self.loss(rollout)
        self._episodes.extend(rollout.finished)
        self._log_training(rollout.rewards.numel(), loss)
        return loss

    def _imitate(self, stream: EpisodeStream, batch: int) -> Tensor:
        """The loss of a batch that learns from the support itself; an update may have several.

        The samples and negatives that it draws depend on the seed and its number alone.
        """
        if self._table is None:
            self._table = TextTable(self.model)
        size, negatives = self.pqn.environments, self.pqn.imitation_negatives
        first = batch * size
        # far from the samples that episodes are made of
        samples = [stream[_IMITATED + number] for number in range(first, first + size)]
        rng = np.random.default_rng((self.seed, self.global_rank, batch))
        chosen = [candidates(sample, negatives, rng) for sample in samples]
        detours = [
            int(rng.integers(len(sample.support))) if asked else None
            for sample, asked in zip(
                samples, rng.random(size) < self.pqn.imitation_detours, strict=True
            )
        ]
        self.model.train()
        loss = imitation_loss(
            self.model, self._table, samples, chosen, self.pqn, self.alpha, detours
        )
        self._log_training(sum(len(sample.support) for sample in samples), loss)
        return loss

    def loss(self, rollout: Rollout) -> Tensor:
        """½(2Q₁-G)² + ½(2Q₂-G)², or (Q-G)², the mean over a rollout's transitions.

        Gradients reach the state encoder through s_t and the action encoder through the chosen
        chunks; the λ-returns G are constants.
        """
        targets = lambda_returns(
            rollout.rewards,
            rollout.dones,
            rollout.next_values,
            gamma=self.pqn.gamma,
            lam=self.pqn.lambda_,
        )
        positions = rollout.positions.flatten()
        q = self.q_values(rollout.state_ids, rollout.action_ids, positions, rollout.states)
        return critic_loss(q, targets.flatten().to(q.device))

    def q_values(
        self,
        state_ids: Sequence[Sequence[int]],
        action_ids: Sequence[Sequence[int]],
        positions: Tensor,
        states: Tensor | None = None,
    ) -> Tensor:
        """Q of n pairs of state and chunk by each critic, float32 ``[n, critics]``, with gradients.

        Args:
            state_ids: Token ids of the states.
            action_ids: Token ids of the chunks.
            positions: ρ of the chunks, ``[n]``.
            states: Embeddings of the states, ``[n, d]``, where they are there already.
        """
        tokens = None if self.device.type == "cpu" else _GPU_BATCH_TOKENS
        if states is None:
            states = embed(self.model.state_encoder, state_ids, tokens)
        actions = embed(self.model.action_encoder, action_ids, tokens)
        if self.model.config.positions != "none":
            base = self.model.config.rotary_base
            states = rotate(states, -positions.to(states.device), base)
        return critic_values(states, actions, self.pqn.n_critics)

    def on_fit_start(self) -> None:
        """Choose the attention that is fast on the device."""
        longest = self.model.config.max_state_tokens or math.inf
        half = str(self.trainer.precision).startswith("bf16")
        if self.device.type == "cpu" and half and longest <= _MOST_EAGER_TOKENS:
            for model in (self.model, self.target, self.averaged):
                for encoder in (model.state_encoder, model.action_encoder):
                    # in bfloat16 fused attention is slow on a CPU, its backward pass above all
                    encoder.transformer.model.set_attn_implementation("eager")

    def on_train_start(self) -> None:
        """Go on with the random states of a checkpoint: dropout draws from them."""
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["torch"].cpu())
        if "cuda" in self._restored and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._restored["cuda"].cpu(), self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make the optimiser's step, then let the target networks and the mean weights follow."""
        super().optimizer_step(*args, **kwargs)
        self.update_target()
        updates = self.optimizer_config.average_updates
        if updates:
            follow(self.averaged, self.model, 1 / min(self.global_step + 1, updates))

    def update_target(self) -> None:
        """θ' ← τθ + (1-τ)θ', in float32."""
        if self.target is not self.model:
            follow(self.target, self.model, self.pqn.tau)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, without decay on norms and biases, and the schedule, counted in updates.

        Raises:
            ConfigError: If training has no end.
        """
        config, total = self.optimizer_config, self._total_updates
        config.check_length(total)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: config.lr_factor(update, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def _total_updates(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ConfigError("Training has no end; set max_steps of the Trainer.")
        return int(total)

    def _make_collector(self, stream: EpisodeStream) -> RolloutCollector:
        seed = self.seed * 10_007 + self.global_rank
        collector = RolloutCollector(
            self.model,
            self.target,
            stream,
            self.pqn,
            seed,
            keep_graph=learns_as_it_acts(self.model),
        )
        if self._restored is not None and "collector" in self._restored:
            collector.load_state_dict(self._restored["collector"])
        return collector

    def recent_episodes(self) -> list[Episode]:
        """The training episodes that ended last, at most 200."""
        return list(self._episodes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add all random states and the episodes under way, those of every process."""
        state: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.collector is not None:
            state["collector"] = self.collector.state_dict()
        states: list[Any] = [state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, state)
        checkpoint["rollouts"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` added."""
        states = checkpoint.get("rollouts")
        if states is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if len(states) != self.trainer.world_size:
            raise ConfigError(
                f"The checkpoint is of {len(states)} processes and this run has "
                f"{self.trainer.world_size}; resume with as many."
            )
        self._restored = states[self.global_rank]

    def _log_training(self, transitions: int, loss: Tensor) -> None:
        now = time.monotonic()
        speed = transitions / max(now - self._clock, 1e-9)
        self._clock = now
        values: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            "alpha": self.alpha,
            "transitions_per_s": speed,
        }
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(values, batch_size=1)
        if self._episodes:
            count = len(self._episodes)
            means = {
                "return": sum(episode.discounted_return for episode in self._episodes) / count,
                "fact_em": sum(episode.fact_em for episode in self._episodes) / count,
                "fact_f1": sum(episode.fact_f1 for episode in self._episodes) / count,
            }
            self.log_dict(means, prog_bar=True, batch_size=1)


@torch.no_grad()
def follow(follower: nn.Module, model: nn.Module, rate: float) -> None:
    """Move the float32 weights of a copy by ``rate`` towards those that are trained."""
    pairs = [
        (old, new.float())
        for old, new in zip(follower.parameters(), model.parameters(), strict=True)
        if new.requires_grad
    ]
    old, new = zip(*pairs, strict=True)
    torch._foreach_lerp_(old, new, rate)


def critic_loss(q: Tensor, targets: Tensor) -> Tensor:
    """Mean over transitions and critics of ``(critics · Q_i - G)²``.

    With two critics ½(2Q₁-G)² + ½(2Q₂-G)², with one (Q-G)².

    Args:
        q: ``[n, critics]``.
        targets: G, ``[n]``.

    Example:
        >>> critic_loss(torch.tensor([[0.25, 0.5]]), torch.tensor([1.0]))
        tensor(0.1250)
    """
    return (q.shape[-1] * q - targets[:, None]).square().mean()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices with weight decay, norms and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def learns_as_it_acts(model: nn.Module) -> bool:
    """Whether the encoders compute the same in training and in evaluation mode.

    Dropout would differ, and gradient checkpointing saves no memory in evaluation mode.
    """
    return not any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or getattr(module, "attention_dropout", 0.0)
        or getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )


def freeze_unused(model: QRAGModel) -> None:
    """Freeze what no embedding depends on: a transformer's own pooler."""
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            parameter.requires_grad_(False)
