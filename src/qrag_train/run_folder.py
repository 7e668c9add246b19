"""The folder of a run: what lies where in it, and whether it may be entered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from qrag_retriever.config import CONFIG_FILE, QRAGConfig
from qrag_retriever.errors import ConfigError, QRAGError
from qrag_retriever.model_names import is_qrag_model

# Some of what the settings that `fit` writes always have, and others seldom.
_OF_A_RUN = {"data", "model", "trainer", "output_dir", "checkpoint_minutes"}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder; it need not exist.
    """

    path: Path

    @property
    def settings_file(self) -> Path:
        """The settings that the run was started with."""
        return self.path / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def model(self) -> Path:
        """The best model, a folder."""
        return self.path / "model"

    @property
    def logs(self) -> Path:
        """Losses and figures of each part of the run, a folder each."""
        return self.path / "logs"

    @property
    def curves(self) -> Path:
        """The picture of the logs."""
        return self.path / "curves.png"

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        values: dict[str, Any] = yaml.safe_load(self.settings_file.read_text(encoding="utf-8"))
        return values

    def require_run(self) -> None:
        """Refuse a folder without a run to go on with.

        Raises:
            ConfigError: If it is one.
        """
        if not self.checkpoint.is_file() or not self.settings_file.is_file():
            raise ConfigError(
                f"{self.path} holds no run to resume; leave --resume out, or name the run's folder "
                "with --output_dir."
            )

    def require_model(self) -> None:
        """Refuse a folder without a model to judge.

        Raises:
            ConfigError: If it is one.
        """
        if not self.model.is_dir():
            raise ConfigError(
                f"{self.path} holds no model of a run; name a run that has one (--output_dir), or "
                "a checkpoint (--ckpt_path), or leave --output_dir out and name a model "
                "(--model.encoder)."
            )

    def require_unused(self) -> None:
        """Refuse a folder with a run, or with what is none's and would be lost.

        Raises:
            ConfigError: If it is one.
        """
        for path in (self.path, *self.path.parents):
            if path.is_file():
                raise ConfigError(f"{path} is a file; name a folder for the run (--output_dir).")
        if self.checkpoint.is_file():
            raise ConfigError(
                f"{self.path} holds a run already; go on with it (--resume), or name another folder"
                " (--output_dir)."
            )
        if self._has_trained_model():
            raise ConfigError(
                f"{self.model} holds a trained model whose checkpoint is gone; move it away, or "
                "name another folder (--output_dir)."
            )
        for path, own in ((self.model, self._has_own_model), (self.settings_file, self._is_own)):
            if path.exists() and not own():
                raise ConfigError(
                    f"{path} is not of a run and is left as it is; name another folder "
                    "(--output_dir)."
                )

    def _has_own_model(self) -> bool:
        return self.model.is_dir() and (is_qrag_model(self.model) or not any(self.model.iterdir()))

    def _has_trained_model(self) -> bool:
        training = training_of(self.model)
        return bool(training.get("updates") or training.get("calibration"))

    def _is_own(self) -> bool:
        try:
            return self.settings().keys() >= _OF_A_RUN
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            return False


def training_of(model: Path) -> dict[str, Any]:
    """What the model in a folder says of its training; nothing if it cannot be read."""
    try:
        return QRAGConfig.from_json((model / CONFIG_FILE).read_text(encoding="utf-8")).training
    except (OSError, QRAGError):
        return {}


def model_of(name: str | Path) -> str:
    """The model in the folder of a run; any other name as it is."""
    folder = Path(name).expanduser()
    model = RunFolder(folder).model
    is_run = not (folder / CONFIG_FILE).is_file() and (model / CONFIG_FILE).is_file()
    return str(model) if is_run else str(name)
