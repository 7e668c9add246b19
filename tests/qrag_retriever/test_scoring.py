"""Q of a whole corpus against rotating every chunk, and what that must not cost in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qrag_retriever import candidate_rows, products, scan, scoring, shortlist
from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_retriever.positions import PositionScheme
from qrag_retriever.quantized import QuantizedRows
from qrag_retriever.rotary import q_at, rotate
from qrag_retriever.scoring import score

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/reference/relative"
MODES = ["none", "absolute", "relative"]
CONTINUOUS = PositionScheme("relative")
TRUNCATED = PositionScheme("relative", step=20, span=18, endpoint=True, truncate=True)


def oracle(states, actions, retrieved, scheme, base=10000.0) -> np.ndarray:
    """Rotate every chunk, pair by pair, in float64; then the inner products."""
    states, actions = np.float64(states), np.float64(actions)
    d = states.shape[1]
    q = np.empty((len(states), len(actions)))
    for s, found in enumerate(retrieved):
        rho = scheme.positions(len(actions), found)
        turned = np.empty_like(actions)
        if scheme.mode == "none":
            turned[:] = actions
        else:
            for half in (0, d // 2):
                for m in range(d // 4):
                    x, y = actions[:, half + 2 * m], actions[:, half + 2 * m + 1]
                    angle = rho * base ** (-2 * m / (d / 2))
                    turned[:, half + 2 * m] = np.cos(angle) * x - np.sin(angle) * y
                    turned[:, half + 2 * m + 1] = np.sin(angle) * x + np.cos(angle) * y
        q[s] = turned @ states[s]
    return q


def assert_close(q, states, actions, expected, tolerance):
    """The error of each Q in proportion to |s||a|, which bounds it."""
    scale = np.linalg.norm(states, axis=1)[:, None] * np.linalg.norm(actions, axis=1)
    assert q.dtype == torch.float32
    assert q.shape == expected.shape
    error = np.abs(q.double().numpy() - expected) / scale
    assert error.max(initial=0) < tolerance


@st.composite
def problems(draw):
    """States, a corpus, candidate rows of it, what was retrieved, and a position scheme."""
    m, count = draw(st.integers(1, 400)), draw(st.integers(1, 5))
    d = 4 * draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states, actions = (random.normal(size=(x, d)).astype(np.float32) for x in (count, m))
    match draw(st.sampled_from(["all", "stretch", "share"])):
        case "all":
            rows = None
        case "stretch":
            first = draw(st.integers(0, m - 1))
            rows = np.arange(first, draw(st.integers(first + 1, m)))
        case "share":
            share = draw(st.sampled_from([0.03, 0.2, 0.9]))
            rows = np.flatnonzero(random.random(m) < share)
    n = m if rows is None else len(rows)
    most = draw(st.sampled_from([0, 6, n]))
    retrieved = [
        random.permutation(n)[: random.integers(0, most, endpoint=True)].tolist()
        for _ in range(count)
    ]
    scheme = PositionScheme(
        draw(st.sampled_from(MODES)),
        step=draw(st.sampled_from([10.0, 20.0, 3.7])),
        span=draw(st.sampled_from([9.0, 18.0, 0.3])),
        endpoint=draw(st.booleans()),
        truncate=draw(st.booleans()),
    )
    return states, actions, rows, retrieved, scheme


# Every way to go about it has to give the same, whatever is fastest for so few chunks.
ways = st.fixed_dictionaries(
    {
        "BLOCK": st.sampled_from([1, 300, candidate_rows.BLOCK]),
        "_GROUP": st.sampled_from([2, scoring._GROUP]),
        "_LONG": st.sampled_from([0, scan._LONG]),
        "_ROUGHLY_LONG": st.sampled_from([0, scan._ROUGHLY_LONG]),
        "_QUANTIZED_LONG": st.sampled_from([0, scan._QUANTIZED_LONG]),
        "_CONVERTED_LONG": st.sampled_from([0, scan._CONVERTED_LONG]),
        "_SHORT": st.sampled_from([0, 10**9]),
        "_SPARSE": st.sampled_from([1, candidate_rows._SPARSE, 1000]),
    }
)


@contextlib.contextmanager
def going_about_it(way: dict[str, int]) -> Iterator[None]:
    """Settings of whichever modules have them."""
    with contextlib.ExitStack() as stack:
        for module in (candidate_rows, products, scan, scoring, shortlist):
            if own := {name: value for name, value in way.items() if hasattr(module, name)}:
                stack.enter_context(mock.patch.multiple(module, **own))
        yield


@settings(max_examples=300, deadline=None)
@given(problems(), ways, st.sampled_from([10000.0, 50.0]))
def test_score_is_the_product_with_every_rotated_chunk(problem, way, base):
    states, actions, rows, retrieved, scheme = problem
    with going_about_it(way):
        q = score(
            *map(torch.from_numpy, (states, actions)), retrieved, scheme, rows=rows, base=base
        )
    chosen = actions if rows is None else actions[rows]
    expected = oracle(states, chosen, retrieved, scheme, base)
    assert_close(q, states, chosen, expected, tolerance=2e-6)


@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED], ids=["continuous", "truncated"])
@pytest.mark.parametrize(("n", "k", "count"), [(30_000, 0, 2), (30_000, 6, 3), (3000, 500, 1)])
def test_larger_corpora(scheme, n, k, count):
    random = np.random.default_rng(n + k)
    states, actions = (random.normal(size=(x, 8)).astype(np.float32) for x in (count, n))
    retrieved = [random.permutation(n)[:k].tolist() for _ in range(count)]
    q = score(torch.from_numpy(states), torch.from_numpy(actions), retrieved, scheme)
    expected = oracle(states, actions, retrieved, scheme)
    assert_close(q, states, actions, expected, tolerance=2e-6)


@pytest.mark.parametrize("k", [0, 9])
def test_the_error_where_all_components_turn_at_the_highest_frequency(k):
    random = np.random.default_rng(k)
    n, states = 40_000, random.normal(size=(1, 4)).astype(np.float32)
    # the state itself, turned: errors of interpolation in both halves add up
    turned = rotate(torch.from_numpy(states), torch.from_numpy(random.uniform(0, 9, n)))
    retrieved = [random.permutation(n)[:k].tolist()]
    exact = oracle(states, turned.numpy(), retrieved, CONTINUOUS)
    q = score(torch.from_numpy(states), turned, retrieved, CONTINUOUS)
    assert_close(q, states, turned.numpy(), exact, tolerance=1.1e-6)
    scales = turned.abs().amax(dim=1) / 127
    rows = QuantizedRows((turned / scales[:, None]).round().to(torch.int8), scales)
    exact = oracle(states, rows.float().numpy(), retrieved, CONTINUOUS)
    q = score(torch.from_numpy(states), rows, retrieved, CONTINUOUS)
    assert_close(q, states, turned.numpy(), exact, tolerance=6e-5)


@pytest.mark.skipif(not FIXTURES.exists(), reason="the released code's outputs are not here")
def test_released_q_values():
    samples = json.loads((FIXTURES / "outputs.json").read_text())
    arrays = np.load(FIXTURES / "outputs.npz")
    for i, sample in enumerate(samples):
        steps = range(len(sample["action"]))
        retrieved = [sample["action"][:t] for t in steps]
        embeddings = (torch.from_numpy(arrays[f"{i}/{x}"]) for x in ("s_embed", "chunk_embed"))
        q = score(*embeddings, retrieved, TRUNCATED)
        free = arrays[f"{i}/mask"]
        np.testing.assert_allclose(q[free], arrays[f"{i}/q"][free], rtol=0, atol=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made in new memory."""

    def __init__(self, *old: torch.Tensor) -> None:
        super().__init__()
        self.old = {tensor.untyped_storage().data_ptr() for tensor in old}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_cpu:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.old:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("share", [1, 0.5, 0.1])
