"""On-policy collection: the current model retrieves, and what it did is kept for learning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from qrag_retriever.errors import QRAGError
from qrag_retriever.rotary import phases, turn
from qrag_retriever.state import in_state_order
from qrag_train.data.sample import SupportSample
from qrag_train.environment import RetrievalEnvironment
from qrag_train.metrics import fact_scores
from qrag_train.returns import critic_values, soft_value
from qrag_train.texts import ChunkEmbeddings, TextTable, embed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.model import QRAGModel
    from qrag_train.data.sample import SampleSource
    from qrag_train.settings import PQNConfig

TokenIds = list[int]

# Texts whose token ids are kept; with more the table starts anew.
_MOST_TEXTS = 300_000


@dataclasses.dataclass(frozen=True)
class Episode:
    """What became of a finished episode: the discounted sum of its rewards, Fact-EM and Fact-F1."""

    discounted_return: float
    fact_em: float
    fact_f1: float


@dataclasses.dataclass(frozen=True)
class Rollout:
    """L steps of E episodes: L·E transitions, those of the first step first.

    Attributes:
        state_ids: Token ids of the states s_t, L·E sequences.
        action_ids: Token ids of the chosen chunks, L·E sequences.
        positions: ρ of the chosen chunks, float64 ``[L, E]``.
        rewards: r_t, float32 ``[L, E]``.
        dones: Whether the episode ended with the step, bool ``[L, E]``.
        next_values: V'(s_{t+1}) by the target networks, float32 ``[L, E]``; 0 after an end.
        finished: The episodes that ended, for the log.
        states: Embeddings of the states with their graph, float32 ``[L·E, d]``; ``None`` where
            the policy did without.
    """

    state_ids: list[TokenIds]
    action_ids: list[TokenIds]
    positions: Tensor
    rewards: Tensor
    dones: Tensor
    next_values: Tensor
    finished: list[Episode]
    states: Tensor | None = None


class EpisodeStream:
    """Samples drawn one after the other; the chance in sample i depends on the seed and i alone.

    Args:
        source: Where they are drawn from.
        seed: Seed of the stream, such as the seed of training and the rank of the process.
    """

    def __init__(self, source: SampleSource, seed: tuple[int, ...]) -> None:
        self._source = source
        self._seed = seed

    def __getitem__(self, number: int) -> SupportSample:
        # a last number that no set of fixed samples has: what validates is not drawn here too
        return self._source.sample(np.random.default_rng((*self._seed, number, 1)))


class RolloutCollector:
    """E episodes that go on from rollout to rollout and begin anew when they end.

    Everything is computed in evaluation mode and without gradients, apart from the embeddings of
    the states, if the loss may use them as they are.

    Args:
        model: The model in training; it acts with the weights it has when `collect` is called.
        target: Its slowly following copy.
        stream: Where episodes come from.
        config: Settings of the algorithm.
        seed: Seed of the policy's draws.
        keep_graph: Embed the states with gradients, so that the loss need not embed them again.

    Attributes:
        transitions: Number of transitions collected so far.
    """

    def __init__(
        self,
        model: QRAGModel,
        target: QRAGModel,
        stream: EpisodeStream,
        config: PQNConfig,
        seed: int,
        *,
        keep_graph: bool = False,
    ) -> None:
        self._keep_graph = keep_graph
        self._model, self._target = model, target
        self._stream = stream
        self._config = config
        self._generator = torch.Generator().manual_seed(seed)
        self._scheme = model.config.position_scheme
        steps = config.max_steps or model.config.max_steps
        self.environment = RetrievalEnvironment(config.environments, steps, config.reward)
        self.transitions = 0
        self._drawn = 0
        self._returns: NDArray[np.float64] = np.zeros(config.environments)
        self._ended: NDArray[np.bool_] = np.ones(config.environments, dtype=bool)
        self._chunks: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(self._ended)
        self._embedded: dict[tuple[int, ...], Tensor] = {}
        self._update: int | None = None
        self._new_table()

    def collect(self, alpha: float, update: int | None = None) -> Rollout:
        """Go on by L steps with the current weights.

        Args:
            alpha: Temperature α of the policy and of the soft values.
            update: Number of updates made: as long as it is the same, so are the weights. ``None``:
                they have changed.
        """
        modes = self._model.training, self._target.training
        self._model.eval()
        self._target.eval()
        try:
            return self._collect(alpha, update)
        finally:
            self._model.train(modes[0])
            self._target.train(modes[1])

    def _collect(self, alpha: float, update: int | None) -> Rollout:
        self._begin(update)
        steps = self._config.rollout_steps or self.environment.max_steps
        return _joined([self._step(alpha) for _ in range(steps)])

    @torch.no_grad()
    def _step(self, alpha: float) -> Rollout:
        """One step of every episode, as a rollout with L = 1."""
        self._reset_ended()
        ids, rho = self._state_ids(), self.environment.positions(self._scheme)
        random = self.transitions < self._config.random_transitions
        states = None if random else self._states(ids)
        actions = self._choose(states, rho, alpha)
        chosen = [n[a] for n, a in zip(self._chunks, actions.tolist(), strict=True)]
        self.embeddings.mark_chosen(chosen)
        rewards, dones = self.environment.step(actions)
        self.transitions += len(dones)
        return Rollout(
            state_ids=ids,
            action_ids=self.table.action_ids(chosen),
            positions=rho.gather(1, actions[:, None]).T,
            rewards=rewards[None],
            dones=dones[None],
            next_values=self._next_values(dones, alpha)[None],
            finished=self._finish(rewards, dones),
            states=states if self._keep_graph else None,
        )

    def _states(self, ids: list[TokenIds]) -> Tensor:
        """Embeddings of the states by the trained encoder: those it met in the rollout again."""
        new = [state for state in ids if tuple(state) not in self._embedded]
        with torch.set_grad_enabled(self._keep_graph):
            if new:
                vectors = embed(self._model.state_encoder, new)
                self._embedded.update(zip(map(tuple, new), vectors.unbind(), strict=True))
            return torch.stack([self._embedded[tuple(state)] for state in ids])

    def _choose(self, states: Tensor | None, rho: Tensor, alpha: float) -> Tensor:
        """Draw an action for each episode: by the soft policy, or at random without states."""
        available = self.environment.available
        if states is None:
            weights = available.float()
        else:
            q = self._q(states, 0, np.arange(len(states)), rho).sum(dim=-1)
            q = q.masked_fill(~available, -torch.inf)
            top_k = min(self._config.top_k_actions or q.shape[1], q.shape[1])
            best, chunks = q.topk(top_k, dim=1)
            if not best[:, 0].isfinite().all():
                raise QRAGError(
                    "Training diverged: Q is not a finite number any more. Start again with a "
                    "lower --model.optimizer.lr, or clip gradients (--trainer.gradient_clip_val)."
                )
            weights = torch.zeros_like(q).scatter(1, chunks, (best / alpha).softmax(dim=1))
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]

    def _next_values(self, dones: Tensor, alpha: float) -> Tensor:
        """V'(s_{t+1}) of the episodes that go on, 0 of the others."""
        values = torch.zeros(len(dones))
        going_on = np.flatnonzero(~dones.numpy())
        if len(going_on):
            ids = self._state_ids(going_on)
            rho = self.environment.positions(self._scheme)[going_on]
            shared = self._target is self._model  # then the next step embeds the same states
            states = self._states(ids) if shared else self._target.state_encoder.encode(ids)
            q = self._q(states, 1, going_on, rho)
            available = self.environment.available[going_on]
            values[going_on] = soft_value(q, available, alpha, self._config.top_k_actions)
        return values

    def _q(self, states: Tensor, network: int, episodes: NDArray[np.int64], rho: Tensor) -> Tensor:
        """Q of all chunks by each critic, float32 ``[episodes, N, critics]``, on the CPU.

        0 beyond a sample's end.

        Args:
            states: Embeddings of the episodes' states, ``[episodes, d]``.
            network: 0: the trained one, 1: the target.
            episodes: Numbers of the episodes.
            rho: ρ of their chunks, ``[episodes, N]``.
        """
        vectors = self.embeddings.vectors[network]
        # chunks without the padding: documents of a mixture may differ in length a hundredfold
        exists = torch.from_numpy(self._exists[episodes])
        rows = torch.from_numpy(self._rows[episodes])[exists].to(vectors.device)
        states = states[exists.nonzero()[:, 0].to(states.device)]
        if self._scheme.mode != "none":
            # few different ρ where they are integers
            levels, level = torch.unique(rho[exists].to(vectors.device), return_inverse=True)
            base = self._model.config.rotary_base
            rotation = phases(-levels, states.shape[1], base).to(torch.complex64)[level]
            states = turn(states, rotation)
        values = critic_values(states, embedding(rows, vectors), self._config.n_critics).cpu()
        q = values.new_zeros(*exists.shape, self._config.n_critics)
        q[exists] = values
        return q

    def _state_ids(self, episodes: NDArray[np.int64] | None = None) -> list[TokenIds]:
        environment, order = self.environment, self._model.config.state_order
        retrieved = environment.retrieved()
        states = []
        for episode in range(len(environment)) if episodes is None else episodes.tolist():
            sample = environment.samples[episode]
            chunks = in_state_order(retrieved[episode], order)
            states.append((sample.question, [sample.chunks[chunk] for chunk in chunks]))
        return self.table.state_ids(states)

    def _finish(self, rewards: Tensor, dones: Tensor) -> list[Episode]:
        steps = self.environment.steps.numpy()
        self._returns += self._config.gamma ** (steps - 1) * rewards.double().numpy()
        self._ended = dones.numpy().copy()
        retrieved = self.environment.retrieved()
        finished = []
        for episode in np.flatnonzero(self._ended):
            scores = fact_scores(retrieved[episode], self.environment.samples[episode].support)
            finished.append(Episode(float(self._returns[episode]), scores.em, scores.f1))
        return finished

    def _begin(self, update: int | None) -> None:
        """Take note that the weights have changed."""
        if len(self.table) > _MOST_TEXTS:
            self._new_table()
            for episode, sample in enumerate(self.environment.samples):
                self._number(episode, sample)
        if update is None or update != self._update:
            self.embeddings.advance()
        self._update = update
        self._embedded.clear()  # their graph is gone
        if not self._ended.any():
            self._place()

    def _reset_ended(self) -> None:
        ended = np.flatnonzero(self._ended).tolist()
        if ended:
            numbers = range(self._drawn, self._drawn + len(ended))
            self._drawn += len(ended)
            self._enter(ended, [self._stream[number] for number in numbers])
            self._returns[ended] = 0.0
            self._ended[:] = False
            self._place()

    def _enter(self, episodes: Sequence[int], samples: Sequence[SupportSample]) -> None:
        """Begin some episodes."""
        self.environment.reset(episodes, samples)
        for episode, sample in zip(episodes, samples, strict=True):
            self._number(episode, sample)

    def _number(self, episode: int, sample: SupportSample) -> None:
        self._chunks[episode] = self.table.numbers(sample.chunks)
        self.embeddings.mark_support(self._chunks[episode][list(sample.support)])

    def _place(self) -> None:
        """Embed what is not embedded yet, and note the embedding of each chunk in play."""
        lengths = [len(chunks) for chunks in self._chunks]
        rows = self.embeddings.rows(np.concatenate(self._chunks))
        self._exists = np.arange(max(lengths)) < np.array(lengths)[:, None]
        self._rows = np.zeros(self._exists.shape, dtype=np.int64)
        self._rows[self._exists] = rows

    def _new_table(self) -> None:
        self.table = TextTable(self._model)
        encoders = self._model.action_encoder, self._target.action_encoder
        self.embeddings = ChunkEmbeddings(encoders, self.table, self._config.refresh_every)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the weights; plain numbers and tensors."""
        return {
            "generator": self._generator.get_state(),
            "transitions": self.transitions,
            "drawn": self._drawn,
            "samples": [dataclasses.astuple(sample) for sample in self.environment.samples],
            "returns": self._returns.tolist(),
            "ended": self._ended.tolist(),
            "retrieved": self.environment.retrieved(),
            "embeddings": self.embeddings.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same stream."""
        self._generator.set_state(state["generator"])
        self.transitions, self._drawn = state["transitions"], state["drawn"]
        if not state["samples"]:
            return
        self.embeddings.load_state_dict(state["embeddings"])
        samples = [SupportSample(*values) for values in state["samples"]]
        self._enter(range(len(samples)), samples)
        self.environment.restore(state["retrieved"])
        self._returns = np.array(state["returns"])
        self._ended = np.array(state["ended"])


def _joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of the same episodes, one after the other, as one."""
    states = [part.states for part in parts if part.states is not None]
    return Rollout(
        state_ids=[ids for part in parts for ids in part.state_ids],
        action_ids=[ids for part in parts for ids in part.action_ids],
        positions=torch.cat([part.positions for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        dones=torch.cat([part.dones for part in parts]),
        next_values=torch.cat([part.next_values for part in parts]),
        finished=[episode for part in parts for episode in part.finished],
        states=torch.cat(states) if len(states) == len(parts) else None,
    )
