from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.config import FORMAT_VERSION, QRAGConfig
from qrag_retriever.errors import ConfigError, ModelFormatError

LIMIT = st.none() | st.integers(4, 10**6)
ABOVE_ZERO = st.floats(1e-6, 1e6)
CONFIGS = st.builds(
    lambda span, extra, **settings: QRAGConfig(
        position_span=span, position_step=span + extra, **settings
    ),
    span=ABOVE_ZERO,
    extra=st.floats(0, 1e3),
    positions=st.sampled_from(["none", "absolute", "relative"]),
    position_endpoint=st.booleans(),
    truncate_positions=st.booleans(),
    rotary_base=st.floats(1.5, 1e6),
    scale=ABOVE_ZERO,
    state_order=st.sampled_from(["document", "retrieval"]),
    max_query_tokens=LIMIT,
    max_chunk_tokens_in_state=LIMIT,
    max_chunk_tokens=LIMIT,
    max_state_tokens=LIMIT,
    query_prompt=st.text(max_size=9),
    chunk_prompt=st.text(max_size=9),
    max_steps=st.integers(1, 1000),
    q_threshold=st.none() | st.floats(-10, 10),
    alpha=st.floats(1e-3, 1e3),
    training=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)


@given(CONFIGS)
def test_json_round_trip(config: QRAGConfig) -> None:
    text = config.to_json()
    assert json.loads(text)["format_version"] == FORMAT_VERSION
    assert QRAGConfig.from_json(text) == config


def test_defaults_are_the_papers_positions() -> None:
    config = QRAGConfig(positions="relative")
    scheme = config.position_scheme
    assert (scheme.step, scheme.span, scheme.endpoint, scheme.truncate) == (10, 9, False, False)
    # eq. 6 with b_1 = 2, N = 5: 0 + 9·(0/2, 1/2), then 10 + 9·(0/3, 1/3, 2/3)
    assert scheme.positions(5, [2]).tolist() == [0, 4.5, 10, 13, 16]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("positions", "random"),
        ("state_order", "index"),
        ("position_step", 0.0),
        ("position_span", -1.0),
        ("position_span", 10.5),
        ("position_span", float("nan")),
        ("rotary_base", 1.0),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("scale", 0.0),
        ("scale", float("inf")),
        ("max_steps", 0),
        ("max_steps", 2.5),
        ("max_steps", True),
        ("max_query_tokens", 3),
        ("max_chunk_tokens_in_state", -1),
        ("max_chunk_tokens", 0),
        ("max_chunk_tokens", 20.5),
        ("max_state_tokens", 1),
        ("q_threshold", float("nan")),
        ("query_prompt", None),
        ("chunk_prompt", 1),
        ("q_threshold", "0.3"),
        ("scale", "1"),
        ("rotary_base", None),
        ("alpha", True),
        ("truncate_positions", "no"),
        ("position_endpoint", 1),
        ("training", None),
        ("training", {"when": object()}),
        ("scale", 10**400),
    ],
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(
        ConfigError, match=f"^{name}={value!r} is not allowed; give ".replace("+", r"\+")
    ):
        QRAGConfig(**{name: value})


def test_numbers_of_numpy_are_saved_as_numbers() -> None:
    values: dict[str, Any] = {"q_threshold": np.float32(0.5), "max_steps": np.int64(3)}
    config = QRAGConfig(**values, scale=np.float64(2))
    assert config == QRAGConfig(q_threshold=0.5, max_steps=3, scale=2.0)
    assert QRAGConfig.from_json(config.to_json()) == config


def test_unknown_and_mistyped_settings() -> None:
    with pytest.raises(ConfigError, match="Unknown setting 'max_step'; known: positions,"):
        QRAGConfig.from_dict({"max_step": 3})
    with pytest.raises(ConfigError, match=r"scale=.big. is not allowed"):
        QRAGConfig.from_dict({"scale": "big"})


def test_replace() -> None:
    config = QRAGConfig(max_steps=2, training={"data": "babilong"})
    changed = config.replace(max_steps=5)
    assert changed == dataclasses.replace(config, max_steps=5)
    assert config.max_steps == 2
    with pytest.raises(ConfigError, match="max_steps=0"):
        config.replace(max_steps=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format_version": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[]", "no 'format_version'"),
        ("{}", "no 'format_version'"),
        (json.dumps({"format_version": 99}), "format version 99; this release reads 1. Upgrade"),
    ],
)
def test_foreign_files(text: str, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        QRAGConfig.from_json(text)
