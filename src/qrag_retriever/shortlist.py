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
    unavailable: Sequence[Sequence[int]],
    most: int,
) -> list[NDArray[np.int64]] | None:
    """Which chunks may be among the best, or equal the last of them.

    Args:
        blocks: The number of the first chunk of each block and Q of its L chunks for S states,
            ``[L, S]``, which is written to.
        error: What Q is off by at most for each state, ``[S]``.
        count: How many of the best chunks are needed.
        unavailable: Chunks that do not count, for each state.
        most: How many of all states together are worth listing.

    Returns:
        The numbers of each state's chunks, ascending; ``None`` if they are more than ``most``, or
        nothing is known of the error.
    """
    if not error.isfinite().all():
        return None
    never = np.concatenate([np.asarray(chunks, dtype=np.int64) for chunks in unavailable])
    owner = np.repeat(np.arange(len(unavailable)), list(map(len, unavailable)))
    order = np.argsort(never, kind="stable")
    never, owner = never[order], owner[order]
    # the highest Q of different spans, hence of different chunks
    highest = torch.full_like(error.expand(count, -1), -torch.inf)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for first, q in blocks:
        low, high = np.searchsorted(never, [first, first + len(q)])
        if low < high:
            q[
                torch.from_numpy(never[low:high] - first), torch.from_numpy(owner[low:high])
            ] = -torch.inf
        whole = len(q) - len(q) % _SPAN
        parts = [
            (first, torch.unflatten(q[:whole], 0, (-1, _SPAN))),
            (first + whole, q[None, whole:]),
        ]
        spans = [(start, part, part.amax(dim=1)) for start, part in parts if part.numel()]
        highest = torch.cat([highest, *(tops for _, _, tops in spans)]).topk(count, dim=0).values
        least = (highest[-1] - 2 * error).clamp_(min=torch.finfo(error.dtype).min)
        for start, part, tops in spans:
            span, state = (tops >= least).nonzero(as_tuple=True)
            values = part[span, :, state]
            row, place = (values >= least[state, None]).nonzero(as_tuple=True)
            numbers = start + span[row] * part.shape[1] + place
            kept.append((numbers, state[row], values[row, place]))
        if sum(len(numbers) for numbers, _, _ in kept) > most:
            return None
    numbers, state, values = (torch.cat(column) for column in zip(*kept, strict=True))
    close = values >= least[state]
    chunks, owners = numbers[close].cpu().numpy(), state[close].cpu().numpy()
    return [chunks[owners == one] for one in range(len(unavailable))]
