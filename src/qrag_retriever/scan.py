"""Q of all candidates for several states, block by block, exactly or roughly.

As ``⟨s, R(ρ)a⟩ = ⟨R(-ρ)s, a⟩``, the state is rotated and never the corpus. Over a run of chunks ρ
is either constant, and one rotated state serves them all; or it is linear, and Q is a polynomial in
ρ to within rounding, whose coefficients are again products with a few vectors made from the state.
So a step costs about what reading the corpus once costs, for several states together; and less
where a rough Q will do whose error is known: of a degree too low for the width of a run, or in half
the bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qrag_retriever.candidate_rows import BLOCK
from qrag_retriever.pieces import begins, cut_pieces
from qrag_retriever.products import InBfloat16, InFloat32, InIntegers, two_at_least, worth_bfloat16
from qrag_retriever.rotary import frequencies, phases, q_at, rotate, turn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.candidate_rows import CandidateRows
    from qrag_retriever.pieces import Pieces
    from qrag_retriever.positions import PositionScheme, Runs
    from qrag_retriever.products import Products

# ρ-width w of a run, and its nodes. Interpolated in P Chebyshev nodes, P even or 1, Q is off by
# 2 (w/4)^P / P! of |s||a| at most, if all components turn at the highest frequency: 7.6e-7 and
# 6.8e-7 here, 2.0e-5 for rows of 8 bits, which are off by far more themselves, and 7.0e-2 and
# 6.3e-2 where rough is enough.
_NARROW = (0.22, 4)  # fewer vectors
_WIDE = (1.0, 6)  # fewer runs
_QUANTIZED = (0.5, 4)  # of rows of 8 bits, where a further vector costs next to nothing
_ROUGHLY_NARROW = (0.14, 1)
_ROUGHLY_WIDE = (1.0, 2)

# Set by measurement (examples/benchmarks/scoring.py); they change the time and memory taken only.
_LONG = 180  # average rows of a narrow piece above which fewer vectors are worth more pieces
_ROUGHLY_LONG = 150
_QUANTIZED_LONG = 300  # of rows of 8 bits that are multiplied as they are
_CONVERTED_LONG = 1000  # of rows that are converted piece by piece
_FIRST = 1 << 13  # chunks of a rough scan's first block, which tells whether it is of use
_SHORT = 16  # average rows of a piece below which a rotated state for each row costs less


def scan(
    states: Tensor,
    corpus: CandidateRows,
    retrieved: Sequence[Sequence[int]],
    scheme: PositionScheme,
    base: float,
    *,
    rough: bool = False,
) -> Scan:
    """Q of all candidates for states ``[S, d]`` that hold the retrieved ones.

    Args:
        states: float32, on the device of the corpus.
        corpus: The candidates.
        retrieved: The chunks each state holds, counted among the candidates.
        scheme: Where chunks lie, given the retrieved ones.
        base: Base of the rotation frequencies.
        rough: Whether Q may be off by more than rounding, where that takes less time.

    Raises:
        InvalidInputError: If a retrieved chunk is not among the candidates.
        ConfigError: If ``d`` is not a multiple of 4 and positions are in use.
    """
    if scheme.mode == "absolute":
        return Scan(_by_block(states, corpus, base))
    runs, nodes = _runs(corpus, retrieved, scheme, rough=rough)
    columns = len(states) * nodes
    # only where pieces are long: the many lengths of short ones cost more than is saved
    halves = rough and scheme.mode == "none" and worth_bfloat16(corpus, columns)
    most = corpus.piece_rows(columns, converted=halves)
    pieces = cut_pieces(runs, np.arange(0, corpus.n, most))
    short = _SHORT if nodes == 1 else 3 * _SHORT
    if scheme.mode == "relative" and len(states) * corpus.n < short * len(pieces.run):
        rho = np.stack([scheme.positions(corpus.n, chunks) for chunks in retrieved])
        return Scan(_by_row(states, corpus, rho, base))
    vectors = _coefficients(states, runs, scheme, nodes, base)
    counts = [len(of_state.first) for of_state in runs]
    products: Products = InFloat32(vectors, corpus)
    if corpus.in_integers:
        products = InIntegers(vectors, counts)
    elif halves:
        products = InBfloat16(vectors, counts)
    if not halves and (scheme.constant or not rough):
        return Scan(_by_piece(products, nodes, corpus, pieces))
    wide = states.cpu().double()  # not every GPU has this type, in which no square is too small
    error = wide.norm(dim=1) * _rounding(states.shape[1]) + torch.as_tensor(products.lost).cpu()
    if not scheme.constant:
        error += _interpolation_error(wide, runs, nodes, base)
    return Scan(_by_piece(products, nodes, corpus, pieces, at_first=_FIRST), error)


def _runs(
    corpus: CandidateRows,
    retrieved: Sequence[Sequence[int]],
    scheme: PositionScheme,
    *,
    rough: bool,
) -> tuple[list[Runs], int]:
    """Each state's runs, and how many nodes their width asks for."""
    # pieces are few where the runs of several states begin at the same chunks
    aligned = len(retrieved) > 1 and not scheme.constant

    def cut(width: float) -> list[Runs]:
        return [scheme.runs(corpus.n, chunks, width, aligned=aligned) for chunks in retrieved]

    if scheme.constant:
        return cut(1.0), 1
    if corpus.in_integers and not rough:
        width, nodes = _QUANTIZED
        return cut(width), nodes
    width, nodes = _ROUGHLY_NARROW if rough else _NARROW
    long = _ROUGHLY_LONG if rough else _LONG
    if rough and not corpus.as_float32:
        long = _QUANTIZED_LONG if corpus.in_integers else _CONVERTED_LONG
    of_one_state = scheme.span * (1 + max(map(len, retrieved))) / width
    if corpus.n >= long * of_one_state:  # otherwise to cut takes time and is in vain
        runs = cut(width)
        if corpus.n >= long * len(begins(runs)):
            return runs, nodes
    width, nodes = _ROUGHLY_WIDE if rough else _WIDE
    return cut(width), nodes