@pytest.mark.parametrize("mode", [*MODES, "truncated"])
def test_never_copies_the_corpus(mode, share, dtype):
    random = np.random.default_rng(0)
    states, actions = torch.randn(2, 256), torch.randn(20_000, 256, dtype=dtype)
    rows = None if share == 1 else np.flatnonzero(random.random(len(actions)) < share)
    scheme = TRUNCATED if mode == "truncated" else PositionScheme(mode)
    with Largest(actions) as largest, going_about_it({"BLOCK": 1 << 18}):
        score(states, actions, [[7], [1000, 3]], scheme, rows=rows)
    assert 0 < largest.bytes < 4 * actions.numel() * 0.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, PositionScheme("absolute")])
def test_other_precisions_are_multiplied_in_float32(dtype, scheme):
    torch.manual_seed(0)
    states, actions = torch.randn(2, 16), torch.randn(3000, 16).to(dtype)
    q = score(states, actions, [[5], [1, 2]], scheme)
    expected = score(states, actions.float(), [[5], [1, 2]], scheme)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [40, 3000])
@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, *map(PositionScheme, MODES)])
def test_inside_autocast_products_are_of_float32(scheme, n):
    torch.manual_seed(0)
    states, actions = torch.randn(2, 16), torch.randn(n, 16)
    expected = score(states, actions, [[5], [1, 2]], scheme)
    with torch.autocast("cpu", torch.bfloat16):
        q = score(states, actions, [[5], [1, 2]], scheme)
    assert torch.equal(q, expected)


