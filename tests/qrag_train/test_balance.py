from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import COLOURS, THINGS, tiny_model

from qrag_retriever import QRAGModel
from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_retriever.positions import PositionScheme
from qrag_retriever.scoring import score
from qrag_retriever.vectors import StoredVectors
from qrag_train.balance import balance

TEXTS = [f"where is the {colour} {thing}" for colour in COLOURS for thing in THINGS]


@pytest.fixture
def uneven(tmp_path: Path) -> QRAGModel:
    """Two encoders that differ; two components of actions are much larger than the others."""
    model = QRAGModel.from_pretrained(tiny_model(tmp_path / "new").save_pretrained(tmp_path / "m"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        norm = model.action_encoder.transformer.model.encoder.layer[-1].output.LayerNorm
        norm.weight[[3, 18]] *= 30
    return model


def q_values(model: QRAGModel, kind: str = "float32") -> np.ndarray:
    states = model.encode_states([(text, [TEXTS[3]]) for text in TEXTS[:7]])
    actions = StoredVectors.of(model.encode_actions(TEXTS), kind).tensor()
    scheme = PositionScheme("relative", truncate=False)
    return score(torch.from_numpy(states), actions, [[3]] * 7, scheme).numpy()


def test_q_stays_and_int8_loses_less(uneven: QRAGModel) -> None:
    exact, coarse = q_values(uneven), q_values(uneven, "int8")
    balance(uneven, TEXTS)
    largest = float(np.abs(exact).max())
    assert q_values(uneven) == pytest.approx(exact, abs=1e-5 * largest)
    pairs = uneven.encode_actions(TEXTS).reshape(len(TEXTS), -1, 2)
    size = np.sqrt(np.square(pairs).mean(axis=(0, 2)))
    assert size == pytest.approx(np.full_like(size, size[0]), rel=1e-4)
    lost, loses = (np.abs(q - exact).mean() for q in (coarse, q_values(uneven, "int8")))
    assert loses < 0.7 * lost


def test_weights_in_half_precision_get_another_fingerprint(uneven: QRAGModel) -> None:
    half = uneven.place("cpu", "bfloat16")
    before = half.fingerprint
    balance(half, TEXTS)
    assert half.fingerprint != before


def test_what_cannot_be_balanced(tmp_path: Path) -> None:
    one = tiny_model(tmp_path / "one")
    with pytest.raises(ConfigError, match="are one"):
        balance(QRAGModel(one.action_encoder, one.action_encoder, one.config), TEXTS)
    normalized = tiny_model(tmp_path / "two", normalize=True)
    with pytest.raises(ConfigError, match="does not end with a norm"):
        balance(normalized, TEXTS)
    with pytest.raises(InvalidInputError, match="no texts"):
        balance(one, [])
