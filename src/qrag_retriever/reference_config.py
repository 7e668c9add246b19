"""The training config beside a published checkpoint: its references, and what it says about Q."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from qrag_retriever.errors import ConfigError, ModelFormatError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_FILE = "config.yaml"

# Read as ⟦a.b⟧, because braces end a plain value where YAML is in flow style.
_REFERENCE = re.compile(r"\$\{([^${}\n]+)\}")
_BRACKETED = re.compile("⟦([^⟦⟧]+)⟧")
_REQUIRED = object()
_ABSENT = object()


class ReferenceConfig:
    """A ``config.yaml`` of the released code, in which ``${a.b}`` stands for the setting at a path.

    References are followed when a setting is asked for, so those of other parts need not resolve.

    Args:
        file: The file.

    Raises:
        ModelFormatError: If it is missing or no YAML of settings.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._values = yaml.safe_load(_bracket(file.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ModelFormatError(
                f"{file} is missing. Give the folder of a checkpoint: {CONFIG_FILE} beside "
                "model_best.pt or model_last.pt."
            ) from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ModelFormatError(f"{file} cannot be read: {error}. Download it again.") from error
        if not isinstance(self._values, dict):
            raise ModelFormatError(f"{file} holds no settings. Download it again.")

    @property
    def is_bert(self) -> bool:
        """Whether the encoders are mean-pooled and divided by 10; else they use the last token.

        Raises:
            ConfigError: If they are of a third kind.
        """
        kind = self._class("algo.pqn.state_embed")
        if kind not in ("BertPredictor", "SimpleEmbedder"):
            raise ConfigError(
                f"{self._file}: the state encoder is a {kind}; only BertPredictor and "
                "SimpleEmbedder are supported."
            )
        return kind == "BertPredictor"

    def settings(self) -> dict[str, Any]:
        """The settings of `QRAGConfig` that the released evaluation amounts to.

        Raises:
            ModelFormatError: If a setting is missing or of the wrong type.
            ConfigError: If Q depends on something this package cannot do.
        """
        for paths, only in (
            (("algo.pqn.state_embed.n_output", "algo.model.predictor.output_dim"), 1),
            (("algo.pqn.action_embed.interpolate_factor",), 1),
            (("envs.env.separator",), " [SEP] "),
        ):
            value = self.get(*paths, default=only)
            if value != only:
                raise ConfigError(
                    f"{self._file}: {paths[0]} is {value!r}; only {only!r} is supported."
                )
        # The algorithm has a limit of its own, and the evaluation heeds that one (E5: 128).
        state_limit = self.integer(
            "algo.pqn.hyperparams.max_action_length_in_memory",
            "envs.env.max_action_length_in_memory",
            "max_action_length_in_memory",
        )
        by_index = self.get("envs.env.sort_by_index", "envs.sort_by_index", default=True)
        return {
            **self._positions(),
            "scale": 0.1 if self.is_bert else 1.0,
            "state_order": "document" if by_index else "retrieval",
            "max_query_tokens": state_limit,
            "max_chunk_tokens_in_state": state_limit,
            "max_chunk_tokens": self.integer("envs.env.action_embed_length", "max_action_length"),
            "max_steps": self.integer("envs.env.max_steps", "envs.max_steps"),
        }

    def get(self, *paths: str, default: Any = _REQUIRED) -> Any:
        """The setting at the first of these paths that exists.

        Raises:
            ModelFormatError: If none exists and there is no default.
        """
        for path in paths:
            if (value := self._look_up(path)) is not _ABSENT:
                return value
        if default is _REQUIRED:
            raise ModelFormatError(
                f"{self._file} has no setting {' or '.join(paths)}; it is not the complete "
                f"{CONFIG_FILE} of a training run."
            )
        return default

    def integer(self, *paths: str, default: int | object = _REQUIRED) -> int:
        """A setting that must be an integer of at least 1.

        Raises:
            ModelFormatError: If it is missing or something else.
        """
        value = self.get(*paths, default=default)
        if type(value) is not int or value < 1:
            raise ModelFormatError(
                f"{self._file}: {paths[0]} is {value!r}; it must be an integer of at least 1."
            )
        return value

    def record(self) -> dict[str, Any]:
        """All settings as JSON, less the sections that may hold the trainer's keys and folders."""
        kept = {key: self._values[key] for key in self._values if key not in ("feedback", "logger")}
        try:
            text = json.dumps(kept, default=str, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelFormatError(f"{self._file} cannot be kept as JSON: {error}.") from error
        plain: dict[str, Any] = json.loads(text.replace("⟦", "${").replace("⟧", "}"))
        return plain

    def _positions(self) -> dict[str, Any]:
        embedder = self._class("algo.pqn.action_embed")
        if embedder == "EmbedderNone":
            return {"positions": "none"}
        processor = self._class("envs.env.positions_processor")
        if processor == "AbsolutePositionProcessor":
            return {"positions": "absolute", "truncate_positions": True}
        if (embedder, processor) == ("EmbedderWithRelativeEncoding", "RelativePositionProcessor"):
            step = self.integer("envs.env.positions_processor.step_size", default=10)
            return {
                "positions": "relative",
                "position_step": float(step),
                "position_span": float(int(0.9 * step)),
                "position_endpoint": True,
                "truncate_positions": True,
            }
        raise ConfigError(
            f"{self._file}: the model was trained with {embedder} and {processor}; relative, "
            "absolute and no positions are supported. (Random positions differ at every call.)"
        )

    def _class(self, path: str) -> str:
        return str(self.get(f"{path}._target_")).rpartition(".")[2]

    def _look_up(self, path: str) -> Any:
        try:
            return self._follow(path)
        except RecursionError:
            raise ModelFormatError(f"{self._file}: {path} refers to itself.") from None

    def _follow(self, path: str) -> Any:
        node = self._values
        for key in path.split("."):
            if not isinstance(node, Mapping) or key not in node:
                return _ABSENT
            node = self._resolve(node[key])
        return node

    def _resolve(self, value: Any) -> Any:
        # innermost first: in ⟦a.⟦b⟧⟧ the pattern finds ⟦b⟧
        while isinstance(value, str) and (reference := _BRACKETED.search(value)):
            target = self._follow(reference[1])
            if target is _ABSENT or reference[0] == value:
                return target
            if isinstance(target, (Mapping, list)):
                raise ModelFormatError(
                    f"{self._file}: {reference[1]} stands in a text and is no single value."
                )
            value = value.replace(reference[0], str(target))
        return value


def _bracket(text: str) -> str:
    """Write every ``${a.b}`` as ``⟦a.b⟧``, nested ones from the inside out."""
    while (changed := _REFERENCE.sub(r"⟦\1⟧", text)) != text:
        text = changed
    return text
