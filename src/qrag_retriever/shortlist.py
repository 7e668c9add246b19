"""The chunks that may have the highest Q, where Q is known with an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_SPAN = 16  # chunks of which only the highest Q is looked at first


def shortlist(
    blocks: Iterable[tuple[int, Tensor]],
    error: Tensor,
    count: int,
    retrieved: Sequence[Sequence[int]],
    excluded: Sequence[int],
    most: int,
) -> list[NDArray[np.int64] | None]:
    """Which chunks may be among the best that are left, or equal the last of them.

    Args:
        blocks: The number of the first chunk of each block and Q of its L chunks for S states,
            ``[L, S]``, which is written to.
        error: What Q is off by at most for each state, ``[S]``.
        count: How many of the best chunks are needed.
        retrieved: Chunks that do not count for one of the states, for each.
        excluded: Chunks that do not count for any.
        most: How many of a state are worth listing.

    Returns:
        The numbers of each state's chunks, ascending; ``None`` for a state where they are more than
        ``most``, or nothing is known of the error.
    """
    left_out = _LeftOut(retrieved, excluded)
    goes_on = error.isfinite()
    # the highest Q of different spans, hence of different chunks
    highest = torch.full_like(error.expand(count, -1), -torch.inf)
    nothing = torch.empty(0, dtype=torch.int64, device=error.device)
    listed: tuple[Tensor, ...] = (nothing, nothing, error[:0])
    for first, q in blocks:
        left_out.mark(first, q)
        whole = len(q) - len(q) % _SPAN
        parts = [
            (first, torch.unflatten(q[:whole], 0, (-1, _SPAN))),
            (first + whole, q[None, whole:]),
        ]
        spans = [(start, part, part.amax(dim=1)) for start, part in parts if part.numel()]
        highest = torch.cat([highest, *(tops for _, _, tops in spans)]).topk(count, dim=0).values
        least = (highest[-1] - 2 * error).clamp_(min=torch.finfo(error.dtype).min)
        least = least.masked_fill(~goes_on, torch.inf)
        new = [_at_least(least, *span) for span in spans]
        numbers, state, values = (
            torch.cat([old, *columns]) for old, *columns in zip(listed, *new, strict=True)
        )
        close = values >= least[state]
        listed = (numbers[close], state[close], values[close])
        goes_on &= torch.bincount(listed[1], minlength=len(error)) <= most
        if not goes_on.any():
            break
    chunks, owner = listed[0].cpu().numpy(), listed[1].cpu().numpy()
    return [chunks[owner == one] if goes_on[one] else None for one in range(len(error))]


def _at_least(
    least: Tensor, start: int, spans: Tensor, tops: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Number, state and Q of the chunks, in spans ``[B, L, S]``, whose Q reaches the least."""
    span, state = (tops >= least).nonzero(as_tuple=True)
    values = spans[span, :, state]
    row, place = (values >= least[state, None]).nonzero(as_tuple=True)
    return start + span[row] * spans.shape[1] + place, state[row], values[row, place]


class _LeftOut:
    """The chunks that do not count, in order."""

    def __init__(self, retrieved: Sequence[Sequence[int]], excluded: Sequence[int]) -> None:
        chunks = torch.tensor([chunk for own in retrieved for chunk in own], dtype=torch.int64)
        owner = torch.arange(len(retrieved)).repeat_interleave(
            torch.tensor([len(own) for own in retrieved], dtype=torch.int64)
        )
        self._chunks, order = chunks.sort()
        self._owner = owner[order]
        self._excluded = torch.tensor(np.sort(np.asarray(excluded, dtype=np.int64)))

    def mark(self, first: int, q: Tensor) -> None:
        """Let Q of these chunks, in a block, be less than any other."""
        ends = torch.tensor([first, first + len(q)])
        low, high = torch.searchsorted(self._chunks, ends).tolist()
        if low < high:
            q[self._chunks[low:high] - first, self._owner[low:high]] = -torch.inf
        low, high = torch.searchsorted(self._excluded, ends).tolist()
        if low < high:
            q[self._excluded[low:high] - first] = -torch.inf
