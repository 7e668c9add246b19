"""The data of a training run: training, validation and test questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn

from qrag_retriever.errors import DatasetError
from qrag_train.data.candidates import CandidateSets
from qrag_train.data.mixture import Mixture
from qrag_train.data.sample import FixedSamples, SampleSource, SupportSample, finite
from qrag_train.data.source import SourceConfig
from qrag_train.evaluation import hard_negatives
from qrag_train.loader import RolloutLoader, SampleLoader

if TYPE_CHECKING:
    from qrag_retriever.model import QRAGModel

# One validation set for runs with different seeds.
_SEEDS = {"val": 1, "test": 2}  # the best model was chosen on the former


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
        corpus: JSONL file with the chunks that the questions of all three files share; left out,
            each question brings its own.
        candidates: With a corpus: number of chunks an episode retrieves from. Validation and test
            search the whole corpus.
        hard_negatives: With a corpus: how many of them may be chunks that the model in training
            takes for support; the others are the support and random ones.
        refresh_negatives: With a corpus: updates between two searches for hard negatives.
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
        corpus: str | None = None,
        candidates: int = 64,
        hard_negatives: int = 32,
        refresh_negatives: int = 100,
        val_samples: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._configs = {
            "train": _sources("train", train_file, train, corpus),
            "val": _sources("val", val_file, val, corpus),
            "test": _sources("test", test_file, test, corpus),
        }
        if refresh_negatives < 1:
            raise DatasetError(
                f"refresh_negatives={refresh_negatives} is not allowed; give at least 1."
            )
        self._candidates, self._hard = candidates, hard_negatives
        self._refresh = refresh_negatives
        self._candidate_sets: dict[int, CandidateSets] = {}
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
        if part == "train":
            sets = self.candidate_sets()
            sources = [sets.get(number, source) for number, source in enumerate(sources)]
        if len(sources) == 1:
            return sources[0]
        weights = [config.weight for config, _ in self.sources(part) if config.weight is not None]
        if weights and len(weights) < len(sources):
            raise DatasetError(f"Some {part} sources have a weight; give one to all or to none.")
        return Mixture(sources, weights or None)

    def candidate_sets(self) -> dict[int, CandidateSets]:
        """The training sources on a corpus, by their number, with candidates for each question.

        Raises:
            DatasetError: If the numbers of candidates are out of range.
        """
        for number, (config, questions) in enumerate(self.sources("train")):
            if config.format == "corpus" and number not in self._candidate_sets:
                assert isinstance(questions, Sequence)
                self._candidate_sets[number] = CandidateSets(
                    questions, self._candidates, self._hard
                )
        return self._candidate_sets

    def find_negatives(self, model: QRAGModel, steps: int, update: int) -> None:
        """Search for hard negatives anew where it is time to.

        Args:
            model: The model in training.
            steps: Its retrieval budget T.
            update: Number of updates made.
        """
        if self._hard and update % self._refresh == 0:
            for sets in self.candidate_sets().values():
                sets.hard_negatives = hard_negatives(model, sets.questions, steps, self._hard)

    def state_dict(self) -> dict[str, Any]:
        """The hard negatives, which resuming needs."""
        return {str(number): s.hard_negatives for number, s in self.candidate_sets().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; to judge one takes no training questions."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for number, sets in self.candidate_sets().items():
            sets.hard_negatives = state_dict[str(number)]

    def samples(self, part: str) -> Sequence[SupportSample]:
        """The questions of a validation or a test: always the same, at most ``val_samples``.

        No question of a file is among them twice; a part with an endless source is drawn from all
        its sources by their weights.
        """
        source, count = self.source(part), self._val_samples
        files: list[Sequence[SupportSample]] = [
            file for _, file in self.sources(part) if isinstance(file, Sequence)
        ]
        if len(files) < len(self.sources(part)):
            return FixedSamples(source, count, _SEEDS[part])
        random = np.random.default_rng(_SEEDS[part])
        weights = [config.weight or 0.0 for config, _ in self.sources(part)]
        if len(files) > 1 and sum(weights) > 0 and sum(map(len, files)) > count:
            shares = [math.ceil(count * weight / sum(weights)) for weight in weights]
            files = [_drawn(file, share, random) for file, share in zip(files, shares, strict=True)]
        return _drawn([sample for file in files for sample in file], count, random)

    def texts(self) -> Iterator[str]:
        """Texts of training questions, for a vocabulary."""
        for _, source in self.sources("train"):
            for sample in finite(source):
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
        if len(samples) < world:
            raise DatasetError(
                f"{len(samples)} {part} questions cannot be shared by {world} processes; give at "
                "least one to each, or fewer --trainer.devices."
            )
        return SampleLoader([samples[i] for i in range(rank, len(samples), world)])


def _drawn(
    samples: Sequence[SupportSample], count: int, random: np.random.Generator
) -> Sequence[SupportSample]:
    """At most so many of them, in their order."""
    if len(samples) <= count:
        return samples
    return [samples[i] for i in sorted(random.permutation(len(samples))[:count].tolist())]


def _sources(
    part: str, file: str | None, sources: list[SourceConfig] | None, corpus: str | None
) -> list[SourceConfig]:
    if file is not None and sources:
        raise DatasetError(f"Give {part}_file or {part}, not both.")
    if corpus is not None and sources:
        raise DatasetError(
            f"data.corpus belongs to {part}_file; give each source of {part} its own corpus."
        )
    if file is not None:
        return [SourceConfig(file, "corpus" if corpus else "jsonl", corpus)]
    return list(sources or [])
