"""The vectors whose products with the chunks of a piece are Q, or the coefficients of Q."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.quantized import in_parts
from qrag_retriever.rotary import frequencies, phases, rotate, turn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.pieces import Pieces
    from qrag_retriever.positions import PositionMode, Runs


class VectorsOfPieces(Protocol):
    """P vectors of each of S states for each piece.

    Attributes:
        lost: What is lost to rounding, at most, for a state and a chunk of length 1.
    """

    @property
    def lost(self) -> float: ...  # noqa: D102

    def __call__(self, some: slice) -> Tensor:
        """Those of some pieces, ``[G, P, S, d]``."""

    def largest(self) -> Tensor:
        """What no number of a vector exceeds, ``[P, S]``."""

    def in_parts(self, steps: Tensor) -> Callable[[slice], Tensor]:
        """Of some pieces the same as integers, see `quantized.in_parts`, with steps ``[P, S]``."""


class Coefficients:
    """The vectors whose products with a chunk are the coefficients of Q as a polynomial in t.

    They are the same for all pieces of a run. One node suffices for constant ρ.
    """

    lost = 0.0

    def __init__(
        self,
        states: Tensor,
        runs: Sequence[Runs],
        pieces: Pieces,
        mode: PositionMode,
        nodes: int,
        base: float,
    ) -> None:
        self._run = torch.from_numpy(pieces.run).to(states.device)[:, None]
        counts = [len(of_state.first) for of_state in runs]
        self._owner = torch.from_numpy(np.repeat(np.arange(len(runs)), counts)).to(states.device)
        of_runs = states[self._owner, None]
        self._vectors = of_runs if mode == "none" else _coefficients(of_runs, runs, nodes, base)

    def __call__(self, some: slice) -> Tensor:
        """See `VectorsOfPieces`."""
        return self._of_pieces(self._vectors, some)

    def largest(self) -> Tensor:
        """See `VectorsOfPieces`."""
        of_states = torch.split(self._vectors, self._owner.bincount().tolist())
        return torch.stack([own.abs().amax(dim=(0, 2)) for own in of_states], dim=1)

    def in_parts(self, steps: Tensor) -> Callable[[slice], Tensor]:
        """See `VectorsOfPieces`."""
        of_runs = steps[:, self._owner].T
        parts = in_parts(self._vectors[:, :, None], of_runs[:, :, None])[:, :, 0]
        return lambda some: self._of_pieces(parts, some)

    def _of_pieces(self, of_runs: Tensor, some: slice) -> Tensor:
        order = torch.arange(of_runs.shape[1], device=of_runs.device)[:, None]
        return of_runs[self._run[some], order]


class RotatedStates:
    """The states, rotated to one position for each piece.

    Args:
        states: ``[S, d]``.
        positions: ρ of each piece for each state, ``[G, S]``.
        base: Base of the rotation frequencies.
    """

    def __init__(self, states: Tensor, positions: NDArray[np.float64], base: float) -> None:
        self._states = states
        self._positions = torch.from_numpy(positions).to(states.device)
        self._turns = frequencies(states.shape[1], base).to(self._positions)
        self.lost = float(np.abs(positions).max()) * 2**-23  # angles are rounded to float32

    def __call__(self, some: slice) -> Tensor:
        """See `VectorsOfPieces`."""
        angles = (self._positions[some, :, None] * self._turns).float()
        return turn(self._states, torch.complex(angles.cos(), -angles.sin()))[:, None]

    def largest(self) -> Tensor:
        """See `VectorsOfPieces`."""
        pairs = torch.unflatten(self._states, 1, (-1, 2))
        largest: Tensor = torch.linalg.vector_norm(pairs, dim=2).amax(dim=1)
        return largest[None]

    def in_parts(self, steps: Tensor) -> Callable[[slice], Tensor]:
        """See `VectorsOfPieces`."""
        return lambda some: in_parts(self(some), steps)


def _coefficients(states: Tensor, runs: Sequence[Runs], nodes: int, base: float) -> Tensor:
    """The vectors ``[R, P, d]`` for the state of each run of all states, ``[R, 1, d]``."""
    first = np.concatenate([of_state.first for of_state in runs])
    last = np.concatenate([of_state.last for of_state in runs])
    middle = torch.from_numpy((first + last) / 2).to(states.device)
    states = rotate(states, -middle[:, None], base)
    if nodes == 1:
        return states
    # R(ht) as a polynomial in t: few half widths h are different. By the symmetry of the nodes its
    # even powers only scale a component pair, and its odd ones turn it by a right angle.
    half, which = np.unique(((last - first) / 2).round(12), return_inverse=True)
    t = np.cos(np.pi * (np.arange(nodes) + 0.5) / nodes)
    turns = phases(torch.from_numpy(-half[:, None] * t).to(states.device), states.shape[-1], base)
    powers = torch.from_numpy(np.linalg.inv(np.vander(t, increasing=True))).to(turns) @ turns
    even, odd = powers[:, ::2].real, powers[:, 1::2].imag
    table = torch.stack([_paired(even, even), _paired(-odd, odd)], dim=2).to(states)
    vectors = table[torch.from_numpy(which).to(states.device)]
    turned = torch.unflatten(states, -1, (-1, 2)).flip(-1).flatten(-2)
    return vectors.mul_(torch.stack([states, turned], dim=2)).flatten(1, 2)


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """Factors for both components of each pair of both halves: ``[..., d / 4]`` to ``[..., d]``."""
    return torch.stack([first, second], dim=-1).flatten(-2).repeat(*[1] * (first.ndim - 1), 2)
