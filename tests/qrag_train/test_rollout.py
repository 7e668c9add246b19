from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Colours, tiny_model

from qrag_retriever.model import QRAGModel
from qrag_retriever.rotary import rotate
from qrag_retriever.state import in_state_order
from qrag_train import rollout as rollout_module
from qrag_train.data.mixture import Mixture
from qrag_train.data.sample import FixedSamples, SampleList, SampleSource, SupportSample
from qrag_train.rewards import RewardConfig
from qrag_train.rollout import EpisodeStream, Rollout, RolloutCollector
from qrag_train.settings import PQNConfig
from qrag_train.texts import ChunkEmbeddings, TextTable, embed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder")


@pytest.fixture
def model(folder: Path) -> QRAGModel:
    return tiny_model(folder, "relative", max_steps=3)


SOURCE = Mixture([Colours(3), Colours(6, support=2)], weights=[1, 1])


def shaken(model: QRAGModel) -> QRAGModel:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


def collector_of(
    model: QRAGModel, target: QRAGModel, source: SampleSource = SOURCE, **settings: object
) -> RolloutCollector:
    config = PQNConfig(**{"environments": 4, "random_transitions": 0, **settings})
    return RolloutCollector(model, target, EpisodeStream(source, (3, 0)), config, seed=1)


def replay(
    rollout: Rollout, model: QRAGModel, source: SampleSource
) -> Iterator[tuple[int, int, SupportSample, list[int], int]]:
    """What happened, from the stored token ids alone: step, episode, sample, retrieved, action."""
    length, episodes = rollout.rewards.shape
    stream = EpisodeStream(source, (3, 0))
    current = [stream[i] for i in range(episodes)]
    retrieved: list[list[int]] = [[] for _ in current]
    drawn = episodes
    for t in range(length):
        for e in range(episodes):
            ids = model.action_ids(current[e].chunks)
            action = ids.index(rollout.action_ids[t * episodes + e])
            yield t, e, current[e], list(retrieved[e]), action
            retrieved[e].append(action)
        for e in range(episodes):
            if rollout.dones[t, e]:
                current[e], retrieved[e] = stream[drawn], []
                drawn += 1


def slow_value(
    model: QRAGModel, sample: SupportSample, retrieved: list[int], alpha: float, top_k: int
) -> float:
    """V'(s) from eq. 4, one state, with rotated chunks: mask, best k of each half, logsumexp."""
    chunks = [sample.chunks[i] for i in in_state_order(retrieved, model.config.state_order)]
    state = torch.from_numpy(model.encode_states([(sample.question, chunks)]))[0]
    rho = model.config.position_scheme.positions(len(sample.chunks), retrieved)
    actions = rotate(torch.from_numpy(model.encode_actions(sample.chunks)), torch.from_numpy(rho))
    value = 0.0
    half = len(state) // 2
    for part in (slice(0, half), slice(half, None)):
        q = sorted(
            (
                float(state[part] @ actions[i, part])
                for i in range(len(actions))
                if i not in retrieved
            ),
            reverse=True,
        )[:top_k]
        value += alpha * float(np.log(np.sum(np.exp((np.array(q) - q[0]) / alpha)))) + q[0]
    return value


@pytest.mark.parametrize("positions", ["relative", "none"])
def test_equals_a_slow_version(folder: Path, positions: str) -> None:
    model = tiny_model(folder, positions, max_steps=3)
    target = shaken(model)
    collector = collector_of(model, target, rollout_steps=5, top_k_actions=2)
    rollout = collector.collect(alpha=0.1)
    assert rollout.rewards.shape == (5, 4)
    for t, e, sample, retrieved, action in replay(rollout, model, SOURCE):
        chunks = [sample.chunks[i] for i in in_state_order(retrieved, model.config.state_order)]
        state_ids = model.state_ids([(sample.question, chunks)])[0]
        assert rollout.state_ids[t * 4 + e] == state_ids
        rho = model.config.position_scheme.positions(len(sample.chunks), retrieved)[action]
        assert rollout.positions[t, e] == rho
        after = [*retrieved, action]
        complete = set(sample.support) <= set(after)
        assert rollout.rewards[t, e] == float(complete)
        assert rollout.dones[t, e] == (complete or len(after) == min(3, len(sample.chunks)))
        expected = 0.0
        if not rollout.dones[t, e]:
            expected = slow_value(target, sample, after, alpha=0.1, top_k=2)
        assert float(rollout.next_values[t, e]) == pytest.approx(expected, abs=1e-5)
    assert sum(len(row) for row in rollout.state_ids) > 0
    assert len(rollout.finished) == int(rollout.dones.sum())


