from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Colours, tiny_model

from qrag_retriever.model import QRAGModel
from qrag_retriever.rotary import rotate
from qrag_train.data.sample import SupportSample
from qrag_train.imitation import candidates, imitation_loss
from qrag_train.rewards import RewardConfig
from qrag_train.settings import PQNConfig
from qrag_train.texts import TextTable

SAMPLES = [
    SupportSample(
        "1",
        "where is the cup and the hat",
        ("the red cup fell", "the blue key fell", "the green hat fell", "the black lamp fell"),
        (0, 2),
    ),
    # shares a chunk with the first; its support stands there twice
    SupportSample(
        "2",
        "where is the coin",
        ("the white coin fell", "the red cup fell", "the white coin fell"),
        (2,),
    ),
]
CHOSEN = [[0, 2, 3], [2, 1]]
CONFIG = PQNConfig(gamma=0.5, reward=RewardConfig(fact_share=0.6))
ALPHA = 0.05


def q_of_texts(
    model: QRAGModel, sample: SupportSample, chosen: list[int], found: list[int]
) -> dict[str, float]:
    """Q of each embedded text in one state, encoded one at a time."""
    listed = sorted(found) if model.config.state_order == "document" else found
    chunks = [sample.chunks[i] for i in listed]
    state = torch.from_numpy(model.encode_states([(sample.question, chunks)])[0])
    rho = model.config.position_scheme.positions(len(sample.chunks), found)
    q: dict[str, float] = {}
    if model.config.positions == "none":
        for other, some in zip(SAMPLES, CHOSEN, strict=True):
            for i in some:
                vector = torch.from_numpy(model.encode_actions([other.chunks[i]])[0])
                q[other.chunks[i]] = float(state @ vector)
    else:
        for i in chosen:
            vector = torch.from_numpy(model.encode_actions([sample.chunks[i]])[0])
            q[sample.chunks[i]] = float(state @ rotate(vector, torch.tensor(rho[i])))
    return q


def slow_loss(
    model: QRAGModel,
    alpha: float,
    *,
    goes_on: bool = False,
    detours: tuple[int | None, ...] = (None, None),
    budget: int = 9,
) -> float:
    """State by state and chunk by chunk, in plain numbers."""
    losses = []
    for sample, chosen, detour in zip(SAMPLES, CHOSEN, detours, strict=True):
        found: list[int] = []
        erred = False
        while True:
            missing = [i for i in sample.support if i not in found]
            if not missing and (not goes_on or len(found) >= budget):
                break
            q = q_of_texts(model, sample, chosen, found)
            for i in found:
                del q[sample.chunks[i]]
            negatives = {
                i: q[text]
                for i in chosen
                if (text := sample.chunks[i]) in q and i not in sample.support
            }
            if not missing:
                if negatives:
                    losses.append(0.5 * sum(v**2 for v in negatives.values()) / len(negatives))
                break
            wanted = {sample.chunks[i] for i in missing}
            everything = sum(math.exp(value / alpha) for value in q.values())
            right = sum(math.exp(q[text] / alpha) for text in wanted)
            best = max(missing, key=lambda i: q[sample.chunks[i]])
            # 0.6 in equal shares, 0.4 with the last
            facts, left = len(sample.support), len(missing)
            reward = sum(0.5**t * 0.6 / facts for t in range(left)) + 0.5 ** (left - 1) * 0.4
            error = q[sample.chunks[best]] - reward
            losses.append(-alpha * math.log(right / everything) + 0.5 * error**2)
            spare = budget - len(found) - left
            if detour == len(found) and not erred and negatives and spare > 0:
                erred = True
                found.append(max(negatives, key=lambda i: negatives[i]))
            else:
                found.append(best)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("positions", ["none", "relative"])
@pytest.mark.parametrize("order", ["document", "retrieval"])
def test_loss_equals_the_slow_one(tmp_path: Path, positions: str, order: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(tmp_path, positions, scale=0.2, state_order=order)
    loss = imitation_loss(model, TextTable(model), SAMPLES, CHOSEN, CONFIG, ALPHA)
    assert float(loss.detach()) == pytest.approx(slow_loss(model, ALPHA), rel=1e-5)


@pytest.mark.parametrize("detours", [(None, None), (0, 0), (1, None)])
@pytest.mark.parametrize("budget", [2, 3, 4])
def test_loss_of_detours_and_of_what_follows_success(
    tmp_path: Path, detours: tuple[int | None, ...], budget: int
) -> None:
    torch.manual_seed(0)
    model = tiny_model(tmp_path, "none", scale=0.2)
    reward = RewardConfig(fact_share=0.6, stop_on_success=False)
    config = PQNConfig(gamma=0.5, reward=reward, max_steps=budget)
    loss = imitation_loss(model, TextTable(model), SAMPLES, CHOSEN, config, ALPHA, detours)
    slow = slow_loss(model, ALPHA, goes_on=True, detours=detours, budget=budget)
    assert float(loss.detach()) == pytest.approx(slow, rel=1e-5)


def test_gradients_reach_both_encoders_and_the_negatives(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "none", scale=0.2)
    imitation_loss(model, TextTable(model), SAMPLES, CHOSEN, CONFIG, ALPHA).backward()
    table = model.action_encoder.transformer.model.embeddings.word_embeddings.weight
    lamp = model.action_ids(["lamp"])[0][1]
    key = model.action_ids(["key"])[0][1]
    assert table.grad[lamp].abs().sum() > 0
    assert table.grad[key].abs().sum() == 0  # was not among the chosen
    states = model.state_encoder.transformer.model.embeddings.word_embeddings.weight
    assert states.grad.abs().sum() > 0


def test_candidates_are_the_support_and_others() -> None:
    sample = Colours(n=6, support=2).sample(np.random.default_rng(0))
    for seed in range(20):
        some = candidates(sample, 3, np.random.default_rng(seed))
        assert tuple(some[:2]) == sample.support
        assert len(set(some)) == len(some) == 5
    assert len(candidates(sample, 99, np.random.default_rng(0))) == 6


def test_no_negative_has_the_text_of_support_or_of_another() -> None:
    chunks = ("mary left", "the cup fell", "mary left", "a", "a", "b", "the cup fell")
    sample = SupportSample("1", "q", chunks, (0, 1))
    for seed in range(20):
        found = candidates(sample, 5, np.random.default_rng(seed))
        assert found[:2] == [0, 1]
        assert sorted(sample.chunks[i] for i in found[2:]) == ["a", "b"]


def test_a_model_learns_to_imitate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(tmp_path, "relative", scale=0.2)
    table, source = TextTable(model), Colours(n=6, support=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(60):
        samples = [source.sample(rng) for _ in range(8)]
        chosen = [candidates(sample, 4, rng) for sample in samples]
        loss = imitation_loss(model, table, samples, chosen, CONFIG, ALPHA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
