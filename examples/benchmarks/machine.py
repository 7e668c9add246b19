"""What figures depend on, how they are measured, and the file they are kept in; shared."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qrag_retriever.errors import QRAGError
from qrag_retriever.files import sha256_of
from qrag_train.journal import content_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qrag_retriever import QRAGModel

_PACKAGES = ("qrag-retriever", "torch", "transformers", "sentence-transformers", "numpy")


def parse_run(
    parser: argparse.ArgumentParser, repetitions: int | None = None
) -> argparse.Namespace:
    """Add the options that measurements share, read the command line and set the threads.

    Args:
        parser: With the script's own options.
        repetitions: Default of ``--repetitions``; ``None``: there is no such option.
    """
    if repetitions is not None:
        parser.add_argument("--repetitions", type=int, default=repetitions)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def take_turns(calls: dict[Any, Callable[[], object]], repetitions: int) -> dict[Any, float]:
    """Median seconds of each call; a round calls each once, the first round does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def machine() -> dict[str, str | int]:
    """The processor and the versions of what computes."""
    try:
        processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    except (OSError, IndexError):
        processor = platform.processor()
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def made_from(models: dict[str, str], files: Iterable[Path]) -> dict[str, Any]:
    """Digests of models (`model_digest`), by name, and SHA-256 of files, for a `report`."""
    return {"models": models, "files": {str(file): sha256_of(file) for file in files}}


def model_digest(model: QRAGModel) -> str:
    """Names what decides the order of a model's chunks: weights and settings."""
    config = model.config.replace(training={}, q_threshold=None, max_steps=1)
    return content_key(model.fingerprint, model.state_encoder.digest(), config)


def told(main: Callable[[], None]) -> None:
    """Run a script; what the package refuses is said in one line."""
    try:
        main()
    except QRAGError as error:
        raise SystemExit(f"error: {error}") from error


def report(file: Path, seed: int, **figures: Any) -> None:
    """Write figures beside the command, the day and the machine they come from."""
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": machine(),
        "seed": seed,
        **figures,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