def test_policy_is_a_softmax_over_the_best_actions(model: QRAGModel) -> None:
    sample = Colours(6).sample(np.random.default_rng(0))
    collector = collector_of(
        model, model, SampleList([sample]), environments=4000, rollout_steps=1, top_k_actions=3
    )
    rollout = collector.collect(alpha=0.02)
    ids = model.action_ids(sample.chunks)
    counts = np.bincount([ids.index(row) for row in rollout.action_ids], minlength=6)
    state = model.encode_states([(sample.question, [])])[0]
    rho = torch.from_numpy(model.config.position_scheme.positions(6))
    actions = rotate(torch.from_numpy(model.encode_actions(sample.chunks)), rho).numpy()
    q = (actions @ state).astype(np.float64)
    weights = np.where(q >= np.sort(q)[-3], np.exp((q - q.max()) / 0.02), 0.0)
    np.testing.assert_allclose(counts / 4000, weights / weights.sum(), atol=0.03)
    assert 0 < np.max(weights / weights.sum()) < 0.95  # else this would show nothing


def test_first_transitions_are_uniform(model: QRAGModel) -> None:
    sample = Colours(6).sample(np.random.default_rng(0))
    collector = collector_of(
        model,
        model,
        SampleList([sample]),
        environments=3000,
        rollout_steps=1,
        random_transitions=3000,
    )
    ids = model.action_ids(sample.chunks)
    rollout = collector.collect(alpha=0.001)
    counts = np.bincount([ids.index(row) for row in rollout.action_ids], minlength=6)
    np.testing.assert_allclose(counts / 3000, 1 / 6, atol=0.03)
    after = collector.collect(alpha=1e-6)  # now greedy
    assert len({tuple(row) for row in after.action_ids}) <= 2


def test_runs_in_evaluation_mode_and_leaves_the_mode_as_it_was(model: QRAGModel) -> None:
    seen: list[bool] = []
    for encoder in (model.state_encoder, model.action_encoder):
        encoder.register_forward_pre_hook(
            lambda module, _: seen.append(module.training or torch.is_grad_enabled())
        )
    collector = collector_of(model, shaken(model))
    model.train()
    collector.collect(alpha=0.1)
    assert seen
    assert not any(seen)
    assert model.training


@pytest.mark.parametrize("refresh_every", [0, 4])
def test_what_was_embedded_lasts_for_updates_not_for_batches(
    model: QRAGModel, refresh_every: int
) -> None:
    longer = Colours(6, support=3)  # no episode ends meanwhile
    settings = {"refresh_every": refresh_every, "rollout_steps": 1}
    one = collector_of(model, shaken(model), longer, **settings)
    one.collect(0.1, update=5)
    embedded = one.embeddings.embedded
    one.collect(0.1, update=5)  # a second batch before the optimiser's step
    assert one.embeddings.embedded == embedded
    one.collect(0.1, update=6)
    assert one.embeddings.embedded > embedded


def test_no_sample_of_training_is_one_of_a_fixed_set() -> None:
    stream, fixed = EpisodeStream(SOURCE, (1, 0)), FixedSamples(SOURCE, 20, seed=1)
    assert not {stream[i] for i in range(20)} & set(fixed)


@pytest.mark.parametrize("refresh_every", [0, 4])
def test_goes_on_from_a_saved_state(model: QRAGModel, refresh_every: int) -> None:
    settings = {"rollout_steps": 2, "refresh_every": refresh_every}
    target = shaken(model)
    one = collector_of(model, target, **settings)
    one.collect(0.1)
    with torch.no_grad():
        next(model.action_encoder.parameters()).mul_(1.01)
    one.collect(0.1)
    state = copy.deepcopy(one.state_dict())
    other = collector_of(model, target, **settings)
    other.load_state_dict(state)
    for _ in range(3):
        expected, got = one.collect(0.1), other.collect(0.1)
        assert got.state_ids == expected.state_ids
        assert got.action_ids == expected.action_ids
        assert torch.equal(got.next_values, expected.next_values)
    assert one.transitions == other.transitions == 40


