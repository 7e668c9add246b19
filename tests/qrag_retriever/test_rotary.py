"""Rotations against explicit 2x2 matrices and their own algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import ConfigError
from qrag_retriever.rotary import rotate

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/reference/relative"

dimensions = st.integers(1, 8).map(lambda quarter: 4 * quarter)
positions = st.floats(-5000, 5000)
seeds = st.integers(0, 2**32 - 1)


def matrix(rho: float, d: int, base: float = 10000.0) -> np.ndarray:
    """R(ρ) written out: 2x2 rotations down the diagonal, the same in both halves."""
    whole = np.zeros((d, d))
    for half in range(2):
        for m in range(d // 4):
            angle = rho * base ** (-2 * m / (d / 2))
            at = half * d // 2 + 2 * m
            cos, sin = np.cos(angle), np.sin(angle)
            whole[at : at + 2, at : at + 2] = [[cos, -sin], [sin, cos]]
    return whole


def vectors(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@given(seeds, dimensions, positions, st.floats(2, 1e6))
def test_is_the_matrix(seed, d, rho, base):
    v = vectors(seed, d)
    rotated = rotate(v, torch.tensor(rho, dtype=torch.float64), base)
    np.testing.assert_allclose(rotated, matrix(rho, d, base) @ v.numpy(), atol=1e-9)


@given(seeds, dimensions, positions, positions)
def test_algebra(seed, d, a, b):
    s, v = vectors(seed, 2, d)
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    torch.testing.assert_close(rotate(v, a).norm(), v.norm())
    torch.testing.assert_close(rotate(rotate(v, a), b), rotate(v, a + b), atol=1e-8, rtol=0)
    torch.testing.assert_close(rotate(rotate(v, a), -a), v)
    torch.testing.assert_close(s @ rotate(v, a), rotate(s, -a) @ v)


def test_broadcasts_both_ways():
    rho = torch.tensor([[0.5], [1.5], [7.0]], dtype=torch.float64)
    v = vectors(0, 5, 8)
    rotated = rotate(v, rho)
    assert rotated.shape == (3, 5, 8)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(rotated[i, j], rotate(v[j], rho[i, 0]))
    assert rotate(v[:0], rho[:0, 0]).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_keeps_data_type_and_precision_far_out(dtype):
    v, rho = vectors(1, 16).to(dtype), torch.tensor(399_999)
    rotated = rotate(v, rho)
    assert rotated.dtype == dtype
    expected = matrix(399_999.0, 16) @ v.double().numpy()
    np.testing.assert_allclose(rotated.double(), expected, atol=4 * torch.finfo(dtype).eps + 1e-9)


def test_strides_do_not_matter():
    wide = vectors(2, 3, 20)
    part, rho = wide[:, 5:17], torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(rotate(part, rho), rotate(part.clone(), rho))
    torch.testing.assert_close(rotate(part[0], rho[0]), rotate(part[0].clone(), rho[0]))


def test_gradients():
    v = vectors(3, 4, 8).requires_grad_()
    rho = torch.tensor([0.0, 0.3, -2.0, 17.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rho), v)


def test_refuses_dimensions_without_pairs_in_each_half():
    with pytest.raises(ConfigError, match="multiple of 4"):
        rotate(torch.ones(6), torch.tensor(1.0))


@pytest.mark.skipif(not FIXTURES.exists(), reason="the released code's outputs are not here")
def test_released_q_values():
    arrays = np.load(FIXTURES / "outputs.npz")
    samples = {name.split("/")[0] for name in arrays.files}
    assert samples
    for sample in samples:
        chunks = torch.from_numpy(arrays[f"{sample}/chunk_embed"])
        rho = torch.from_numpy(arrays[f"{sample}/pos_int"])
        q = (rotate(chunks, rho) * torch.from_numpy(arrays[f"{sample}/s_embed"])[:, None]).sum(-1)
        free = arrays[f"{sample}/mask"]
        np.testing.assert_allclose(q[free], arrays[f"{sample}/q"][free], rtol=0, atol=1e-6)
