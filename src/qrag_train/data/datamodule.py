"""The data of a training run: training, validation and test questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning
import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.mixture import Mixture
from qrag_train.data.sample import FixedSamples, SampleSource, SupportSample
from qrag_train.data.source import SourceConfig, looked_at
from qrag_train.loader import RolloutLoader, SampleLoader

# One validation set for runs with different seeds.
_VALIDATION_SEED = 1


class SupportDataModule(lightning.LightningDataModule):
    """Training, validation and test questions with their support chunks.

    Args:
        train_file: JSONL file of training questions, each with its own chunks. For other formats
            and mixtures use ``train``.
        val_file: The same for validation, which chooses the best model.
        test_file: The same for ``qrag-train test``.
        train: Sources of training questions.
        val: Sources of validation questions.
        test: Sources of test questions.
        val_samples: Most questions of a validation or a test; always the same ones.
        seed: Seed of the training episodes.

    Raises:
        DatasetError: If neither a file nor sources are given for training or validation.
    """

    def __init__(
        self,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        train: list[SourceConfig] | None = None,
        val: list[SourceConfig] | None = None,
        test: list[SourceConfig] | None = None,
        val_samples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._configs = {
            "train": _sources("train", train_file, train),
            "val": _sources("val", val_file, val),
            "test": _sources("test", test_file, test),
        }
        if val_samples < 1:
            raise DatasetError(f"val_samples={val_samples} is not allowed; give at least 1.")
        self._val_samples = val_samples
        self.seed = seed
        self._opened: dict[str, list[tuple[SourceConfig, SampleSource]]] = {}

    def sources(self, part: str) -> list[tuple[SourceConfig, SampleSource]]:
        """The sources of ``"train"``, ``"val"`` or ``"test"``, read when first asked for.

        Raises:
            DatasetError: If there are none, or a file is not as described.
        """
        if part not in self._opened:
            configs = self._configs[part]
            if not configs:
                raise DatasetError(
                    f"There is no {part} data; give --data.{part}_file a JSONL file, or "
                    f"--data.{part} a list of sources."
                )
            self._opened[part] = [(config, config.open()) for config in configs]
        return self._opened[part]

    def source(self, part: str) -> SampleSource:
        """Where questions of a part are drawn from. Errors as `sources`."""
        sources = [source for _, source in self.sources(part)]
        if len(sources) == 1:
            return sources[0]
        weights = [config.weight for config, _ in self.sources(part) if config.weight is not None]
        if weights and len(weights) < len(sources):
            raise DatasetError(f"Some {part} sources have a weight; give one to all or to none.")
        return Mixture(sources, weights or None)

    def samples(self, part: str) -> Sequence[SupportSample]:
        """The questions of a validation or a test: always the same, at most ``val_samples``."""
        source, count = self.source(part), self._val_samples
        if not isinstance(source, Sequence):
            return FixedSamples(source, count, _VALIDATION_SEED)
        if len(source) <= count:
            return source
        chosen = np.random.default_rng(_VALIDATION_SEED).permutation(len(source))[:count]
        return [source[i] for i in sorted(chosen.tolist())]

    def texts(self) -> Iterator[str]:
        """Texts of training questions, for a vocabulary."""
        for _, source in self.sources("train"):
            for sample in looked_at(source):
                yield sample.question
                yield from sample.chunks

    def train_dataloader(self) -> RolloutLoader:
        """As many batches as the trainer makes updates, each with this process's episodes."""
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise DatasetError("Training has no end; give --trainer.max_steps a number of updates.")
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        return RolloutLoader(
            self.source("train"), batches, seed=self.seed, rank=trainer.global_rank
        )

    def val_dataloader(self) -> SampleLoader:
        """Batches of validation questions, this process's share."""
        return self._loader("val")

    def test_dataloader(self) -> SampleLoader:
        """Batches of test questions, this process's share."""
        return self._loader("test")

    def _loader(self, part: str) -> SampleLoader:
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        samples = self.samples(part)
        return SampleLoader([samples[i] for i in range(rank, len(samples), world)])


def _sources(part: str, file: str | None, sources: list[SourceConfig] | None) -> list[SourceConfig]:
    if file is not None and sources:
        raise DatasetError(f"Give {part}_file or {part}, not both.")
    if file is not None:
        return [SourceConfig(file)]
    return list(sources or [])
