"""What a training run does beside learning: checkpoints, the best model, progress and curves."""

from __future__ import annotations

import copy
import json
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from transformers.utils import logging as transformers_logging

from qrag_retriever.errors import ModelFormatError
from qrag_train.build import merge_lora
from qrag_train.card import model_card
from qrag_train.run_folder import training_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from qrag_train.data.datamodule import SupportDataModule
    from qrag_train.validation import ValidatedTrainingModule

Criterion = Literal["return", "fact_em"]

_SHOWN = ("return", "fact_em", "loss", "alpha", "transitions_per_s", "val/fact_em")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place first: a file that is there is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint, or leave the one before as it is."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        super().save_checkpoint(checkpoint, part, storage_options)
        part.replace(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the checkpoint.

        Raises:
            ModelFormatError: If the file is damaged.
        """
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise ModelFormatError(
                f"The checkpoint {path} is damaged ({error}). Copy it again, or start anew with "
                "another --output_dir."
            ) from error


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint to resume from.

    It is written every so many minutes, after each validation, at the end, and when Ctrl-C is
    pressed: then the update under way is finished first. A second Ctrl-C stops at once.

    Args:
        file: The checkpoint.
        minutes: Time between two of them.
    """

    def __init__(self, file: Path, minutes: float = 10.0) -> None:
        self._file = file
        self._seconds = 60 * minutes
        self._saved_at = time.monotonic()
        self._interrupted = False
        self._handler: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Take over Ctrl-C."""
        del trainer, pl_module
        self._saved_at = time.monotonic()
        if _in_main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: object) -> None:
        """Save if it is time to, or if Ctrl-C was pressed; at a validation, after it."""
        del args
        if not _between_updates(trainer) or _validation_due(trainer):
            return
        decide = trainer.strategy.reduce_boolean_decision
        interrupted = decide(self._interrupted, all=False)
        if interrupted or decide(time.monotonic() - self._saved_at > self._seconds, all=False):
            self._save(trainer)
        if interrupted:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Save after a validation in training, and stop if Ctrl-C was pressed before it ended."""
        del pl_module
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and _between_updates(trainer):
            self._save(trainer)
            if trainer.strategy.reduce_boolean_decision(self._interrupted, all=False):
                raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Save and give Ctrl-C back."""
        del pl_module
        self._save(trainer)
        self._restore_handler()

    def on_exception(self, trainer: object, pl_module: object, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        del trainer, pl_module, exception
        self._restore_handler()

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self._file, weights_only=False)
        self._saved_at = time.monotonic()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("\nStopping after this update; press Ctrl-C again to stop at once.", file=sys.stderr)

    def _restore_handler(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


class HardNegatives(Callback):
    """Lets the data look for chunks that the model in training wrongly takes for support."""

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Ask the data before an update."""
        del batch
        module: ValidatedTrainingModule = pl_module  # type: ignore[assignment]
        if batch_idx % trainer.accumulate_grad_batches == 0:
            data: SupportDataModule = trainer.datamodule  # type: ignore[attr-defined]
            data.find_negatives(module.model, module.budget, trainer.global_step)


class BestModel(Callback):
    """Writes the model to a folder whenever it did better than ever on validation data.

    Better is a higher return, what training is after: the support found, and after few steps. Of
    a few hundred questions Fact-EM counts the rare failures alone, which is more a matter of luck;
    but where detours are learned it is Fact-EM that tells, since a low discount makes detours cost
    more return than failures do.

    Args:
        folder: Where the model is written.
        record: What the model's `training` field says of data and settings.
        by: Which of the two decides; the other one where it is equal.

    Attributes:
        score: Of the best model so far; ``None`` before the first validation.
        updates: After how many updates it was.
        judged_at: Update of the last validation.
    """

    def __init__(
        self, folder: Path, record: Mapping[str, Any] | None = None, by: Criterion = "return"
    ) -> None:
        self._folder = folder
        self._record = dict(record or {})
        self._names = sorted(get_args(Criterion), key=lambda name: name != by)
        self.score: tuple[float, ...] | None = None
        self.updates = 0
        self.judged_at = -1

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare with the best so far."""
        if trainer.sanity_checking:
            return
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        score = tuple(figures[f"val/{name}"] for name in self._names)
        self.judged_at = trainer.global_step
        if self.score is None or score >= self.score:  # of equal ones the one that learned more
            self.score, self.updates = score, trainer.global_step
            if trainer.is_global_zero:
                record = {**self._record, "updates": trainer.global_step, "figures": figures}
                if not _is_there(self._folder, record):
                    export(pl_module, self._folder, record)  # type: ignore[arg-type]

    @property
    def figures(self) -> dict[str, float]:
        """Return and Fact-EM of the best model; nothing before the first validation."""
        return dict(zip(self._names, self.score or (), strict=False))

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"score": self.score, "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.score, self.updates = state_dict["score"], state_dict.get("updates", 0)


def _is_there(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a folder holds the model of this record: one that was calibrated since stays so."""
    training, known = training_of(folder), json.loads(json.dumps(record))
    return all(training.get(name) == value for name, value in known.items())


def export(module: ValidatedTrainingModule, folder: Path, record: dict[str, Any]) -> None:
    """Write a model in training as a folder that retrievers load, with a model card.

    Args:
        module: What is trained; left as it is.
        folder: Where to; the model that is there is replaced whole.
        record: What the model's `training` field says.
    """
    model = merge_lora(copy.deepcopy(module.averaged)).float()
    record = {**record, "max_steps": module.budget}
    model.config = model.config.replace(training=record)
    with _no_bars(), model.saving(folder) as new:
        (new / "README.md").write_text(model_card(folder.name, model.config), encoding="utf-8")


class ProgressBar(TQDMProgressBar):
    """Updates, time left, return, Fact-EM, loss, α and transitions a second, on a terminal."""

    def init_train_tqdm(self) -> Tqdm:
        """The bar of the training."""
        bar = super().init_train_tqdm()
        bar.unit = "update"
        return bar

    def init_validation_tqdm(self) -> Tqdm:
        """No bar for a validation: it is short."""
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: object) -> None:
        """Name the bar: training has one epoch, which needs no number."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("Training")

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar."""
        del pl_module
        return dict(_shown(trainer))


