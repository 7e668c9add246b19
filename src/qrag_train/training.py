"""``qrag-train fit``, ``validate`` and ``test``: a LightningCLI with a folder for each run."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from qrag_retriever.errors import ConfigError, QRAGError
from qrag_train.arguments import Preset, expanded, judge_model, run_name
from qrag_train.build import build_module
from qrag_train.callbacks import (
    AtomicCheckpointIO,
    BestModel,
    Criterion,
    HardNegatives,
    LastCheckpoint,
    ProgressBar,
    ProgressLines,
)
from qrag_train.checks import check_interval, check_run, check_same_config, check_trainer
from qrag_train.cli import TRAINING_COMMANDS
from qrag_train.curves import plot_curves
from qrag_train.data.datamodule import SupportDataModule
from qrag_train.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning.pytorch.loggers import Logger

    from qrag_train.validation import ValidatedTrainingModule

_INTERRUPTED = 130
_MOST_SEED = 2**32 - 1
# Smaller updates than the paper's, for a small embedder on a CPU.
_MODEL_DEFAULTS = {
    "pqn.environments": 8,
    "pqn.random_transitions": 0,
    "pqn.alpha": 0.03,
    "pqn.tau": 0.05,
    "pqn.reward.fact_share": 0.5,
    "optimizer.warmup_updates": 20,
}
_TRAINER_DEFAULTS = {
    "max_steps": 300,
    "val_check_interval": 0.1,
    "gradient_clip_val": 2.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 5,
    "enable_model_summary": False,
}
_TRAINER_OPTIONS = (
    *("max_steps", "max_time", "val_check_interval", "log_every_n_steps", "gradient_clip_val"),
    *("accelerator", "devices", "strategy", "precision", "accumulate_grad_batches"),
)
# What the training framework says about things that are meant to be as they are.
_WARNINGS = (
    "LightningCLI's args parameter",
    "Found .* in eval mode",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "You have overridden `transfer_batch_to_device`",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "\\s*``.*was deprecated in v4",
    "\\s*skip_none parameter was deprecated",
    "\\s*By default only one JsonargparseDeprecationWarning",
)


class TrainingCLI(LightningCLI):
    """The commands that run a Trainer.

    The folder of a run holds ``config.yaml``, ``logs``, ``checkpoints/last.ckpt``, the best model
    in ``model`` and ``curves.png``.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are no options."""
        commands = LightningCLI.subcommands()
        return {name: commands[name] | {"weights_only"} for name in TRAINING_COMMANDS}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add model and data, then what of the Trainer people set; the rest works unseen."""
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"model.{k}": v for k, v in _MODEL_DEFAULTS.items()})
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items()})
        groups = parser.groups or {}
        groups["trainer"].title = "Training loop (all arguments of lightning.Trainer work)"
        for action in groups["trainer"]._group_actions:  # noqa: SLF001 argparse has no other way
            if action.dest.removeprefix("trainer.") not in _TRAINER_OPTIONS:
                action.help = argparse.SUPPRESS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        parser.add_argument(
            "--preset",
            type=Preset | None,
            help="Start from the settings of one of the paper's experiments; all other options, "
            "and --config, count more.",
        )
        parser.add_argument(
            "--output_dir",
            type=str | None,
            help="Folder of the run; left out: runs/ and the name of the config or data file.",
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on from the last checkpoint of the run in --output_dir.",
        )
        parser.add_argument(
            "--best_by",
            type=Criterion,
            default="return",
            help="What the best model has the highest of on the validation data.",
        )
        parser.add_argument(
            "--checkpoint_minutes",
            type=float,
            default=10.0,
            help="Time between two checkpoints.",
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments(
            "data", "model.texts", compute_fn=lambda data: data.texts, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the command line, and refuse a seed that cannot be one."""
        named = (re.match(r"--model\.(\w+)", argument) for argument in args)
        self._named = {match[1] for match in named if match}  # settings of the model
        for action in self._parser("fit")._actions:  # noqa: SLF001 argparse has no other way
            if action.dest == "ckpt_path":  # `_enter` refuses it
                action.help = argparse.SUPPRESS
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= seed <= _MOST_SEED:
            raise ConfigError(
                f"seed_everything={seed} is not allowed; give an integer from 0 to {_MOST_SEED}."
            )

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder(Path(self._get(self.config, "output_dir")))

    def before_instantiate_classes(self) -> None:
        """Settle on the run's folder, and refuse what does not fit what is there."""
        config = self.config[self.subcommand]
        if config.preset is not None:
            raise ConfigError("A preset is named on the command line (--preset), not in a file.")
        given = config.output_dir is not None
        config.output_dir = config.output_dir or str(Path("runs") / run_name(config))
        if self.subcommand == "fit":
            self._enter(config)
        elif given and config.ckpt_path is None:
            self._take_model(config.model)

    def _enter(self, config: Any) -> None:
        """Check that the folder is new, or holds the run that is to be resumed."""
        if config.ckpt_path is not None:
            raise ConfigError(
                "fit takes no --ckpt_path: a run goes on by --resume, and a new one starts from "
                "the model of another by --model.encoder FOLDER/model."
            )
        if config.resume:
            self.folder.require_run()
            check_same_config(self.folder.settings(), yaml.safe_load(self._dump()))
            config.ckpt_path = str(self.folder.checkpoint)
        else:
            rank_zero_only(self.folder.require_unused)()

    def _take_model(self, settings: Any) -> None:
        """Judge the best model of the run, and not, unnoticed, what a run would start from."""
        started = self.folder.settings_file.is_file()
        if started or (settings.encoder is None and settings.scratch is None):
            self.folder.require_model()
        if self.folder.model.is_dir():
            now = yaml.safe_load(self._dump())["model"]
            before = self.folder.settings()["model"] if started else now
            in_files = {name for name in now if now[name] != before.get(name)}
            judge_model(settings, self.folder.model, self._named | in_files)

    def _dump(self) -> str:
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        return str(parser.dump(config, skip_none=False))

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The Trainer with this package's callbacks and logs.

        Raises:
            ConfigError: If the Trainer's options do not go together, or not with this machine.
        """
        given = self._get(self.config_init, "trainer")
        check_trainer(given)
        callbacks = list(given.callbacks or [])
        if given.enable_progress_bar is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
            callbacks.append(ProgressLines())
        elif given.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        if self.subcommand == "fit":
            minutes = self._get(self.config, "checkpoint_minutes")
            by = self._get(self.config, "best_by")
            self.best = BestModel(self.folder.model, self._record(), by)
            callbacks += [
                HardNegatives(),
                self.best,
                LastCheckpoint(self.folder.checkpoint, minutes),
            ]
        kwargs |= {
            "callbacks": callbacks,
            "plugins": [*_as_list(given.plugins), AtomicCheckpointIO()],
            "default_root_dir": self.folder.path,
        }
        if isinstance(given.val_check_interval, int):  # in updates; Lightning counts batches
            kwargs["val_check_interval"] = given.val_check_interval * given.accumulate_grad_batches
        if given.logger in (None, True):
            kwargs["logger"] = self._loggers() if self.subcommand == "fit" else False
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigError(
                "The Trainer refuses its options; give others (--trainer.accelerator auto and "
                f"--trainer.devices auto take what there is): {error}"
            ) from error

    def _loggers(self) -> list[Logger]:
        """Both in one folder; a resumed run gets the next one."""
        logs = self.folder.logs
        table = CSVLogger(logs.parent, name=logs.name)
        return [table, TensorBoardLogger(logs.parent, name=logs.name, version=table.version)]

    def _record(self) -> dict[str, Any]:
        """What the model says of its training."""
        settings = yaml.safe_load(self._dump())
        names = ("seed_everything", "model", "trainer")
        return {"data": settings["data"], "settings": {name: settings[name] for name in names}}

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer; what their settings refuse is said in its own words."""
        try:
            super().instantiate_classes()
        except QRAGError:
            raise
        except ValueError as error:
            # of a value that may be of several types the parser tells what each of them says
            said = re.findall(r"(?m)^\s*- (?!Expected a )(.*)$", str(error))
            if not said:
                raise
            raise ConfigError(said[0]) from error

    def before_fit(self) -> None:
        """Check the data, and judge the model as it is at the start."""
        check_run(self.datamodule, self.model.episode_steps, self.model.budget)
        given = self._get(self.config_init, "trainer")
        check_interval(given.val_check_interval, given.max_steps)
        if not self._get(self.config, "resume"):
            if self.trainer.is_global_zero:
                self.folder.path.mkdir(parents=True, exist_ok=True)
                self.folder.settings_file.write_text(self._dump(), encoding="utf-8")
            self._validate()

    def fit(self, **kwargs: Any) -> None:
        """Train; when Ctrl-C ends it, say how to go on."""
        with self._interruptible():
            self.trainer.fit(**kwargs)

    def _validate(self) -> None:
        with self._interruptible():
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let Ctrl-C end with a word on how to go on."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            yield
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)  # Lightning has begun to ignore it
            if self.folder.checkpoint.is_file():
                self._draw_curves()
                print(
                    f"Stopped after update {self.trainer.global_step}; go on with:\n"
                    f"  qrag-train fit --output_dir {shlex.quote(str(self.folder.path))} --resume"
                )
            else:
                print("Stopped before the first update; the same command starts again.")
            raise SystemExit(_INTERRUPTED) from None

    def _draw_curves(self) -> None:
        if self.trainer.is_global_zero:
            plot_curves(self.folder.logs, self.folder.curves)

    def after_fit(self) -> None:
        """Judge the last weights, draw the curves and say where all is."""
        if self.best.judged_at != self.trainer.global_step:
            self._validate()
        if self.trainer.is_global_zero and (best := self.best.figures):
            self._draw_curves()
            print(
                f"The best model, after update {self.best.updates} of {self.trainer.global_step}, "
                f"is in {self.folder.model}: validation return {best['return']:.3f}, Fact-EM "
                f"{best['fact_em']:.3f}.\n"
                f"Curves, logs and the last checkpoint are in {self.folder.path}."
            )
            limit = self._get(self.config, "trainer.max_time")
            if limit is not None and self.trainer.global_step < self.trainer.max_steps:
                print(
                    "The time given is used up (--trainer.max_time); the run goes on with "
                    "--resume and more of it."
                )
            if self.best.updates == 0:
                print(
                    "It is the model that the training started from: no validation was better. "
                    "Train longer, or validate on more or harder questions."
                )


def run(
    arguments: Sequence[str], build: Callable[..., ValidatedTrainingModule] = build_module
) -> TrainingCLI:
    """Run one of the commands.

    Args:
        arguments: Command and options.
        build: Makes the module, with the arguments of `build_module`; for modules of your own.

    Returns:
        What has run, with its `model`, `datamodule` and `trainer`.
    """
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return TrainingCLI(
        build,
        SupportDataModule,
        save_config_callback=None,
        seed_everything_default=0,
        trainer_defaults=_TRAINER_DEFAULTS,
        auto_configure_optimizers=False,
        parser_kwargs={
            name: {"description": text, "usage": f"qrag-train {name} [options]"}
            for name, text in TRAINING_COMMANDS.items()
        },
        args=expanded(arguments),
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
