"""Training on several datasets at once."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import numpy as np

from qrag_retriever.errors import DatasetError
from qrag_train.data.sample import SampleSource, SupportSample


class Mixture:
    """Draws every sample from one of several sources, chosen by weight.

    Args:
        sources: What to draw from, at least one.
        weights: Share of each source, in any unit; ``None``: finite sources by their number of
            samples, as if their files were joined.

    Raises:
        DatasetError: If the weights do not fit the sources, or a source without an end is to be
            weighted by its size.

    Example:
        >>> from qrag_train.data import BabiSimulator
        >>> mixture = Mixture([BabiSimulator(task=1), BabiSimulator(task=2)], weights=[1, 3])
        >>> mixture.sample(np.random.default_rng(0)).id.split("-")[0]
        'qa2'
    """

    def __init__(
        self, sources: Sequence[SampleSource], weights: Sequence[float] | None = None
    ) -> None:
        if weights is None:
            weights = [_size(source) for source in sources]
        shares = np.asarray(weights, dtype=np.float64)
        if shares.shape != (len(sources),) or not sources:
            raise DatasetError(
                f"{len(sources)} sources and weights {list(weights)}; give one weight per source."
            )
        if not np.all(np.isfinite(shares) & (shares >= 0)) or shares.sum() <= 0:
            raise DatasetError(
                f"Weights {list(weights)} are not allowed; give numbers of at least 0, one above 0."
            )
        self._sources = tuple(sources)
        self._shares = shares / shares.sum()

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """Draw a source by weight, then a sample from it."""
        return self._sources[rng.choice(len(self._sources), p=self._shares)].sample(rng)


def _size(source: SampleSource) -> int:
    if not isinstance(source, Sized):
        raise DatasetError(
            f"A {type(source).__name__} without end has no size that tells its share of a mixture; "
            "give each source a weight."
        )
    return len(source)
