"""Q of the chunks a step may take: of all of them, or of some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qrag_retriever.errors import QRAGError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class QValues(NamedTuple):
    """Q of some candidates in one state; of all others it is not known.

    Attributes:
        values: ``[m]``; ``-inf`` where it is not known.
        numbers: Which candidates, ascending, int64 ``[m]``; ``None``: 0 … m-1.

    Example:
        >>> q = QValues(np.array([1, 3, 2], dtype=np.float32), np.array([4, 7, 9]))
        >>> q.best(2), float(q.of(9)), q.without(np.array([7])).best(1)
        ([7, 9], 2.0, [9])
    """

    values: NDArray[np.floating[Any]]
    numbers: NDArray[np.int64] | None = None

    def best(self, count: int) -> list[int]:
        """The candidates of highest Q; order and errors as `best_actions`."""
        places = best_actions(self.values, count)
        return places if self.numbers is None else self.numbers[places].tolist()

    def of(self, number: int) -> np.float32:
        """Q of a candidate that has one here."""
        place = number if self.numbers is None else np.searchsorted(self.numbers, number)
        return np.float32(self.values[place])

    def without(self, numbers: NDArray[np.int64]) -> QValues:
        """A copy in which Q of some candidates is not known."""
        values = self.values.copy()
        if self.numbers is None:
            values[numbers] = -np.inf
        else:
            values[np.isin(self.numbers, numbers)] = -np.inf
        return QValues(values, self.numbers)

    def filled(self, n: int) -> NDArray[np.floating[Any]]:
        """Q of all n candidates, ``[n]``."""
        if self.numbers is None:
            return self.values
        q = np.full(n, -np.inf, dtype=np.float32)
        q[self.numbers] = self.values
        return q


def best_actions(q_values: NDArray[np.floating[Any]], count: int) -> list[int]:
    """The actions of highest Q, best first, equal ones by number; none of ``-inf``.

    Args:
        q_values: Q of every action, ``[n]``.
        count: How many.

    Raises:
        QRAGError: If a Q-value is NaN.

    Example:
        >>> best_actions(np.array([1, 3, -np.inf, 3], dtype=np.float32), 4)
        [1, 3, 0]
    """
    q_values = q_values.copy()
    best: list[int] = []
    for _ in range(min(count, len(q_values))):
        index = int(np.argmax(q_values))  # the first of equal ones; NaN counts as the highest
        if np.isnan(q_values[index]):
            raise QRAGError(
                "The model gave NaN as a Q-value; its weights or the index's embeddings are "
                "damaged. Load or build them again."
            )
        if q_values[index] == -np.inf:
            break
        best.append(index)
        q_values[index] = -np.inf
    return best
