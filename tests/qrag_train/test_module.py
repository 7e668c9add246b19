from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from tiny import Colours, tiny_model

from qrag_retriever.errors import ConfigError
from qrag_retriever.model import QRAGModel
from qrag_retriever.rotary import rotate
from qrag_train import module as training
from qrag_train.build import AdaptConfig, adapted
from qrag_train.data.sample import SupportSample
from qrag_train.imitation import candidates
from qrag_train.loader import RolloutLoader
from qrag_train.module import (
    QRAGTrainingModule,
    critic_loss,
    learns_as_it_acts,
    parameter_groups,
)
from qrag_train.returns import lambda_returns
from qrag_train.rewards import RewardConfig
from qrag_train.rollout import EpisodeStream, Rollout, RolloutCollector
from qrag_train.settings import OptimizerConfig, PQNConfig

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder")


def module_of(
    folder: Path, positions: str = "none", average_updates: int = 0, **pqn: object
) -> QRAGTrainingModule:
    torch.manual_seed(0)
    model = tiny_model(folder, positions, scale=0.2, max_steps=2)
    config = {"environments": 8, "random_transitions": 16, "tau": 0.2, "alpha": 0.02, **pqn}
    optimizer = OptimizerConfig(lr=3e-3, warmup_updates=3, average_updates=average_updates)
    return QRAGTrainingModule(model, PQNConfig(**config), optimizer, seed=1)


def trainer_of(updates: int, folder: Path, **settings: Any) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_steps": updates,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 2.0,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**{**defaults, **settings})


