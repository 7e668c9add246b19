"""R(ρ): the rotation that writes a chunk's position into a vector (paper §3.3).

Each half of a vector is rotated on its own, so that either half can serve as a critic by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrag_retriever.errors import ConfigError


def rotate(vectors: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate vectors to their positions: R(ρ)v.

    Component pair ``(2m, 2m + 1)`` of each half is turned by the angle ``ρ · base^(-2m / (d/2))``.
    Rotations are orthogonal and add up: ``R(a) R(b) = R(a + b)`` and ``⟨s, R(a)v⟩ = ⟨R(-a)s, v⟩``.

    Args:
        vectors: ``[..., d]``, ``d`` a multiple of 4.
        positions: ρ, of a shape that broadcasts with ``[...]``; may be negative or fractional.
        base: Base of the geometric series of frequencies, the first of which is 1.

    Returns:
        ``[..., d]`` in the data type of ``vectors``, differentiable with respect to them.

    Raises:
        ConfigError: If ``d`` is not a multiple of 4.

    Example:
        >>> rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor(torch.pi / 2)).round(decimals=3)
        tensor([-0.,  1., -2., -0.])
    """
    return turn(vectors, phases(positions, vectors.shape[-1], base))


def q_at(states: Tensor, actions: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Q of given pairs of state and chunk: ``⟨R(-ρ)s, a⟩``.

    Args:
        states: State embeddings ``[..., d]``.
        actions: Chunk embeddings without position, ``[..., d]``; all three broadcast.
        positions: ρ of each pair, ``[...]``.
        base: Base of the rotation frequencies.

    Returns:
        ``[...]``, differentiable with respect to states and actions.

    Raises:
        ConfigError: If ``d`` is not a multiple of 4.
    """
    return (rotate(states, -positions, base) * actions).sum(dim=-1)


def phases(positions: Tensor, dimension: int, base: float = 10000.0) -> Tensor:
    """The rotations R(ρ) themselves, as complex numbers on the unit circle for :func:`turn`.

    Args:
        positions: ρ, ``[...]``.
        dimension: d, of the vectors to rotate.
        base: Base of the geometric series of frequencies.

    Returns:
        ``[..., d / 4]``, one number per component pair of a half, in the widest complex type.

    Raises:
        ConfigError: If ``d`` is not a multiple of 4.
    """
    if dimension % 4:
        raise ConfigError(
            f"Vectors of dimension {dimension} cannot carry positions; rotary positions need a "
            "multiple of 4. Use another encoder, or positions='none'."
        )
    # An angle of thousands of radians leaves half precision no correct digit and float32 few.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    turns = frequencies(dimension, base).to(exact).to(positions.device)
    angles = positions.to(exact)[..., None] * turns
    return torch.complex(angles.cos(), angles.sin())


def frequencies(dimension: int, base: float = 10000.0) -> Tensor:
    """By how much each component pair of a half turns from one position to the next.

    Returns:
        float64 ``[d / 4]``, from 1 down.
    """
    pair = torch.arange(dimension // 4, dtype=torch.float64)
    return base ** (-4 * pair / dimension)


def turn(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Rotate ``vectors [..., d]`` by what :func:`phases` returned, ``[..., d / 4]``."""
    # Complex arithmetic, because it is several times as fast as sums of cosines and sines.
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    if wide.storage_offset() % 2:  # no complex number may begin there
        wide = wide.clone()
    pairs = torch.view_as_complex(torch.unflatten(wide.contiguous(), -1, (2, -1, 2)))
    turned = pairs * rotation[..., None, :].to(pairs.dtype)
    return torch.view_as_real(turned).flatten(-3).to(vectors.dtype)