class Scan(NamedTuple):
    """What `scan` returns.

    Attributes:
        blocks: The number of the first chunk of each block, and Q of its L chunks, ``[L, S]``,
            which may be written to.
        error: What Q is off by at most for a chunk whose embedding has the length 1, float64
            ``[S]`` on the CPU; ``None``: these Q are those of a scan that is not rough.
    """

    blocks: Iterator[tuple[int, Tensor]]
    error: Tensor | None = None


def _rounding(dimension: int) -> float:
    """What is lost to rounding, at most, of a product of vectors of length 1."""
    return dimension * 2**-22 + (2**-6 if _in_fewer_bits() else 0.0)


def _in_fewer_bits() -> bool:
    """Whether torch may have been told to multiply float32 in 8 significant bits."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was told by torch.backends, about which this says nothing
        return True


def _interpolation_error(states: Tensor, runs: Sequence[Runs], nodes: int, base: float) -> Tensor:
    """What interpolation is off by at most, by Cauchy's inequality, ``[S]``."""
    widths = torch.tensor([(of_state.last - of_state.first).max() for of_state in runs])
    turned = frequencies(states.shape[1], base) * widths[:, None] / 4
    lost = 2 / math.factorial(nodes) * turned**nodes
    pairs = torch.unflatten(states, 1, (2, -1, 2)).square().sum(dim=(1, 3))
    return (pairs * lost.square()).sum(dim=1).sqrt()


def _by_piece(
    products: Products,
    nodes: int,
    corpus: CandidateRows,
    pieces: Pieces,
    at_first: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """One product per piece with the vectors of its runs, then one polynomial per chunk."""
    run = torch.from_numpy(pieces.run).to(corpus.device)
    columns = nodes * run.shape[1]
    most = BLOCK // (columns * corpus.width)
    for some in pieces.groups(corpus.block_rows(columns), most, at_first):
        bounds = pieces.bounds[some.start : some.stop + 1]
        block, edges, places = corpus.read(bounds)
        powers = products(block, edges, run[some])
        if places is not None:
            powers = powers[places]
        q = powers[:, -1]
        if nodes > 1:
            t = pieces.t(some, like=q)
            for coefficient in reversed(powers[:, :-1].unbind(1)):
                q = torch.addcmul(coefficient, q, t)
        yield int(bounds[0]), q


def _coefficients(
    states: Tensor, runs: Sequence[Runs], scheme: PositionScheme, nodes: int, base: float
) -> Tensor:
    """The vectors whose products with a chunk are the coefficients of Q as a polynomial in t.

    Returns:
        ``[R, P, d]`` for the R runs of all states and P nodes; one node suffices for constant ρ.
    """
    owner = np.repeat(np.arange(len(runs)), [len(of_state.first) for of_state in runs])
    states = states[torch.from_numpy(owner).to(states.device), None]
    if scheme.mode == "none":
        return states
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


def _by_row(
    states: Tensor, corpus: CandidateRows, rho: NDArray[np.float64], base: float
) -> Iterator[tuple[int, Tensor]]:
    """A rotated state for every chunk: costs less than many products of a few chunks each."""
    positions = torch.from_numpy(rho.T).to(states.device)
    for part, block in corpus.blocks(columns=states.numel()):
        yield part.start, q_at(states, block[:, None], positions[part], base)


def _by_block(states: Tensor, corpus: CandidateRows, base: float) -> Iterator[tuple[int, Tensor]]:
    """Turn every block by the same angles: ``⟨s, R(b + i)a⟩ = ⟨R(-b)s, R(i)a⟩``."""
    dimension = states.shape[1]
    here = torch.arange(min(corpus.n, corpus.piece_rows(dimension)), device=states.device)
    angles = phases(here, dimension, base).to(torch.complex64)
    for part, block in corpus.blocks(columns=dimension):
        vectors = rotate(states, -here.new_tensor(part.start), base)
        q = turn(block, angles[: len(block)]) @ two_at_least(vectors).T
        yield part.start, q[:, : len(states)]