class ProgressLines(Callback):
    """The same as lines of text, where no terminal is.

    Args:
        seconds: Time between two lines.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self._seconds = seconds
        self._start = self._last = time.monotonic()
        self._first_update = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: object) -> None:
        """Start the clock."""
        del pl_module
        self._start = self._last = time.monotonic()
        self._first_update = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: object) -> None:
        """Write a line if it is time to, or the last one."""
        del args
        now, update, total = time.monotonic(), trainer.global_step, trainer.max_steps
        done = update - self._first_update
        if (
            done
            and trainer.is_global_zero
            and (now - self._last > self._seconds or update >= total)
        ):
            self._last = now
            left = (now - self._start) / done * (total - update)
            figures = " ".join(f"{name}={value}" for name, value in _shown(trainer).items())
            print(f"update {update}/{total}, {left / 60:.1f} min left: {figures}", flush=True)


def _shown(trainer: lightning.Trainer) -> dict[str, str]:
    known = trainer.callback_metrics
    return {name: f"{float(known[name]):.3g}" for name in _SHOWN if name in known}


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the bars of the writing library out of the bar of the training."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _between_updates(trainer: lightning.Trainer) -> bool:
    """Whether no gradient waits for its optimiser step, which a checkpoint would lose."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches % trainer.accumulate_grad_batches == 0


def _validation_due(trainer: lightning.Trainer) -> bool:
    """Whether a validation follows the batch that has just ended."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    every = trainer.val_check_batch
    if every is None or every == float("inf") or not trainer.enable_validation:
        return False
    return batches % every == 0


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