class Watch(lightning.Callback):
    """Keeps what was logged and the weights after each update."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        self.logged.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def test_rollout_and_loss_use_the_same_weights(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, torch.Tensor]] = []

    class Spy(QRAGTrainingModule):
        def loss(self, rollout: Any) -> torch.Tensor:
            seen.append(("loss", weights_of(self.model)))
            return super().loss(rollout)

    original = module_of(folder)
    module = Spy(original.model, original.pqn, original.optimizer_config)
    loader = RolloutLoader(Colours(), updates=4, seed=0)
    trainer = trainer_of(4, tmp_path)

    def note(_: object, __: object) -> None:
        if not torch.is_grad_enabled():
            seen.append(("rollout", weights_of(module.model)))

    module.model.action_encoder.register_forward_pre_hook(note)
    trainer.fit(module, loader)
    names = [name for name, _ in seen]
    assert names.count("loss") == 4
    steps: list[torch.Tensor] = []
    for name, weights in seen:
        if name == "loss":
            steps.append(weights)
    start = 0
    for update, end in enumerate(i for i, name in enumerate(names) if name == "loss"):
        assert end > start  # the rollout embedded chunks
        assert all(torch.equal(weights, steps[update]) for _, weights in seen[start:end])
        start = end + 1
    assert not torch.equal(steps[1], steps[3])


def test_states_of_the_rollout_serve_the_loss(folder: Path) -> None:
    module = module_of(folder, random_transitions=0)
    stream = EpisodeStream(Colours(), (0, 0))
    collector = RolloutCollector(
        module.model, module.target, stream, module.pqn, seed=0, keep_graph=True
    )
    rollout = collector.collect(0.1)
    assert rollout.states is not None
    gradients = []
    for given in (rollout, dataclasses.replace(rollout, states=None)):  # the second embeds anew
        module.zero_grad()
        module.loss(given).backward()
        gradients.append(gradients_of(module.model))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)


def test_dropout_forbids_to_reuse_states(folder: Path) -> None:
    model = module_of(folder).model
    assert learns_as_it_acts(model)
    next(m for m in model.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    assert not learns_as_it_acts(model)


def gradients_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


@pytest.mark.parametrize(
    ("refresh_every", "imitation", "dropout", "batches"),
    [
        *((0, 0, 0.0, 1), (3, 0, 0.0, 1), (0, 3, 0.0, 1), (0, 7, 0.0, 1)),
        *((0, 3, 0.1, 1), (0, 7, 0.1, 1), (0, 7, 0.1, 2), (0, 3, 0.0, 2)),
    ],
)
def test_killed_and_resumed_run_ends_with_the_same_weights(
    folder: Path,
    tmp_path: Path,
    refresh_every: int,
    imitation: int,
    dropout: float,
    batches: int,
) -> None:
    def run(updates_until_kill: int | None, checkpoint: Path | None) -> torch.Tensor:
        module = module_of(
            folder, "relative", 3, refresh_every=refresh_every, imitation_updates=imitation
        )
        adapted(module.model, AdaptConfig(freeze_word_embeddings=False, dropout=dropout))
        loader = RolloutLoader(Colours(), updates=9 * batches, seed=0)
        stop = Kill(updates_until_kill, tmp_path / "killed.ckpt")
        trainer = trainer_of(9, tmp_path, callbacks=[stop], accumulate_grad_batches=batches)
        try:
            trainer.fit(module, loader, ckpt_path=checkpoint)
        except KilledError:
            pass
        else:
            assert trainer.global_step == 9
        parts = (module.model, module.target, module.averaged)
        return torch.cat([weights_of(part) for part in parts])

    whole = run(None, None)
    part = run(5, None)
    resumed = run(None, tmp_path / "killed.ckpt")
    assert not torch.equal(part, whole)
    assert torch.equal(resumed, whole)


def test_a_checkpoint_without_random_states_still_loads(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "killed.ckpt"
    for number in (2, None):
        module = module_of(folder, imitation_updates=3)
        trainer = trainer_of(4, tmp_path, callbacks=[Kill(number, file)])
        loader = RolloutLoader(Colours(), updates=4, seed=0)
        if number is not None:
            with pytest.raises(KilledError):
                trainer.fit(module, loader)
            checkpoint = torch.load(file, weights_only=False)
            del checkpoint["rollouts"]
            torch.save(checkpoint, file)
        else:
            trainer.fit(module, loader, ckpt_path=file)
            assert trainer.global_step == 4


class KilledError(Exception):
    pass


class Kill(lightning.Callback):
    def __init__(self, update: int | None, path: Path) -> None:
        self.update, self.path = update, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_step == self.update:
            trainer.save_checkpoint(self.path)
            raise KilledError


@pytest.mark.parametrize("critics", [1, 2])
def test_learns_a_small_task(folder: Path, tmp_path: Path, critics: int) -> None:
    module = module_of(folder, n_critics=critics, environments=16)
    watch = Watch()
    trainer = trainer_of(80, tmp_path, callbacks=[watch])
    trainer.fit(module, RolloutLoader(Colours(), updates=80, seed=0))
    assert watch.logged[3]["fact_em"] < 0.6  # two of six chunks at random: 1/3
    assert np.mean([episode.fact_em for episode in module.recent_episodes()[-64:]]) > 0.75


def test_episodes_follow_after_imitation(folder: Path, tmp_path: Path) -> None:
    module = module_of(folder, imitation_updates=3)
    watch = Watch()
    trainer_of(5, tmp_path, callbacks=[watch]).fit(
        module, RolloutLoader(Colours(), updates=5, seed=0)
    )
    assert [("return" in logged) for logged in watch.logged] == [False, False, False, True, True]
    assert all(logged["transitions_per_s"] > 0 for logged in watch.logged)
    assert module.collector is not None
    assert module.collector.transitions == 2 * 8 * 2  # updates, episodes, steps


class Same:
    """Draws one sample again and again."""

    sample_ = SupportSample("1", "where is the hat", tuple("abcdefghijkl"), (3,))

    def sample(self, rng: np.random.Generator) -> SupportSample:
        return self.sample_


@pytest.mark.parametrize(("environments", "batches"), [(8, 1), (4, 2)])
def test_each_batch_of_imitation_has_its_own_samples_and_negatives(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environments: int,
    batches: int,
) -> None:
    numbers: list[int] = []
    chosen: list[list[list[int]]] = []
    loss, draw = training.imitation_loss, EpisodeStream.__getitem__

    def noted_loss(*arguments: Any) -> torch.Tensor:
        chosen.append(arguments[3])
        return loss(*arguments)

    def noted_draw(self: EpisodeStream, number: int) -> SupportSample:
        numbers.append(number)
        return draw(self, number)

    monkeypatch.setattr(training, "imitation_loss", noted_loss)
    monkeypatch.setattr(EpisodeStream, "__getitem__", noted_draw)
    module = module_of(folder, environments=environments, imitation_updates=9)
    trainer = trainer_of(4, tmp_path, accumulate_grad_batches=batches)
    trainer.fit(module, RolloutLoader(Same(), updates=4 * batches, seed=0))
    # an update of two batches has the samples of one batch of twice the size
    assert numbers == list(range(1 << 40, (1 << 40) + 4 * 8))
    assert len(chosen) == 4 * batches
    for number, own in enumerate(chosen):
        rng = np.random.default_rng((1, 0, number))
        assert own == [candidates(Same.sample_, 6, rng) for _ in range(environments)]


def test_logs_what_a_person_wants_to_see(folder: Path, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(4, tmp_path, callbacks=[watch])
    trainer.fit(module_of(folder), RolloutLoader(Colours(), updates=4, seed=0))
    expected = {"return", "fact_em", "fact_f1", "loss", "alpha", "lr", "transitions_per_s"}
    assert expected <= watch.logged[-1].keys()
    assert watch.logged[0]["alpha"] == pytest.approx(0.02)  # not lowered in the warm-up
    assert watch.logged[0]["lr"] < watch.logged[2]["lr"]


def test_target_networks_follow(folder: Path) -> None:
    module = module_of(folder, tau=0.25)
    before = [parameter.clone() for parameter in module.target.parameters()]
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(1.0)
    module.update_target()
    online = list(module.model.named_parameters())
    moved = 0
    for old, new, (name, parameter) in zip(before, module.target.parameters(), online, strict=True):
        expected = old if ".pooler." in name else 0.75 * old + 0.25 * parameter
        torch.testing.assert_close(new, expected)
        moved += ".pooler." not in name
    assert moved > 10
    assert not any(parameter.requires_grad for parameter in module.target.parameters())


def test_the_mean_weights(folder: Path, tmp_path: Path) -> None:
    history: list[torch.Tensor] = []

    class Watcher(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
            history.append(weights_of(pl_module.model))

    module = module_of(folder, average_updates=3)
    start = weights_of(module.model)
    trainer_of(6, tmp_path, callbacks=[Watcher()]).fit(
        module, RolloutLoader(Colours(), updates=6, seed=0)
    )
    expected = torch.stack(history[:3]).mean(dim=0)
    for weights in history[3:]:
        expected = 2 / 3 * expected + 1 / 3 * weights
    trained = history[-1] != start
    found = weights_of(module.averaged)
    torch.testing.assert_close(found[trained], expected[trained])
    assert not torch.allclose(found[trained], history[-1][trained], atol=1e-5)
    assert not any(parameter.requires_grad for parameter in module.averaged.parameters())


def test_without_mean_weights_there_is_no_copy(folder: Path) -> None:
    module = module_of(folder)
    assert module.averaged is module.model


def test_without_targets_the_trained_networks_serve_as_targets(
    folder: Path, tmp_path: Path
) -> None:
    class Copied(QRAGTrainingModule):
        """Keeps a copy as the target and renews it after every update."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.target = copy.deepcopy(self.model).requires_grad_(False)

    weights = []
    for kind in (QRAGTrainingModule, Copied):
        start = module_of(folder, tau=1.0)
        module = kind(start.model, start.pqn, start.optimizer_config, seed=1)
        trainer_of(5, tmp_path).fit(module, RolloutLoader(Colours(), updates=5, seed=0))
        weights.append(weights_of(module.model))
    assert not torch.equal(weights[0], weights_of(module_of(folder).model))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_norms_and_biases_do_not_decay(folder: Path) -> None:
    module = module_of(folder)
    decayed, others = parameter_groups(module.model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0.0
    names = {id(p): name for name, p in module.model.named_parameters()}
    assert all("LayerNorm" not in names[id(p)] for p in decayed["params"])
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in others["params"])
    assert not any("pooler" in names[id(p)] for p in decayed["params"] + others["params"])


