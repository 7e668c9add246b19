"""Trainings of a benchmark, each in a folder of its own: what is there is not trained again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from qrag_retriever.errors import ConfigError
from qrag_train.build import build_module
from qrag_train.curves import read_curves
from qrag_train.run_folder import RunFolder
from qrag_train.training import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from qrag_train.validation import ValidatedTrainingModule


class _SameSettings(Exception):  # noqa: N818 says that all is well
    """The settings are those that the folder's run was started with."""


def train(
    folder: Path,
    updates: int,
    settings: Mapping[str, Any],
    build: Callable[..., ValidatedTrainingModule] = build_module,
) -> None:
    """Train, or go on with a training that was interrupted, unless it is finished.

    Args:
        folder: Folder of the run.
        updates: Number of updates.
        settings: Further options of qrag-train fit.
        build: Makes the module.

    Raises:
        SystemExit: If the folder holds a run of other settings.
    """
    given = {"output_dir": folder, "trainer.max_steps": updates, **settings}
    arguments = ["fit", *(f"--{name}={value}" for name, value in given.items())]
    if RunFolder(folder).checkpoint.is_file():
        arguments.append("--resume")
        _refuse_others(folder, arguments)
        if _is_finished(RunFolder(folder), updates):
            return
    run(arguments, build)


def _refuse_others(folder: Path, arguments: list[str]) -> None:
    """Compare the settings without making a model: this ends before there is any."""
    try:
        run(arguments, _no_module)
    except _SameSettings:
        return
    except ConfigError as error:
        raise SystemExit(
            f"{folder} holds another training; give another --folder, or remove that one.\n{error}"
        ) from error


@functools.wraps(build_module)
def _no_module(**_: Any) -> ValidatedTrainingModule:
    raise _SameSettings


# the command line wants another name for each
_no_module.__qualname__ = "_no_module"


def _is_finished(folder: RunFolder, updates: int) -> bool:
    """Whether all updates were made, and the model that they led to was judged."""
    saved = torch.load(folder.checkpoint, map_location="cpu", mmap=True, weights_only=True)
    judged = read_curves(folder.logs).get("val/fact_em", [(-1, 0.0)])
    # updates are counted from 0 there
    return bool(saved["global_step"] == updates and judged[-1][0] >= updates - 1)
