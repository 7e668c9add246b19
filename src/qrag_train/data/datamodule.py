"""Files and generators as the data of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning

from qrag_retriever.errors import DatasetError
from qrag_train.data.babi import read_babi
from qrag_train.data.babilong import BabiLong
from qrag_train.data.books import BackgroundText
from qrag_train.data.hotpotqa import read_hotpotqa
from qrag_train.data.jsonl import read_corpus_jsonl, read_documents_jsonl
from qrag_train.data.mixture import Mixture
from qrag_train.data.musique import read_musique
from qrag_train.data.sample import FixedSamples, SampleSource, SupportSample
from qrag_train.data.twowiki import read_twowiki
from qrag_train.loader import RolloutLoader

if TYPE_CHECKING:
    from collections.abc import Iterator

Format = Literal["jsonl", "corpus", "babilong", "hotpotqa", "musique", "2wiki"]

_READERS = {
    "jsonl": read_documents_jsonl,
    "hotpotqa": read_hotpotqa,
    "musique": read_musique,
    "2wiki": read_twowiki,
}
# Samples of an endless source that are looked at before training.
_LOOKED_AT = 200
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of questions.

    Attributes:
        file: The file with the questions.
        format: Its kind: ``jsonl`` (a document per question), ``corpus`` (questions on the chunks
            of ``corpus``), ``babilong`` (a bAbI file, hidden in ``background``), or the official
            files of ``hotpotqa``, ``musique`` or ``2wiki``.
        corpus: For ``corpus``: the JSONL file with the chunks.
        background: For ``babilong``: a folder of books as plain text.
        background_sentences: For ``babilong``: take that many sentences of the books, evenly
            spread, so that they recur and `refresh_every` saves time; ``None``: all.
        sentences: For ``babilong``: least and greatest number of chunks of a document.
        weight: Share of the source in a mixture; ``None``: by its number of questions.

    Raises:
        DatasetError: If a setting that the format needs is missing.
    """

    file: str
    format: Format = "jsonl"
    corpus: str | None = None
    background: str | None = None
    background_sentences: int | None = None
    sentences: tuple[int, int] = (60, 90)
    weight: float | None = None

    def __post_init__(self) -> None:
        for format_, name in (("corpus", "corpus"), ("babilong", "background")):
            if self.format == format_ and getattr(self, name) is None:
                raise DatasetError(
                    f"format={format_!r} needs {name!r}; give it beside {self.file}."
                )

    def open(self) -> SampleSource:
        """Read the files.

        Raises:
            DatasetError: If a file is missing or not as described; says where.
        """
        if self.format == "corpus":
            return read_corpus_jsonl(str(self.corpus), self.file)
        if self.format == "babilong":
            background = BackgroundText.from_folder(str(self.background))
            if self.background_sentences is not None:
                background = thinned(background, self.background_sentences)
            return BabiLong(read_babi(self.file), background, self.sentences)
        return _READERS[self.format](self.file)


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
        val_samples: Most questions of a validation or a test.
        seed: Seed of the training episodes and of the questions chosen for validation.

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
        self._opened: dict[str, SampleSource] = {}

    def source(self, part: str) -> SampleSource:
        """The questions of ``"train"``, ``"val"`` or ``"test"``, read when first asked for.

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
            sources = [config.open() for config in configs]
            if len(sources) == 1:
                self._opened[part] = sources[0]
            else:
                weights = [config.weight for config in configs]
                known = None if None in weights else [float(w or 0) for w in weights]
                self._opened[part] = Mixture(sources, known)
        return self._opened[part]

    def samples(self, part: str) -> Sequence[SupportSample]:
        """The questions of a validation or a test: always the same, at most ``val_samples``."""
        source = self.source(part)
        if isinstance(source, Sequence) and len(source) <= self._val_samples:
            return source
        return FixedSamples(source, self._val_samples, self.seed + 1)

    def looked_at(self, part: str) -> Iterator[SupportSample]:
        """All questions of a finite source, a few hundred of an endless one, to be checked."""
        source = self.source(part)
        yield from source if isinstance(source, Sequence) else FixedSamples(source, _LOOKED_AT, 0)

    def texts(self) -> Iterator[str]:
        """Texts of training questions, for a vocabulary."""
        for sample in self.looked_at("train"):
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

    def val_dataloader(self) -> list[list[SupportSample]]:
        """Batches of validation questions, this process's share."""
        return self._batches("val")

    def test_dataloader(self) -> list[list[SupportSample]]:
        """Batches of test questions, this process's share."""
        return self._batches("test")

    def _batches(self, part: str) -> list[list[SupportSample]]:
        samples = self.samples(part)
        rank, world = 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
        own = [samples[i] for i in range(rank, len(samples), world)]
        return [own[first : first + _BATCH] for first in range(0, len(own), _BATCH)]


def thinned(background: BackgroundText, count: int) -> BackgroundText:
    """``count`` sentences of a background in runs of 20 that are spread evenly over it.

    Example:
        >>> len(thinned(BackgroundText([str(i) for i in range(1000)]), 100).sentences)
        100
    """
    sentences, run = background.sentences, 20
    if count >= len(sentences):
        return background
    runs = -(-count // run)
    starts = [(len(sentences) - run) * i // max(runs - 1, 1) for i in range(runs)]
    kept = [sentence for start in starts for sentence in sentences[start : start + run]]
    return BackgroundText(kept[:count])


def _sources(part: str, file: str | None, sources: list[SourceConfig] | None) -> list[SourceConfig]:
    if file is not None and sources:
        raise DatasetError(f"Give {part}_file or {part}, not both.")
    if file is not None:
        return [SourceConfig(str(Path(file)))]
    return list(sources or [])