def test_gradients_reach_the_chosen_chunks_only(folder: Path) -> None:
    module = module_of(folder)
    table = module.model.action_encoder.transformer.model.embeddings.word_embeddings.weight
    chosen = module.model.action_ids(["the red cup fell"])
    states = module.model.state_ids([("where is the hat", ["the blue key fell"])])
    q = module.q_values(states, chosen, torch.zeros(1))
    critic_loss(q, torch.ones(1)).backward()
    touched = set(table.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert touched == set(chosen[0])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule(schedule: str) -> None:
    config = OptimizerConfig(warmup_updates=10, schedule=schedule, final_ratio=0.1)
    assert [config.decay(update, 110) for update in (0, 10)] == [1.0, 1.0]
    assert config.decay(60, 110) == pytest.approx(0.55)
    assert config.decay(110, 110) == config.decay(500, 110) == pytest.approx(0.1)
    rising = [config.lr_factor(update, 110) for update in range(11)]
    assert rising == sorted(rising)
    assert rising[0] > 0
    assert rising[-1] == 1.0


@pytest.mark.parametrize("warmup", [0, 3, 5])
def test_a_warm_up_that_ends_too_late_is_told(folder: Path, tmp_path: Path, warmup: int) -> None:
    config = OptimizerConfig(warmup_updates=warmup)
    for total in range(1, 9):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            config.check_length(total)
        reached = max(config.lr_factor(update, total) for update in range(total)) == 1.0
        assert len(told) == (0 if reached else 1)
    with pytest.warns(UserWarning, match="warmup_updates less than 3"):
        trainer_of(3, tmp_path).fit(module_of(folder), RolloutLoader(Colours(), 3, seed=0))


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (PQNConfig, {"gamma": 0.0}),
        (PQNConfig, {"lambda_": 1.5}),
        (PQNConfig, {"alpha": 0.0}),
        (PQNConfig, {"tau": 2.0}),
        (PQNConfig, {"n_critics": 3}),
        (PQNConfig, {"top_k_actions": 0}),
        (PQNConfig, {"environments": 0}),
        (PQNConfig, {"refresh_every": -1}),
        (PQNConfig, {"imitation_updates": -1}),
        (PQNConfig, {"imitation_negatives": 0}),
        (PQNConfig, {"imitation_detours": 1.5}),
        (OptimizerConfig, {"lr": -1.0}),
        (OptimizerConfig, {"schedule": "step"}),
        (OptimizerConfig, {"final_ratio": 2.0}),
    ],
)
def test_settings_are_checked(config: type, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        config(**values)


def test_training_needs_an_end(folder: Path, tmp_path: Path) -> None:
    loader = RolloutLoader(Colours(), updates=2, seed=0)
    with pytest.raises(ConfigError, match="max_steps"):
        trainer_of(-1, tmp_path, max_epochs=-1).fit(module_of(folder), loader)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference fixtures are not here")
@pytest.mark.parametrize("mode", ["relative", "none"])
def test_one_update_equals_the_released_codes(mode: str) -> None:
    from qrag_retriever.reference import load_reference_checkpoint

    stored = np.load(FIXTURES / mode / "update.npz")
    settings = json.loads((FIXTURES / mode / "settings.json").read_text())
    model = load_reference_checkpoint(
        FIXTURES / mode, FIXTURES / "tiny_bert", checkpoint="last", device="cpu"
    )
    weights = named_weights(model)
    for name, parameter in weights.items():
        parameter.data.copy_(torch.from_numpy(stored["critic_before/" + name]))
    pqn = PQNConfig(
        gamma=settings["gamma"],
        lambda_=settings["Lambda"],
        tau=settings["tau"],
        reward=RewardConfig(penalize_extra_steps=True, stop_on_success=False),
    )
    module = QRAGTrainingModule(model, pqn)
    module.model.eval()  # the released code's update ran without dropout
    optimizer = reference_optimizer(model, FIXTURES / mode / "model_last.pt")
    for micro in ("micro0", "micro1"):
        part = {name.split("/")[1]: stored[name] for name in stored if name.startswith(micro)}
        values = torch.from_numpy(part["q_values"]).T
        targets = lambda_returns(
            torch.from_numpy(part["reward"]).T,
            torch.from_numpy(part["not_done"]).T == 0,
            torch.cat([values[1:], torch.zeros(1, 2)]),
            gamma=pqn.gamma,
            lam=pqn.lambda_,
            reference_compat=True,
        )
        expected = part["targets"].reshape(2, 4).T
        np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
        rho = part["act_pos"] if mode == "relative" else np.zeros(8)
        q = module.q_values(
            unpadded(part["state_ids"], part["state_mask"]),
            unpadded(part["act_ids"], part["act_mask"]),
            torch.from_numpy(np.trunc(rho)),
        )
        np.testing.assert_allclose(q.detach()[:, 0], part["q1"], atol=1e-6)
        np.testing.assert_allclose(q.detach()[:, 1], part["q2"], atol=1e-6)
        loss = critic_loss(q, targets.T.flatten())
        assert loss.item() == pytest.approx(float(part["loss"]), abs=1e-6)
        (loss / 2).backward()
    for name, parameter in weights.items():
        np.testing.assert_allclose(parameter.grad, stored["grad/" + name], atol=1e-5)
    torch.nn.utils.clip_grad_norm_(weights.values(), 2.0)
    optimizer.step()
    for name, parameter in weights.items():
        np.testing.assert_allclose(
            parameter.detach(), stored["critic_after/" + name], rtol=0, atol=1e-6
        )


def reference_optimizer(model: QRAGModel, file: Path) -> torch.optim.Optimizer:
    """AdamW where the released code's had come to before the stored update."""
    checkpoint = torch.load(file, weights_only=True)
    stored = checkpoint["critic_optim"]
    names = [name for name in checkpoint["critic"] if not name.endswith(BUFFERS)]
    assert len(names) == len(stored["param_groups"][0]["params"])
    states = {name: stored["state"].get(i) for i, name in enumerate(names)}
    settings = {
        name: stored["param_groups"][0][name] for name in ("lr", "betas", "eps", "weight_decay")
    }
    weights = named_weights(model)
    optimizer = torch.optim.AdamW(weights.values(), **settings)
    for name, parameter in weights.items():
        optimizer.state[parameter] = {k: v.clone() for k, v in states[name].items()}
    return optimizer


def unpadded(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]


PREFIXES = {"state_encoder": "state_embed.model.", "action_encoder": "action_embed.model.model."}


BUFFERS = ("cls_token", "sep_token")


def named_weights(model: QRAGModel) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their names in the released code."""
    return {
        prefix + name: parameter
        for encoder, prefix in PREFIXES.items()
        for name, parameter in getattr(model, encoder).transformer.model.named_parameters()
        if "pooler" not in name
    }


def slow_return(rollout: Rollout, step: int, episode: int, gamma: float, lam: float) -> float:
    """G of one step (METHOD §2), read backwards from the end of its episode or of the rollout."""
    reward = float(rollout.rewards[step, episode])
    if rollout.dones[step, episode]:
        return reward
    value = float(rollout.next_values[step, episode])
    last = step == len(rollout.rewards) - 1
    rest = value if last else slow_return(rollout, step + 1, episode, gamma, lam)
    return reward + gamma * ((1 - lam) * value + lam * rest)


def test_the_loss_is_the_mean_over_transitions_and_critics(folder: Path) -> None:
    module = module_of(folder, "relative", gamma=0.7, lambda_=0.3, environments=3, rollout_steps=5)
    stream = EpisodeStream(Colours(5, support=2), (0, 0))
    collector = RolloutCollector(module.model, module.target, stream, module.pqn, seed=0)
    rollout = collector.collect(0.5)
    steps, episodes = rollout.rewards.shape
    assert rollout.dones.any()
    assert not rollout.dones.all()
    losses = []
    with torch.no_grad():
        for step in range(steps):
            for episode in range(episodes):
                row = step * episodes + episode
                state = module.model.state_encoder([rollout.state_ids[row]])[0]
                action = module.model.action_encoder([rollout.action_ids[row]])[0]
                # the chunk is turned here and the state in training
                product = state * rotate(action, rollout.positions[step, episode])
                target = slow_return(rollout, step, episode, gamma=0.7, lam=0.3)
                losses += [(2 * float(half.sum()) - target) ** 2 for half in product.chunk(2)]
    assert float(module.loss(rollout)) == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_optimizers_settings_reach_it(folder: Path) -> None:
    config = OptimizerConfig(
        lr=1e-3, betas=(0.7, 0.8), eps=1e-4, weight_decay=0.3, warmup_updates=1
    )
    module = QRAGTrainingModule(tiny_model(folder, "none"), PQNConfig(), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QRAGTrainingModule, "_total_updates", 5)
        groups = module.configure_optimizers()["optimizer"].param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.7, 0.8), 1e-4)}
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_so_many_questions_make_a_detour(
    folder: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    given: list[int | None] = []

    def loss(model: QRAGModel, *arguments: Any) -> torch.Tensor:
        given.extend(arguments[-1])
        return next(model.parameters()).sum() * 0

    monkeypatch.setattr(training, "imitation_loss", loss)
    settings = {"imitation_updates": 40, "imitation_detours": share, "environments": 8}
    module = module_of(folder, **settings)
    loader = RolloutLoader(Colours(), updates=40, seed=0)
    trainer_of(40, folder).fit(module, loader)
    detours = sum(detour is not None for detour in given) / len(given)
    assert len(given) == 320
    assert detours == share if share in (0, 1) else abs(detours - share) < 0.1
