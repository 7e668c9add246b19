"""What is looked at before a training starts, so that it does not fail hours later."""

from __future__ import annotations

import filecmp
import warnings
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from qrag_retriever.errors import ConfigError
from qrag_train.data.candidates import twins
from qrag_train.data.problems import Problems, unwritable
from qrag_train.data.sample import FixedSamples, finite

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from qrag_train.data.datamodule import SupportDataModule
    from qrag_train.data.sample import SupportSample

_SHOWN = 20  # lines of a warning
# Settings that may differ between a run and its resumption: they do not change what is learned.
_FREE = (
    "config",
    "ckpt_path",
    "output_dir",
    "resume",
    "preset",
    "weights_only",
    "checkpoint_minutes",
    "trainer.max_time",
)


def check_run(data: SupportDataModule, episode: int, budget: int) -> None:
    """Look at the data of a training.

    Args:
        data: Training and validation data.
        episode: Number of chunks that an episode of training retrieves.
        budget: Number T of chunks that validation retrieves.

    Raises:
        DatasetError: If there is no training or validation data, a file is not as described, ids
            repeat, chunks are empty, a text is none in UTF-8, or the weights of a mixture do not
            fit.
        ConfigError: If one of them is smaller than the largest support of its questions.
    """
    train, val = data.sources("train"), data.sources("val")
    steps = [min(episode, budget)] * len(train) + [budget] * len(val)
    for (config, source), most in zip(train + val, steps, strict=True):
        told = finite(source)
        from_file = not isinstance(told, FixedSamples)
        check_samples(config.file, told, most, unique=from_file)
        if from_file:  # in stories the same happens twice
            check_twins(config.file, told)
    for part in ("train", "val"):
        data.source(part)  # refuses weights that do not fit the sources
    for first, second in product(train, val):
        files = first[0].is_file and second[0].is_file
        if files and filecmp.cmp(first[0].file, second[0].file, shallow=False):
            warnings.warn(
                f"{second[0].file} is both training and validation data, so validation cannot "
                "tell what was learned from what was memorised; hold some questions back.",
                stacklevel=2,
            )


def check_samples(
    name: str, samples: Iterable[SupportSample], budget: int, *, unique: bool = True
) -> None:
    """Look at questions one by one.

    Args:
        name: How messages call them.
        samples: The questions.
        budget: Number T of chunks that an episode retrieves.
        unique: Whether ids may not repeat; stories that are told again have the same.

    Raises:
        DatasetError: If ids repeat, chunks are empty, or a text is none in UTF-8.
        ConfigError: If the budget is smaller than the largest support.
    """
    problems = Problems(name)
    seen: set[str] = set()
    chunks: tuple[str, ...] = ()
    largest, needs_most = 0, ""
    for number, sample in enumerate(samples, start=1):
        where = f"question {number} ({sample.id})"
        if unique and sample.id in seen:
            problems.add(where, "has the id of an earlier question; give each its own")
        seen.add(sample.id)
        _check_text(where, "the question", sample.question, problems)
        # questions on one corpus share its chunks
        if sample.chunks is not chunks:
            chunks = sample.chunks
            for place, chunk in enumerate(chunks):
                _check_text(where, f"chunk {place}", chunk, problems)
        if len(sample.support) > largest:
            largest, needs_most = len(sample.support), where
    problems.raise_if_any()
    if largest > budget:
        raise ConfigError(
            f"max_steps={budget} chunks are retrieved, but {needs_most} of {name} has {largest} "
            f"support chunks, which no episode could complete; give --model.max_steps {largest} "
            "or more, and --model.pqn.max_steps, if you give it, too."
        )


def _check_text(where: str, name: str, text: str, problems: Problems) -> None:
    if not text.strip():
        problems.add(where, f"{name} is empty; leave it out or give its text")
    elif (character := unwritable(text)) is not None:
        problems.add(where, f"{name} holds {character}, half of a character; give the whole one")


def check_twins(name: str, samples: Sequence[SupportSample]) -> None:
    """Warn of support chunks whose text other chunks of the question have too.

    Args:
        name: How the warning calls the samples.
        samples: The questions.
    """
    found = [
        f"  question {number} ({sample.id}): chunk {twin} has the text of support chunk {chunk}"
        for number, (sample, same) in enumerate(zip(samples, twins(samples), strict=True), start=1)
        for twin, chunk in same.items()
    ]
    if found:
        more = [f"  … and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        warnings.warn(
            f"{name} has chunks that are no support and have the text of one, so Fact-EM depends "
            "on which of them is retrieved; mark all of them as support, or leave all but one out "
            "(chunks are counted from 0):\n" + "\n".join([*found[:_SHOWN], *more]),
            stacklevel=3,
        )


def check_interval(val_check_interval: int | float | None, updates: int) -> None:
    """Look at how often a training is validated.

    Args:
        val_check_interval: Updates between two validations, or a fraction of the training.
        updates: Updates of the whole training.

    Raises:
        ConfigError: If not even one validation would take place.
    """
    if val_check_interval is not None and val_check_interval <= 0:
        raise ConfigError(
            f"--trainer.val_check_interval {val_check_interval} is not allowed; give a number of "
            "updates from 1, or a fraction of the training such as 0.1."
        )
    if isinstance(val_check_interval, int) and val_check_interval > updates:
        raise ConfigError(
            f"--trainer.val_check_interval {val_check_interval} is more than the {updates} updates "
            "of the training (--trainer.max_steps); give at most as many, or a fraction such as "
            "0.1."
        )


def check_trainer(options: Any) -> None:
    """Look at options of the Trainer that training cannot go with.

    Raises:
        ConfigError: If there is one.
    """
    if options.precision in ("16-true", "bf16-true"):
        mixed = options.precision.replace("true", "mixed")
        raise ConfigError(
            f"--trainer.precision {options.precision} would keep the weights in half precision, "
            f"where small updates are lost; give {mixed}."
        )
    if options.limit_val_batches == 0:
        raise ConfigError(
            "--trainer.limit_val_batches 0 leaves no validation to choose the best model by; "
            "leave it out, or give a smaller --data.val_samples."
        )


def check_same_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings.

    Args:
        before: Settings the run was started with.
        now: Settings given.

    Raises:
        ConfigError: If any differ; names them with both values.
    """
    old, new = _flat(before), _flat(now)
    lines = [
        f"  {name}: {old.get(name)!r} before, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if not {name, name.split(".")[0]} & {*_FREE} and old.get(name) != new.get(name)
    ]
    if lines:
        raise ConfigError(
            "The run was started with other settings; resume it with the same ones, or start anew "
            "with another --output_dir:\n" + "\n".join(lines)
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
