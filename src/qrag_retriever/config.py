"""Settings of a Q-RAG model: everything about it that is not a weight."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qrag_retriever.errors import ConfigError, ModelFormatError
from qrag_retriever.positions import PositionMode, PositionScheme

if TYPE_CHECKING:
    from collections.abc import Mapping

StateOrder = Literal["document", "retrieval"]

CONFIG_FILE = "qrag_config.json"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class QRAGConfig:
    """Settings shared by training and retrieval; stored as ``qrag_config.json`` in a model folder.

    Attributes:
        positions: How a chunk's place enters its Q-value: ``"relative"`` to the chunks found so far
            (paper §3.3), ``"absolute"`` chunk number, or ``"none"`` (open-domain questions).
        position_step: δ of eq. 6, the distance between the intervals that retrieved chunks open.
        position_span: ℓ of eq. 6, the range of ρ inside one interval.
        position_endpoint: ``False``: eq. 6, ρ reaches ``ℓ·(L-1)/L`` in an interval of L chunks;
            ``True``: the released code, which spreads ρ up to ℓ itself.
        truncate_positions: Cut ρ to an integer before the rotation, as the released code does.
        rotary_base: Base of the rotation frequencies.
        scale: Factor on both embeddings; brings untrained Q-values into the range of rewards.
        state_order: Order of the retrieved chunks in the state: by place in the ``"document"`` or
            by ``"retrieval"`` time.
        max_query_tokens: Limit of the query in a state, special tokens included; ``None``: the
            state's window alone.
        max_chunk_tokens_in_state: The same for each retrieved chunk in a state.
        max_chunk_tokens: Limit of a chunk in the action encoder; ``None``: the encoder's own.
        max_state_tokens: Limit of a whole state; ``None``: the encoder's window.
        query_prompt: Text put before every query, such as ``"query: "`` for E5.
        chunk_prompt: Text put before every chunk in the action encoder.
        max_steps: Retrieval budget the model was trained for, the default number of chunks.
        q_threshold: Stop at the first step whose best Q lies below it; ``None``: never.
        alpha: Temperature α of the soft policy (eq. 3) by which beams are ranked, in units of
            reward: the smaller, the less a chunk of lower Q is followed.
        training: What the model was trained on and how, for the reader.

    Raises:
        ConfigError: If a value is of the wrong type or out of range.

    Example:
        >>> QRAGConfig(positions="relative", max_steps=6).position_scheme.mode
        'relative'
    """

    positions: PositionMode = "none"
    position_step: float = 10.0
    position_span: float = 9.0
    position_endpoint: bool = False
    truncate_positions: bool = False
    rotary_base: float = 10000.0
    scale: float = 1.0
    state_order: StateOrder = "document"
    max_query_tokens: int | None = None
    max_chunk_tokens_in_state: int | None = None
    max_chunk_tokens: int | None = None
    max_state_tokens: int | None = None
    query_prompt: str = ""
    chunk_prompt: str = ""
    max_steps: int = 4
    q_threshold: float | None = None
    alpha: float = 0.05
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if isinstance(value, np.generic):  # which JSON does not know
                object.__setattr__(self, name, value.item())
        _require(self.positions in ("none", "absolute", "relative"), self, "positions")
        _require(self.state_order in ("document", "retrieval"), self, "state_order")
        _require(_positive(self.position_step), self, "position_step")
        _require(_positive(self.position_span), self, "position_span")
        _require(self.position_span <= self.position_step, self, "position_span")
        _require(_positive(self.rotary_base) and self.rotary_base > 1, self, "rotary_base")
        _require(_positive(self.scale), self, "scale")
        _require(_positive(self.alpha), self, "alpha")
        _require(_integer(self.max_steps, least=1), self, "max_steps")
        for name in (
            "max_query_tokens",
            "max_chunk_tokens_in_state",
            "max_chunk_tokens",
            "max_state_tokens",
        ):
            limit = getattr(self, name)
            _require(limit is None or _integer(limit, least=4), self, name)
        for name in ("query_prompt", "chunk_prompt"):
            _require(isinstance(getattr(self, name), str), self, name)
        for name in ("position_endpoint", "truncate_positions"):
            _require(isinstance(getattr(self, name), bool), self, name)
        _require(isinstance(self.training, dict) and _is_json(self.training), self, "training")
        threshold = self.q_threshold
        _require(
            threshold is None or (_is_number(threshold) and not math.isnan(threshold)),
            self,
            "q_threshold",
        )

    @property
    def position_scheme(self) -> PositionScheme:
        """The map from chunk numbers to positions ρ that these settings describe."""
        return PositionScheme(
            mode=self.positions,
            step=self.position_step,
            span=self.position_span,
            endpoint=self.position_endpoint,
            truncate=self.truncate_positions,
        )

    def replace(self, **changes: Any) -> QRAGConfig:
        """A copy with some settings changed.

        Raises:
            ConfigError: If a name is no setting, or a value is out of range.
        """
        return type(self).from_dict({**dataclasses.asdict(self), **changes})

    def to_json(self) -> str:
        """The settings as the text of ``qrag_config.json``."""
        return json.dumps(
            {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str) -> QRAGConfig:
        """Read the text of ``qrag_config.json``.

        Raises:
            ModelFormatError: If the text is no JSON object or of a later format version.
            ConfigError: If a name is no setting, or a value is out of range.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(
                f"The model's qrag_config.json is not valid JSON ({error}); save or download the "
                "model again."
            ) from error
        if not isinstance(values, dict) or "format_version" not in values:
            raise ModelFormatError("qrag_config.json has no 'format_version': not a Q-RAG model.")
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ModelFormatError(
                f"qrag_config.json has format version {version}; this release reads "
                f"{FORMAT_VERSION}. Upgrade qrag-retriever or save the model again."
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QRAGConfig:
        """Build from names and values.

        Raises:
            ConfigError: If a name is no setting, or a value is of the wrong type or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(
                f"Unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(names)}."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"A setting has a value of the wrong type: {error}.") from error


_ALLOWED = {
    "positions": "'none', 'absolute' or 'relative'",
    "state_order": "'document' or 'retrieval'",
    "position_span": "a number above 0 and at most position_step",
    "rotary_base": "a number above 1",
    "query_prompt": "a text",
    "chunk_prompt": "a text",
    "max_steps": "an integer of at least 1",
    "q_threshold": "a number or None",
    "position_endpoint": "True or False",
    "truncate_positions": "True or False",
    "training": "a dict that can be written as JSON",
}


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: float) -> bool:
    try:
        return _is_number(value) and math.isfinite(value) and value > 0
    except OverflowError:  # an integer larger than any float
        return False


def _integer(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _require(condition: bool, config: QRAGConfig, name: str) -> None:
    if not condition:
        default = "an integer of at least 4 or None" if "tokens" in name else "a number above 0"
        raise ConfigError(
            f"{name}={getattr(config, name)!r} is not allowed; give {_ALLOWED.get(name, default)}."
        )
