"""What a command line of ``qrag-train fit``, ``validate`` or ``test`` stands for."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qrag_train.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Preset = Literal["babilong", "hotpotqa", "musique", "hotpotqa_musique"]

_PRESETS = Path(str(resources.files("qrag_train"))) / "presets"


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with the files that stand behind ``--preset`` and ``--output_dir``.

    A preset goes in front, so that everything else overrides it. A run that is resumed or judged
    has its own settings unless others are given. Which run that is goes last: a file may name the
    folder of another one.
    """
    command, *others = arguments
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--preset")
    options.add_argument("--output_dir")
    options.add_argument("--resume", action="store_true")
    options.add_argument("-c", "--config", action="append", default=[])
    known, _ = options.parse_known_args(others)
    files = []
    if known.preset in get_args(Preset):
        files.append(_PRESETS / f"{known.preset}.yaml")
        place = next(i for i, other in enumerate(others) if other.startswith("--preset"))
        del others[place : place + (1 if "=" in others[place] else 2)]
    run = []
    if known.output_dir is not None:
        run.append(f"--output_dir={known.output_dir}")
        own = RunFolder(Path(known.output_dir)).settings_file
        if own.is_file() and not known.config and (known.resume or command != "fit"):
            files.append(own)
    if known.resume:
        run.append("--resume")
    return [command, *(f"--config={file}" for file in files), *others, *run]


def run_name(config: Any) -> str:
    """A name for a run: of its own config file, of its training data."""
    configs = [Path(str(path)) for path in config.config or []]
    files = [str(path) for path in configs if path.parent != _PRESETS]
    files += [config.data.train_file] if config.data.train_file else []
    files += [source.file for source in config.data.train or []]
    return Path(files[0]).stem if files else "run"


def judge_model(settings: Any, folder: Path, given: Collection[str]) -> None:
    """Let a command judge a run's best model instead of what the run started from.

    Settings given anew stay: they are for that model, or name another one to judge.
    """
    other = "encoder" in given
    if not other:
        settings.encoder = str(folder)
    for name in ("scratch", "positions", "max_steps", "settings"):
        if name not in given:
            settings[name] = None
    if not other:
        settings.adapt.first_layers, settings.adapt.lora_rank = None, 0