@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, PositionScheme("absolute")])
def test_memory_mapped_corpus(tmp_path, scheme):
    actions = np.random.default_rng(0).normal(size=(2000, 12)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", actions)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="c")
    states = np.ones((1, 12), dtype=np.float32)
    q = score(torch.from_numpy(states), torch.from_numpy(mapped), [[4]], scheme)
    assert_close(q, states, actions, oracle(states, actions, [[4]], scheme), tolerance=2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, *map(PositionScheme, MODES)])
@pytest.mark.parametrize("n", [50, 20_000])
def test_on_a_gpu(scheme, n):
    torch.manual_seed(0)
    states, actions, retrieved = torch.randn(3, 16), torch.randn(n, 16), [[], [3], [40, 7]]
    rows = np.flatnonzero(np.random.default_rng(0).random(n) < 0.9)
    for chosen in (None, rows):
        q = score(states, actions.cuda(), retrieved, scheme, rows=chosen)
        assert q.is_cuda
        expected = score(states, actions, retrieved, scheme, rows=chosen)
        torch.testing.assert_close(q.cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_no_candidates_and_no_states(mode):
    states, actions, scheme = torch.randn(2, 8), torch.randn(5, 8), PositionScheme(mode)
    nothing = np.array([], dtype=np.int64)
    assert score(states, actions, [[], []], scheme, rows=nothing).shape == (2, 0)
    assert score(states[:0], actions, [], scheme).shape == (0, 5)


def test_q_at_broadcasts_and_matches_score():
    states, actions = torch.randn(3, 8), torch.randn(10, 8)
    retrieved = [[], [4], [9, 0]]
    rho = torch.from_numpy(np.stack([CONTINUOUS.positions(10, found) for found in retrieved]))
    q = q_at(states[:, None], actions, rho)
    torch.testing.assert_close(q, score(states, actions, retrieved, CONTINUOUS))


def test_q_at_gradients():
    torch.manual_seed(0)
    states, actions = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (1, 4))
    rho = torch.tensor([0.0, 0.4, 21.0, 300.5])
    assert q_at(states, actions, rho).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda s, a: q_at(s, a, rho), (states, actions))


def test_score_keeps_no_graph():
    states, actions = torch.randn(1, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    assert not score(states, actions, [[]], CONTINUOUS).requires_grad


def test_dimension_without_pairs_serves_only_without_positions():
    states, actions = torch.randn(1, 6), torch.randn(3, 6)
    q = score(states, actions, [[1]], PositionScheme("none"))
    torch.testing.assert_close(q, states @ actions.T)
    for mode in ("absolute", "relative"):
        with pytest.raises(ConfigError, match="multiple of 4"):
            score(states, actions, [[1]], PositionScheme(mode))


@pytest.mark.parametrize(
    ("states", "retrieved", "rows"),
    [
        ((2, 8), [[]], None),
        ((1, 4), [[]], None),
        ((8,), [[]], None),
        ((1, 8), [[5]], None),
        ((1, 8), [[2]], [0, 1]),
        ((1, 8), [[]], [1, 0]),
        ((1, 8), [[]], [3, 3]),
        ((1, 8), [[]], [3, 5]),
        ((1, 8), [[]], [-1, 0]),
    ],
)
def test_refuses_what_does_not_fit(states, retrieved, rows):
    rows = None if rows is None else np.array(rows)
    with pytest.raises(InvalidInputError):
        score(torch.randn(states), torch.randn(5, 8), retrieved, CONTINUOUS, rows=rows)
