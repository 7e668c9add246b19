"""One question with the chunks that support its answer, and where such samples come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol, overload, runtime_checkable

import numpy as np

from qrag_retriever.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class SupportSample:
    """A question, the chunks to search and which of them support the answer (METHOD: q, C, F*).

    Attributes:
        id: Name of the sample in messages and result files.
        question: The user's query q.
        chunks: The chunks c_0 … c_{N-1} in document order; samples on one corpus share one tuple.
        support: Indices of the support chunks F*; their order has no meaning.
        answer: The expected answer, for scoring a reader; ``None`` if the dataset has none.
        other_answers: Further answers that are right too.

    Raises:
        DatasetError: If a field is empty, of the wrong type, or ``support`` repeats an index or
            points outside ``chunks``.

    Example:
        >>> SupportSample("1", "Where is Mary?", ("John left.", "Mary moved to the office."), (1,))
        SupportSample(id='1', question='Where is Mary?', chunks=(...), support=(1,), answer=None)
    """

    id: str
    question: str
    chunks: tuple[str, ...]
    support: tuple[int, ...]
    answer: str | None = None
    other_answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The chunks are not looked at one by one: a corpus of millions is shared by many samples.
        if not isinstance(self.chunks, tuple) or not self.chunks:
            raise self._error("'chunks' must be a tuple of texts that is not empty")
        if not isinstance(self.question, str) or not self.question.strip():
            raise self._error("'question' must be a text that is not empty")
        if not isinstance(self.support, tuple) or not self.support:
            raise self._error("'support' must be a tuple of chunk indices that is not empty")
        wrong = [i for i in self.support if not 0 <= i < len(self.chunks)]
        if wrong:
            raise self._error(
                f"'support' holds {wrong[0]}, but indices go from 0 to {len(self.chunks) - 1}"
            )
        if len(set(self.support)) != len(self.support):
            raise self._error(f"'support' repeats an index: {list(self.support)}")

    def __repr__(self) -> str:
        # A document of 400,000 chunks must not fill the screen.
        return (
            f"SupportSample(id={self.id!r}, question={self.question!r}, chunks=(...), "
            f"support={self.support}, answer={self.answer!r})"
        )

    def _error(self, message: str) -> DatasetError:
        return DatasetError(f"Sample {self.id!r}: {message}; correct the data.")


@runtime_checkable
class SampleSource(Protocol):
    """Anything that training samples can be drawn from, a finite set or an endless stream."""

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw one sample; equal generator states give equal samples."""
        ...


class SampleList(Sequence[SupportSample]):
    """A finite dataset: a sequence of samples that can also be drawn from.

    Args:
        samples: The samples, at least one.

    Raises:
        DatasetError: If there is no sample.
    """

    def __init__(self, samples: Iterable[SupportSample]) -> None:
        self._samples = tuple(samples)
        if not self._samples:
            raise DatasetError("No sample is left; give a file with at least one question.")

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> SupportSample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleList: ...
    def __getitem__(self, index: int | slice) -> SupportSample | SampleList:
        if isinstance(index, slice):
            return SampleList(self._samples[index])
        return self._samples[index]

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw a sample uniformly, with replacement: training resumes from ``rng`` alone."""
        return self._samples[rng.integers(len(self._samples))]


class FixedSamples(Sequence[SupportSample]):
    """``count`` samples of a source, always the same: a validation set of an endless stream.

    Sample ``i`` is drawn anew from ``(seed, i)`` at every access, so that a set of documents of
    millions of tokens takes no memory.

    Args:
        source: What to draw from.
        count: Number of samples, at least 1.
        seed: Non-negative seed of the set.

    Raises:
        DatasetError: If ``count`` is below 1 or ``seed`` below 0.

    Example:
        >>> from qrag_train.data import BabiSimulator
        >>> validation = FixedSamples(BabiSimulator(task=1), count=100, seed=7)
        >>> len(validation), validation[3] == validation[3]
        (100, True)
    """

    def __init__(self, source: SampleSource, count: int, seed: int) -> None:
        if count < 1:
            raise DatasetError(f"count={count} samples make no dataset; give at least 1.")
        if seed < 0:
            raise DatasetError(f"seed={seed} is not allowed; give an integer of at least 0.")
        self._source = source
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> SupportSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[SupportSample]: ...
    def __getitem__(self, index: int | slice) -> SupportSample | list[SupportSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        number = range(self._count)[index]
        return self._source.sample(np.random.default_rng((self._seed, number)))


def finite(source: SampleSource, count: int = 200, seed: int = 0) -> Sequence[SupportSample]:
    """All samples of a source that has an end, else ``count`` of it, always the same.

    Example:
        >>> from qrag_train.data import BabiSimulator
        >>> len(finite(BabiSimulator(task=1)))
        200
    """
    return source if isinstance(source, Sequence) else FixedSamples(source, count, seed)