def test_text_table_gives_the_models_token_ids(model: QRAGModel) -> None:
    table = TextTable(model)
    texts = ["the red cup fell", "the blue [SEP] hat", "the red cup fell", ""]
    numbers = table.numbers(texts)
    assert numbers.tolist() == [0, 1, 0, 2]
    assert table.action_ids(numbers) == model.action_ids(texts)
    more = table.numbers(["the green key fell"])
    assert table.action_ids([*numbers, *more]) == model.action_ids([*texts, "the green key fell"])
    states = [("where is the cup", texts[:2]), ("where is the hat", [])]
    assert table.state_ids(states) == model.state_ids(states)
    assert table.state_ids(states[::-1]) == model.state_ids(states[::-1])


def test_equal_texts_are_embedded_once_an_update(model: QRAGModel) -> None:
    table = TextTable(model)
    embeddings = ChunkEmbeddings((model.action_encoder, model.action_encoder), table)
    numbers = table.numbers(["a cup", "a hat", "a cup", "a key"])
    rows = embeddings.rows(numbers)
    assert embeddings.embedded == 3
    np.testing.assert_allclose(
        embeddings.vectors[0][rows].numpy(),
        model.encode_actions(["a cup", "a hat", "a cup", "a key"]),
        atol=1e-6,
    )
    embeddings.rows(numbers[:2])
    assert embeddings.embedded == 3
    embeddings.advance()
    embeddings.rows(numbers)
    assert embeddings.embedded == 6


