"""Checkpoints of the released code: Q-values of the fixtures, and of its encoders rebuilt here."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released import (
    CHUNKS,
    QUESTION,
    edit_config,
    released_embedding,
    released_positions,
    released_q,
    write_checkpoint,
)
from transformers import AutoTokenizer

from qrag_retriever.errors import ConfigError, ModelFormatError
from qrag_retriever.model import QRAGModel
from qrag_retriever.reference import load_reference_checkpoint
from qrag_retriever.scoring import score

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "reference"
pytestmark = pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")


# --- the published fixtures


@pytest.fixture(scope="module", params=["relative", "none"])
def published(request: pytest.FixtureRequest) -> tuple[QRAGModel, Path]:
    if not FIXTURES.is_dir():
        pytest.skip("no outputs of the released code beside this repository")
    folder = FIXTURES / request.param
    return load_reference_checkpoint(folder, device="cpu"), folder


def test_published_q_values(published: tuple[QRAGModel, Path]) -> None:
    model, folder = published
    samples = json.loads((FIXTURES / "samples.json").read_text())
    outputs = json.loads((folder / "outputs.json").read_text())
    arrays = np.load(folder / "outputs.npz")
    compared = 0
    for number, (sample, output) in enumerate(zip(samples, outputs, strict=True)):
        chunks = sample["chunks"]
        actions = torch.from_numpy(model.encode_actions(chunks))
        np.testing.assert_allclose(actions, arrays[f"{number}/chunk_embed"], atol=1e-6)
        for step, chosen in enumerate(output["action"]):
            retrieved = output["action"][:step]
            if any("[SEP]" in chunks[chunk] for chunk in retrieved):
                break  # the released code splits such a chunk in two
            order = sorted(retrieved) if model.config.state_order == "document" else retrieved
            state = (sample["question"], [chunks[chunk] for chunk in order])
            ids = output["state_ids"][step]
            assert model.state_ids([state])[0] == ids[: len(ids) - ids[::-1].index(3)]

            embedding = model.encode_states([state])
            np.testing.assert_allclose(embedding[0], arrays[f"{number}/s_embed"][step], atol=1e-6)
            scheme = model.config.position_scheme
            q = score(torch.from_numpy(embedding), actions, [retrieved], scheme)[0].numpy()
            free = arrays[f"{number}/mask"][step]
            np.testing.assert_allclose(q[free], arrays[f"{number}/q"][step][free], atol=1e-5)
            if output["gap"][step] > 1e-5:
                assert np.where(free, q, -np.inf).argmax() == chosen
            compared += 1
    assert compared >= 50


def test_published_settings(published: tuple[QRAGModel, Path]) -> None:
    model, folder = published
    known = json.loads((folder / "settings.json").read_text())
    config = model.config
    assert config.positions == known["mode"]
    assert config.max_steps == known["max_steps"]
    assert config.max_chunk_tokens == known["max_action_length"]
    assert config.max_query_tokens == known["max_action_length_in_memory"]
    assert config.max_chunk_tokens_in_state == known["max_action_length_in_memory"]
    assert (config.state_order == "document") == known["sort_by_index"]
    if config.positions == "relative":
        assert config.position_step == known["step_size"]
        assert config.position_span == known["max_value"]
    assert config.training["checkpoint"] == "model_last.pt"
    assert config.training["settings"]["seed"] == 42


def test_published_saved_and_loaded(published: tuple[QRAGModel, Path], tmp_path: Path) -> None:
    model, _ = published
    loaded = QRAGModel.from_pretrained(model.save_pretrained(tmp_path / "m"), device="cpu")
    states = [(QUESTION, CHUNKS[:3])]
    np.testing.assert_array_equal(model.encode_states(states), loaded.encode_states(states))
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), loaded.encode_actions(CHUNKS))
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint


# --- checkpoints written here


LAYOUTS = [
    ("pqn", "relative", "tiny_encoder", 12),
    ("pqn", "absolute", "tiny_encoder", 12),
    ("e5", "hotpotqa", "tiny_xlm_roberta", 9),
    ("gte", "combined", "tiny_xlm_roberta", 12),
    ("qwen3", "relative", "tiny_qwen3", 12),
]


@pytest.mark.parametrize(("algorithm", "environment", "fixture", "state_limit"), LAYOUTS)
def test_q_of_the_released_encoders(
    algorithm: str,
    environment: str,
    fixture: str,
    state_limit: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    encoder: Path = request.getfixturevalue(fixture)
    states, actions = write_checkpoint(tmp_path / "c", encoder, algorithm, environment)
    model = load_reference_checkpoint(tmp_path / "c", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    in_order = environment in ("relative", "absolute")
    assert model.config.state_order == ("document" if in_order else "retrieval")

    def tokens(text: str, limit: int) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return ids

    expected = np.stack(
        [released_embedding(actions, tokens(text, 14), algorithm) for text in CHUNKS]
    )
    embedded = model.encode_actions(CHUNKS)
    np.testing.assert_allclose(embedded, expected, atol=1e-6)
    # of the decoder's states only the first is compared: see the module's first lines
    for retrieved in [[]] if algorithm == "qwen3" else [[], [5], [5, 0], [5, 0, 3], [1, 2, 0, 6]]:
        found = [CHUNKS[chunk] for chunk in (sorted(retrieved) if in_order else retrieved)]
        parts = " [SEP] ".join([QUESTION, *found]).split("[SEP]")
        ids = reduce(
            lambda left, right: [*left[:-1], model.state_encoder.separator, *right[1:]],
            [tokens(part, state_limit) for part in parts],
        )
        assert model.state_ids([(QUESTION, found)])[0] == ids
        embedding = model.encode_states([(QUESTION, found)])
        state = released_embedding(states, ids, algorithm)
        np.testing.assert_allclose(embedding[0], state, atol=1e-6)
        q = score(
            torch.from_numpy(embedding),
            torch.from_numpy(embedded),
            [retrieved],
            model.config.position_scheme,
        )
        positions = released_positions(len(CHUNKS), retrieved, environment)
        np.testing.assert_allclose(q[0], released_q(state, expected, positions), atol=1e-5)


def test_decoder_without_normalisation(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    _, actions = write_checkpoint(folder, tiny_qwen3, "qwen3")
    edit_config(folder, "algo.state_model.normalize_embeds", False)
    model = load_reference_checkpoint(folder, device="cpu")
    ids = torch.tensor(model.action_ids(["Mary"]))
    with torch.no_grad():
        expected = actions(ids)[0][:, -1]
    np.testing.assert_allclose(model.encode_actions(["Mary"]), expected, atol=1e-6)


def test_special_token_in_a_text(tiny_encoder: Path, tmp_path: Path) -> None:
    """The action encoder reads it as the token, like the released code; a state does not."""
    write_checkpoint(tmp_path / "c", tiny_encoder)
    model = load_reference_checkpoint(tmp_path / "c", device="cpu")
    assert model.action_ids(["Mary [SEP] John"])[0].count(3) == 2
    assert model.state_ids([("Who?", ["Mary [SEP] John"])])[0].count(3) == 2


def test_saved_model_and_its_origin(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qrag-ft-bert"
    write_checkpoint(folder, tiny_encoder)
    model = load_reference_checkpoint(folder, device="cpu")
    loaded = QRAGModel.from_pretrained(model.save_pretrained(tmp_path / "m"), device="cpu")
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), loaded.encode_actions(CHUNKS))
    states = [(QUESTION, CHUNKS[:2])]
    np.testing.assert_array_equal(model.encode_states(states), loaded.encode_states(states))
    training = loaded.config.training
    assert training["source"] == "qrag-ft-bert"
    assert training["checkpoint"] == "model_best.pt"
    assert training["settings"]["envs"]["env"]["max_steps"] == "${envs.max_steps}"
    assert "secret" not in loaded.config.to_json()


def test_choice_of_checkpoint_and_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write_checkpoint(folder, tiny_encoder)
    critic = torch.load(folder / "model_best.pt")["critic"]
    last = {name: value + 1.0 for name, value in critic.items()}
    torch.save({"critic": last}, folder / "model_last.pt")

    def used(**options: Any) -> str:
        model = load_reference_checkpoint(folder, device="cpu", **options)
        return str(model.config.training["checkpoint"])

    assert used() == "model_best.pt"
    assert used(checkpoint="last") == "model_last.pt"
    best = load_reference_checkpoint(folder, device="cpu").encode_actions(["Mary"])
    other = load_reference_checkpoint(folder, checkpoint="last", device="cpu")
    assert not np.allclose(best, other.encode_actions(["Mary"]))
    (folder / "model_best.pt").unlink()
    assert used() == "model_last.pt"
    with pytest.raises(ModelFormatError, match=r"holds no model_best\.pt"):
        used(checkpoint="best")
    with pytest.raises(ConfigError, match="'best', 'last' or None"):
        used(checkpoint="first")
    edit_config(folder, "algo.model.model_name", "/elsewhere/contriever")
    with pytest.raises(ModelFormatError, match=r"/elsewhere/contriever.*as encoder"):
        used()
    assert used(encoder=tiny_encoder) == "model_last.pt"


def test_limits_beyond_the_window(tiny_encoder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", tiny_encoder)
    edit_config(tmp_path / "c", "max_action_length", 512)
    model = load_reference_checkpoint(tmp_path / "c", device="cpu")
    assert model.config.max_chunk_tokens == 64
