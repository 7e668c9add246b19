"""The released code as the tests know it: its config, its checkpoint, its arithmetic."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModel

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "Where is the milk?"
CHUNKS = [
    "Mary took the milk there.",
    "John went to the garden.",
    "",
    "Mary moved to the kitchen and then she travelled back to the office of a film director.",
    "John went to the garden.",
    "Paris is the capital of France",
    "Sandra wrote  a song.",
]


def training_config(encoder: str, algorithm: str, environment: str) -> dict[str, Any]:
    """What the released code saves: its files put together, references left in."""
    embedders = "rl.bert_predictor."
    predictor = {
        "_target_": embedders + "BertPredictor",
        "num_hidden_layers": "${algo.model.predictor.num_layers}",
        "n_output": "${algo.model.predictor.output_dim}",
    }
    hyperparams = {"max_action_length_in_memory": "${max_action_length_in_memory}"}
    algo: dict[str, Any] = {"model": {"model_name": encoder}, "action_model": predictor}
    if algorithm == "qwen3":
        algo["model"] |= {"model_kwargs": None, "tokenizer_kwargs": {"padding_side": "left"}}
        simple = {
            "_target_": embedders + "SimpleEmbedder",
            "model_name": "${algo.model.model_name}",
        }
        algo |= {"action_model": simple, "state_model": simple}
    else:
        algo["model"]["predictor"] = {"num_layers": 2, "input_dim": 32, "output_dim": 1}
    if algorithm == "e5":
        hyperparams["max_action_length_in_memory"] = 9
    algo["action_embed_dict"] = {
        mode: {"_target_": embedders + name, "model": "${algo.action_model}"}
        for mode, name in {
            "absolute": "EmbedderWithAbsoluteEncoding",
            "random": "EmbedderWithAbsoluteEncoding",
            "relative": "EmbedderWithRelativeEncoding",
            "none": "EmbedderNone",
        }.items()
    }
    algo["pqn"] = {
        "state_embed": "${algo.state_model}" if algorithm == "qwen3" else predictor,
        "action_embed": "${algo.action_embed_dict.${envs.positions_processor}}",
        "hyperparams": hyperparams,
    }
    absolute = {"_target_": "envs.text_env.AbsolutePositionProcessor"}
    envs: dict[str, Any] = {
        "max_steps": 3,
        "positions_processor": "none" if environment in ("hotpotqa", "combined") else environment,
        "positions_processor_dict": {
            "none": absolute,
            "absolute": absolute,
            "random": {"_target_": "envs.text_env.RandomPositionProcessor"},
            "relative": {"_target_": "envs.text_env.RelativePositionProcessor", "step_size": 20},
        },
        "env": {
            "max_steps": "${envs.max_steps}",
            "action_embed_length": "${max_action_length}",
            "max_action_length_in_memory": "${max_action_length_in_memory}",
            "separator": " [SEP] ",
            "sort_by_index": True,
            "positions_processor": "${envs.positions_processor_dict.${envs.positions_processor}}",
            "feedback_model": "${feedback.feedback_dict.${feedback.type}}",
        },
    }
    if environment in ("hotpotqa", "combined"):
        envs |= {"sort_by_index": False}
        envs["env"]["sort_by_index"] = "${envs.sort_by_index}"
    if environment == "combined":
        envs["env"]["positions_processor"] = absolute
    return {
        "seed": 42,
        "max_action_length": 14,
        "max_action_length_in_memory": 12,
        "envs": envs,
        "algo": algo,
        "feedback": {"api_key": "secret"},
    }


def write_checkpoint(
    folder: Path, encoder: Path, algorithm: str = "pqn", environment: str = "relative"
) -> tuple[Any, Any]:
    """A checkpoint with random weights; returns its state and action transformers."""
    folder.mkdir()
    config = AutoConfig.from_pretrained(encoder)
    if algorithm != "qwen3":
        config.num_hidden_layers = 2
    torch.manual_seed(7)
    states, actions = (AutoModel.from_config(config).eval() for _ in range(2))
    critic = OrderedDict({"state_embed.head.bias": torch.zeros(3)})
    critic.update({f"state_embed.model.{k}": v for k, v in states.state_dict().items()})
    critic.update({f"action_embed.model.model.{k}": v for k, v in actions.state_dict().items()})
    critic["action_embed.rotary_emb.freqs"] = torch.zeros(4)
    torch.save({"critic": critic, "policy": {}, "alpha": 0.01}, folder / "model_best.pt")
    settings = training_config(str(encoder), algorithm, environment)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return states, actions


def edit_config(folder: Path, path: str, value: Any) -> None:
    """Change one setting; ``None`` removes it."""
    file = folder / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    *parents, last = path.split(".")
    node = reduce(lambda inner, key: inner[key], parents, settings)
    node[last] = value
    if value is None:
        del node[last]
    file.write_text(yaml.safe_dump(settings))


def released_embedding(model: Any, ids: list[int], algorithm: str) -> np.ndarray:
    """One text through the released encoders' arithmetic, without padding."""
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0][0]
    if algorithm == "qwen3":
        return (hidden[-1] / hidden[-1].norm()).numpy()
    return (hidden.mean(0) / 10).numpy()


def released_positions(count: int, retrieved: list[int], mode: str) -> np.ndarray:
    if mode != "relative":
        return np.arange(count) * float(mode == "absolute")
    result = np.zeros(count)
    edges = [0, *sorted(retrieved), count]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        result[start:end] = np.linspace(0, 18, end - start) + 20 * number
    return np.trunc(result.astype(np.float32))


def released_q(state: np.ndarray, actions: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """⟨s, R(ρ)a⟩ with both halves rotated, written out with complex numbers."""
    half = actions.shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(0, half, 2) / half)
    turns = np.tile(np.exp(1j * positions[:, None] * frequencies), 2)
    rotated = (actions[:, ::2] + 1j * actions[:, 1::2]) * turns
    return (rotated * (state[::2] - 1j * state[1::2])).real.sum(1)