def test_without_targets_a_state_is_embedded_once_an_update(
    model: QRAGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = collector_of(model, model, tau=1.0, random_transitions=0)
    forward, seen = model.state_encoder.forward, []
    monkeypatch.setattr(
        model.state_encoder,
        "forward",
        lambda inputs: seen.extend(map(tuple, inputs)) or forward(inputs),
    )
    for _ in range(3):
        seen.clear()
        rollout = collector.collect(0.1)
        assert len(seen) == len(set(seen))
        assert set(seen) >= set(map(tuple, rollout.state_ids))


def test_background_is_refreshed_every_so_many_updates(model: QRAGModel) -> None:
    table = TextTable(model)
    encoders = (model.action_encoder, model.action_encoder)
    embeddings = ChunkEmbeddings(encoders, table, refresh_every=3)
    texts = ["the red cup fell", "the blue hat fell", "the white key fell"]
    numbers = table.numbers(texts)
    embeddings.mark_support(numbers[1:2])
    old = model.encode_actions(texts)
    fresh = []
    for update in range(5):
        rows = embeddings.rows(numbers)
        vectors = embeddings.vectors[0][rows].numpy()
        fresh.append(np.isclose(vectors, model.encode_actions(texts), atol=1e-6).all(1).tolist())
        if update == 1:
            embeddings.mark_chosen(numbers[2:].tolist())
            embedded = embeddings.embedded
            embeddings.rows(numbers)
            assert embeddings.embedded == embedded  # the weights are still the same
        with torch.no_grad():
            model.action_encoder.transformer.model.embeddings.word_embeddings.weight.mul_(1.5)
        embeddings.advance()
    assert not np.allclose(old, model.encode_actions(texts))
    background, support, chosen = zip(*fresh, strict=True)
    assert background == (True, False, False, True, False)
    assert support == (True,) * 5
    assert chosen == (True, False, True, False, False)


@pytest.mark.parametrize("batch_tokens", [8, 10_000])
def test_embed_keeps_the_order(model: QRAGModel, batch_tokens: int) -> None:
    ids = model.action_ids(["the red cup fell", "cup", "the red cup fell", "the key", ""])
    vectors = embed(model.action_encoder, ids, batch_tokens)
    single = torch.cat([model.action_encoder([row]) for row in ids])
    torch.testing.assert_close(vectors, single, atol=1e-6, rtol=1e-5)
    assert vectors.requires_grad


def test_episode_stream_is_the_same_for_a_seed() -> None:
    stream = EpisodeStream(SOURCE, (1, 0))
    assert stream[5] == EpisodeStream(SOURCE, (1, 0))[5]
    assert stream[5] != stream[6]
    assert stream[5] != EpisodeStream(SOURCE, (1, 1))[5]


def test_rewards_follow_the_settings(model: QRAGModel) -> None:
    reward = RewardConfig(per_fact=0.25, stop_on_success=False)
    gamma = 0.5
    collector = collector_of(
        model, model, Colours(6, support=2), reward=reward, rollout_steps=3, gamma=gamma
    )
    rollout = collector.collect(1.0)
    assert rollout.dones.tolist() == [[False] * 4, [False] * 4, [True] * 4]
    found = [episode.discounted_return for episode in rollout.finished]
    first, second, third = rollout.rewards
    assert found == pytest.approx((first + gamma * second + gamma**2 * third).tolist())
    assert any(found)


def test_states_have_the_query_prompt(folder: Path) -> None:
    prompted = tiny_model(folder, "relative", query_prompt="where is ")
    states = [("the cup", ["the red cup fell"]), ("the hat", [])]
    assert TextTable(prompted).state_ids(states) == prompted.state_ids(states)


def test_what_is_said_of_finished_episodes(model: QRAGModel) -> None:
    source, settings = Colours(6, support=2), {"rollout_steps": 10, "random_transitions": 10**6}
    settings |= {"gamma": 0.5, "reward": RewardConfig(per_fact=0.25), "max_steps": 4}
    assert model.config.max_steps != 4
    collector = collector_of(model, model, source, **settings)
    finished: list[tuple[float, float, float]] = []
    rewards: list[list[float]] = [[] for _ in range(4)]
    for turn in range(3):
        if turn == 2:  # as a resumed training does
            state = collector.state_dict()
            collector = collector_of(model, model, source, **settings)
            collector.load_state_dict(state)
        rollout = collector.collect(1.0)
        for step in range(10):
            for episode, own in enumerate(rewards):
                own.append(float(rollout.rewards[step, episode]))
                if rollout.dones[step, episode]:
                    whole = own[-1] >= 1.0
                    facts = sum(r % 1.0 == 0.25 for r in own)  # each gives a quarter
                    f1 = 2 * facts / (len(own) + 2)
                    total = sum(r * 0.5**t for t, r in enumerate(own))
                    finished.append((total, float(whole), f1))
                    assert whole or len(own) == 4
                    own.clear()
        told = [(e.discounted_return, e.fact_em, e.fact_f1) for e in rollout.finished]
        assert told == [pytest.approx(one) for one in finished]
        finished.clear()


def test_a_table_of_texts_that_starts_anew_changes_nothing(
    model: QRAGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (300_000, 5):
        monkeypatch.setattr(rollout_module, "_MOST_TEXTS", most)
        collector = collector_of(model, model, rollout_steps=2)
        found.append([collector.collect(0.3) for _ in range(5)])
    for one, other in zip(*found, strict=True):
        assert one.action_ids == other.action_ids
        torch.testing.assert_close(one.next_values, other.next_values)


def test_what_was_chosen_or_supports_is_embedded_at_every_update(model: QRAGModel) -> None:
    reward = RewardConfig(stop_on_success=False)
    collector = collector_of(
        model,
        model,
        Colours(6, support=2),
        environments=2,
        random_transitions=10**6,
        rollout_steps=1,
        refresh_every=9,
        reward=reward,
    )
    collector.collect(0.3, update=0)
    held = [
        (chunks, sample, retrieved)
        for chunks, sample, retrieved in zip(
            collector._chunks,
            collector.environment.samples,
            collector.environment.retrieved(),
            strict=True,
        )
    ]
    wanted = {int(chunks[i]) for chunks, s, own in held for i in (*s.support, own[-1])}
    with torch.no_grad():
        next(model.action_encoder.parameters()).mul_(1.5)
    collector.collect(0.3, update=1)
    every = sorted({int(number) for chunks, _, _ in held for number in chunks})
    vectors = collector.embeddings.vectors[0][collector.embeddings._row[every]].numpy()
    now = model.encode_actions(collector.table.texts(every))
    near = np.isclose(vectors, now, atol=1e-6).all(axis=1)
    assert {number for number, fresh in zip(every, near, strict=True) if fresh} == wanted
