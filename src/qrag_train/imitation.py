"""Learning from the support itself, before the first rollout: imitation of who knows it.

Episodes tell one transition at a time which chunk was worth fetching, and at first seldom that. The
annotations tell it of every state on the way: in a state with some of the support, the rest of it
is what to fetch. A few such updates bring a pretrained embedder to where episodes begin to pay.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.rotary import q_at
from qrag_retriever.state import in_state_order
from qrag_train.returns import critic_values
from qrag_train.rewards import path_return
from qrag_train.texts import embed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qrag_retriever.model import QRAGModel
    from qrag_train.data.sample import SupportSample
    from qrag_train.settings import PQNConfig
    from qrag_train.texts import TextTable


def candidates(sample: SupportSample, negatives: int, rng: np.random.Generator) -> list[int]:
    """The support of a sample, then some of its other chunks, drawn at random.

    No two have the same text, but for support: a negative with the text of support is none.
    """
    others = np.setdiff1d(np.arange(len(sample.chunks)), sample.support)
    seen = {sample.chunks[i] for i in sample.support}
    drawn: list[int] = []
    for i in rng.permutation(others).tolist():
        if len(drawn) == negatives:
            break
        if sample.chunks[i] not in seen:
            seen.add(sample.chunks[i])
            drawn.append(i)
    return [*sample.support, *drawn]


def imitation_loss(
    model: QRAGModel,
    table: TextTable,
    samples: Sequence[SupportSample],
    chosen: Sequence[Sequence[int]],
    config: PQNConfig,
    alpha: float,
    detours: Sequence[int | None] | None = None,
) -> Tensor:
    """``mean over states of V(s) - V_M(s) + ½(Q(s, a*) - G)²``, with gradients.

    States are those of an episode that fetches the missing chunk a* with the highest Q each time,
    and once, where a detour is asked for, the chunk without support that has the highest Q. V is
    the soft value (eq. 4) over the missing support M and the negatives, V_M that over M alone:
    their difference is ``-α log Σ_{a ∈ M} π(a|s)`` (eq. 3), 0 where the soft policy fetches missing
    support for certain. G, the discounted reward of the episode from there on, keeps Q in the range
    of rewards. Without positions, chunks of the other samples are negatives too.

    Where success does not end an episode, and leaves steps of the budget, nothing is worth anything
    any more: the loss of that state is the mean of ``½ Q(s, a)²`` over the sample's negatives.

    Args:
        model: The model.
        table: Token ids of texts.
        samples: Questions with their support.
        chosen: Chunks of each to embed: the support, and negatives.
        config: Rewards, discount and budget.
        alpha: Temperature α.
        detours: How much of the support each question's episode fetches before its detour; it has
            none where that is ``None``, or the budget does not last, or there is no negative.

    Returns:
        Scalar float32.
    """
    texts = [sample.chunks[i] for sample, own in zip(samples, chosen, strict=True) for i in own]
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    actions = embed(model.action_encoder, table.action_ids(table.numbers(list(rows)).tolist()))
    due = detours or [None] * len(samples)
    going_on = [
        _Episode(sample, {i: rows[sample.chunks[i]] for i in own}, detour)
        for sample, own, detour in zip(samples, chosen, due, strict=True)
    ]
    budget = config.max_steps or model.config.max_steps
    losses: list[Tensor] = []
    while going_on:
        asked = [(one.sample.question, one.state_chunks(model)) for one in going_on]
        states = embed(model.state_encoder, table.state_ids(asked))
        for state, one in zip(states, going_on, strict=True):
            losses += one.step(one.q_values(model, state, actions), config, alpha, budget)
        going_on = [one for one in going_on if not one.over]
    return torch.stack(losses).mean()


@dataclasses.dataclass
class _Episode:
    """The episode of who knows the support of one question.

    Attributes:
        sample: The question.
        rows: The row of the embeddings that holds each of its embedded chunks.
        detour: How much of the support it fetches before a detour that it has still to make.
        found: The chunks that it fetched, in order.
        over: Whether there is no further state to learn from.
    """

    sample: SupportSample
    rows: dict[int, int]
    detour: int | None
    found: list[int] = dataclasses.field(default_factory=list)
    over: bool = False

    def state_chunks(self, model: QRAGModel) -> list[str]:
        order = in_state_order(self.found, model.config.state_order)
        return [self.sample.chunks[i] for i in order]

    def q_values(self, model: QRAGModel, state: Tensor, actions: Tensor) -> Tensor:
        """Q of all embedded texts in its state; -inf for those of other samples if places count."""
        if model.config.positions == "none":
            return critic_values(state, actions, 1)[:, 0]
        scheme = model.config.position_scheme
        # of equal texts, which only support may have, the last one's place counts
        places = {row: i for i, row in self.rows.items()}
        rho = scheme.positions(len(self.sample.chunks), self.found)[list(places.values())]
        rho_of_own = torch.from_numpy(rho).to(state.device)
        index = torch.tensor(list(places), device=actions.device)
        q = q_at(state, actions[index], rho_of_own, model.config.rotary_base)
        return torch.full_like(actions[:, 0], -torch.inf).index_copy(0, index, q)

    def step(self, q: Tensor, config: PQNConfig, alpha: float, budget: int) -> list[Tensor]:
        """Fetch a chunk, or end; the loss of the state before, if it has one."""
        missing = [i for i in self.sample.support if i not in self.found]
        wanted = [self.rows[i] for i in missing]
        held = [self.rows[i] for i in self.found if self.rows[i] not in wanted]
        others = [i for i, row in self.rows.items() if row not in {*held, *wanted}]
        q_of_others = q[[self.rows[i] for i in others]]
        if not missing:
            self.over = True
            return [0.5 * q_of_others.square().mean()] if others else []
        q = q.index_fill(0, torch.tensor(held, dtype=torch.long, device=q.device), -torch.inf)
        best = int(q.detach()[wanted].argmax())
        gap = torch.logsumexp(q / alpha, 0) - torch.logsumexp(q[wanted] / alpha, 0)
        rest = [missing[best], *missing[:best], *missing[best + 1 :]]
        error = q[wanted[best]] - _return_of(rest, self.found, self.sample, config)
        spare = budget - len(self.found) - len(missing)
        if self.detour == len(self.found) and others and spare > 0:
            self.found.append(others[int(q_of_others.detach().argmax())])
            self.detour = None
        else:
            self.found.append(missing[best])
            complete = len(missing) == 1
            self.over = complete and (spare == 0 or config.reward.stop_on_success)
        return [alpha * gap + 0.5 * error.square()]


def _return_of(
    rest: Sequence[int], found: Sequence[int], sample: SupportSample, config: PQNConfig
) -> float:
    """Discounted reward from a state on, if the rest of the support is fetched from there."""
    reward, gamma = config.reward, config.gamma
    before = path_return(found, sample.support, reward, gamma)
    whole = path_return([*found, *rest], sample.support, reward, gamma)
    return (whole - before) / gamma ** len(found)
