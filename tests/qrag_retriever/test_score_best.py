"""The best chunks, found with a rough Q first, against Q of every chunk in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import (
    CONTINUOUS,
    MODES,
    TRUNCATED,
    Largest,
    going_about_it,
    oracle,
    problems,
    ways,
)

from qrag_retriever import candidate_rows, products, shortlist
from qrag_retriever.candidate_rows import CandidateRows
from qrag_retriever.errors import ConfigError, InvalidInputError, QRAGError
from qrag_retriever.positions import PositionScheme
from qrag_retriever.quantized import QuantizedRows
from qrag_retriever.scan import scan
from qrag_retriever.scoring import score, score_best
from qrag_retriever.vectors import StoredVectors

LONG = ("_ROUGHLY_LONG", "_QUANTIZED_LONG", "_CONVERTED_LONG")
TYPES = ["float32", "bfloat16", "float16", "int8"]


@contextlib.contextmanager
def processor(*, integers: bool, halves: bool):
    """One that multiplies integers, or bfloat16, or neither; torch does so anywhere, if slowly."""
    with (
        mock.patch.object(candidate_rows, "multiplies_integers", return_value=integers),
        mock.patch.object(products, "_multiplies_bfloat16", return_value=halves),
        mock.patch.object(products, "_MANY", 1),
    ):
        yield


def stored(actions, dtype: str) -> tuple[torch.Tensor | QuantizedRows, np.ndarray, Callable]:
    """A matrix as it is stored, the very numbers it holds, and the length of the longest row."""
    vectors = StoredVectors.of(actions, dtype)
    return vectors.tensor(), vectors.float32(), vectors.longest


processors = st.fixed_dictionaries({"integers": st.booleans(), "halves": st.booleans()})
shortlists = st.fixed_dictionaries(
    {
        "_FEW": st.just(0),
        "_EACH": st.just(0),
        "_CLOSE": st.sampled_from([0.01, 0.3, 1.0]),
        "_SPAN": st.sampled_from([1, 5, shortlist._SPAN]),
    }
)


@settings(max_examples=300, deadline=None)
@given(problems(), ways, shortlists, processors, st.sampled_from(TYPES), st.data())
def test_the_best_are_those_of_all(problem, way, short, kind, dtype, data):
    states, actions, rows, retrieved, scheme = problem
    matrix, exact, longest = stored(actions, dtype)
    chosen = exact if rows is None else exact[rows]
    n = len(chosen)
    count = data.draw(st.integers(1, 8))
    excluded = data.draw(st.lists(st.integers(0, n - 1), max_size=3)) if n else []
    with going_about_it(way | short), processor(**kind):
        found = score_best(
            torch.from_numpy(states),
            matrix,
            retrieved,
            scheme,
            count,
            longest=longest,
            excluded=excluded,
            rows=rows,
        )
    assert len(found) == len(states)
    expected = oracle(states, chosen, retrieved, scheme)
    for state, q, of_all, taken in zip(states, found, expected, retrieved, strict=False):
        never = np.array([*taken, *excluded], dtype=np.int64)
        rounding = 3e-5 if dtype == "int8" else 2e-6
        tolerance = rounding * np.linalg.norm(state) * longest()
        best = q.without(never).best(count)
        free = np.setdiff1d(np.arange(n), never)
        assert len(set(best)) == len(best) == min(count, len(free))
        assert set(best) <= set(free.tolist())
        np.testing.assert_allclose(
            of_all[best], np.sort(of_all[free])[::-1][: len(best)], atol=2 * tolerance, rtol=0
        )
        np.testing.assert_allclose(
            [q.of(chunk) for chunk in best], of_all[best], atol=tolerance, rtol=0
        )


@settings(max_examples=200, deadline=None)
@given(problems(), processors, st.sampled_from(TYPES), st.booleans(), st.sampled_from([0, 0, 1]))
def test_a_rough_q_is_off_by_no_more_than_it_says(problem, kind, dtype, narrow, highest):
    states, actions, rows, retrieved, scheme = problem
    if highest:  # all components turn at the highest frequency, where interpolation is worst
        states, actions = states[:, :4].copy(), actions[:, :4].copy()
        states[:, 2:] = 0
    matrix, exact, _ = stored(actions, dtype)
    long = 0 if narrow else 10**9
    way = {"_SHORT": 0, **dict.fromkeys(LONG, long)}
    with going_about_it(way), processor(**kind):
        corpus = CandidateRows(matrix, rows, turned=scheme.mode == "absolute")
        if not corpus.n:
            return
        found = scan(torch.from_numpy(states), corpus, retrieved, scheme, 10000.0, rough=True)
        q = torch.cat([block for _, block in found.blocks]).T.double().numpy()
    chosen = exact if rows is None else exact[rows]
    lengths = torch.from_numpy(states).double().norm(dim=1)
    error = lengths * (3e-5 if dtype == "int8" else 2e-6) if found.error is None else found.error
    bound = error.numpy()[:, None] * np.linalg.norm(chosen, axis=1)
    assert (np.abs(q - oracle(states, chosen, retrieved, scheme)) <= bound).all()
    assert (error <= 0.1 * lengths).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("long", [0, 10**9])
@pytest.mark.parametrize("retrieved", [[[100]], [[], [1000, 1003]]])
def test_a_rough_q_may_be_off_by_as_much_as_it_says(dtype, long, retrieved):
    random = np.random.default_rng(0)
    states, actions = (
        random.normal(size=(n, 4)).astype(np.float32) for n in (len(retrieved), 4000)
    )
    states[:, 2:] = 0  # all components turn at the highest frequency
    matrix, exact, _ = stored(actions, dtype)
    with going_about_it(dict.fromkeys(LONG, long)), processor(integers=True, halves=False):
        corpus = CandidateRows(matrix, None, turned=False)
        found = scan(torch.from_numpy(states), corpus, retrieved, CONTINUOUS, 10000.0, rough=True)
        q = torch.cat([block for _, block in found.blocks]).T.double().numpy()
    off = np.abs(q - oracle(states, exact, retrieved, CONTINUOUS)) / np.linalg.norm(exact, axis=1)
    assert (off.max(axis=1) <= found.error.numpy()).all()
    assert (off.max(axis=1) > 0.8 * found.error.numpy()).all()


@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, *map(PositionScheme, MODES[:2])])
@pytest.mark.parametrize("dtype", TYPES)
def test_larger_corpora(scheme, dtype):
    random = np.random.default_rng(0)
    states, actions = (random.normal(size=(x, 16)).astype(np.float32) for x in (3, 30_000))
    retrieved = [random.permutation(30_000)[:k].tolist() for k in (0, 1, 6)]
    matrix, exact, longest = stored(actions, dtype)
    found = score_best(torch.from_numpy(states), matrix, retrieved, scheme, 5, longest=longest)
    expected = oracle(states, exact, retrieved, scheme)
    for q, of_all, taken in zip(found, expected, retrieved, strict=True):
        of_all[taken] = -np.inf
        assert q.without(np.array(taken, dtype=int)).best(5) == np.argsort(-of_all)[:5].tolist()


def some_of(found) -> bool:
    return all(q.numbers is not None for q in found)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (CONTINUOUS, "float32"),
        (CONTINUOUS, "int8"),
        (PositionScheme("none"), "float32"),
        (PositionScheme("none"), "bfloat16"),
    ],
)
def test_few_chunks_are_scored_exactly(scheme, dtype):
    random = np.random.default_rng(0)
    matrix, _, longest = stored(random.normal(size=(20_000, 64)).astype(np.float32), dtype)
    with processor(integers=True, halves=True):
        found = score_best(torch.randn(2, 64), matrix, [[], [5]], scheme, 4, longest=longest)
    assert some_of(found)
    assert all(len(q.values) < 1000 for q in found)


def test_where_nearly_all_chunks_are_as_good_as_the_best_all_are_scored():
    row = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    matrix, states = torch.from_numpy(row).repeat(20_000, 1), torch.randn(2, 16)
    for scheme in (CONTINUOUS, PositionScheme("none")):
        with processor(integers=False, halves=True):
            found = score_best(states, matrix, [[], [3]], scheme, 4, longest=lambda: 10.0)
        expected = score(states, matrix, [[], [3]], scheme)
        assert not some_of(found)
        for q, of_all in zip(found, expected.numpy(), strict=True):
            np.testing.assert_array_equal(q.values, of_all)


def test_a_state_of_which_all_chunks_are_equally_good_is_no_matter_to_others():
    torch.manual_seed(0)
    states, matrix = torch.randn(3, 64), torch.randn(20_000, 64)
    states[1] = 0
    retrieved = [[], [7], [300, 2]]
    found = score_best(states, matrix, retrieved, CONTINUOUS, 4, longest=lambda: 12.0)
    assert [q.numbers is None for q in found] == [False, True, False]
    assert not found[1].values.any()
    one = [0, 2]
    expected = score_best(
        states[one], matrix, [retrieved[i] for i in one], CONTINUOUS, 4, longest=lambda: 12.0
    )
    assert [found[i].best(4) for i in one] == [q.best(4) for q in expected]


@pytest.mark.parametrize(("of_states", "of_chunks"), [(1, 1e-24), (1e-24, 1), (1e-20, 1e-20)])
@pytest.mark.parametrize("mode", ["none", "relative"])
def test_lengths_whose_squares_float32_cannot_hold(mode, of_states, of_chunks):
    random = np.random.default_rng(0)
    states = (random.normal(size=(20, 64)) * of_states).astype(np.float32)
    vectors = StoredVectors((random.normal(size=(20_000, 64)) * of_chunks).astype(np.float32))
    retrieved, scheme = [[number] for number in range(20)], PositionScheme(mode)
    arguments = (torch.from_numpy(states), vectors.tensor(), retrieved, scheme)
    with processor(integers=False, halves=True):
        found = score_best(*arguments, 4, longest=vectors.longest)
    assert 0 < vectors.longest() < 20 * of_chunks
    for q, of_all, own in zip(found, score(*arguments).numpy(), retrieved, strict=True):
        of_all[own] = -np.inf
        assert q.without(np.array(own)).best(4) == np.argsort(-of_all)[:4].tolist()


def test_the_longest_row_is_asked_for_only_where_it_is_needed():
    longest = mock.Mock(side_effect=AssertionError)
    few, many = torch.randn(500, 16), torch.randn(20_000, 16)
    for matrix, scheme in (
        (few, CONTINUOUS),
        (many, TRUNCATED),
        (many, PositionScheme("absolute")),
    ):
        score_best(torch.randn(1, 16), matrix, [[3]], scheme, 4, longest=longest)


def test_equal_chunks_come_in_order():
    matrix = torch.eye(16).repeat(1000, 1)
    with processor(integers=False, halves=True):
        (q,) = score_best(
            torch.eye(16)[:1], matrix, [[16]], PositionScheme("none"), 3, longest=lambda: 1.0
        )
    assert q.without(np.array([16])).best(4) == [0, 32, 48, 64]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", [CONTINUOUS, PositionScheme("none")])
def test_a_number_that_is_none_is_not_passed_over(scheme, bad):
    matrix = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
    matrix[777, 3] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        longest = StoredVectors(matrix).longest
    with processor(integers=False, halves=True):
        (q,) = score_best(
            torch.randn(1, 16), torch.from_numpy(matrix), [[]], scheme, 3, longest=longest
        )
    if np.isnan(bad):
        with pytest.raises(QRAGError, match="NaN"):
            q.best(3)
    assert not np.isfinite(q.values[777])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_where_torch_multiplies_float32_in_fewer_bits(precision):
    torch.manual_seed(0)
    states, matrix = torch.randn(3, 64), torch.randn(20_000, 64)
    retrieved = [[], [7], [300, 2]]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = score_best(states, matrix, retrieved, CONTINUOUS, 4, longest=lambda: 12.0)
    finally:
        torch.set_float32_matmul_precision(before)
    expected = oracle(states.numpy(), matrix.numpy(), retrieved, CONTINUOUS)
    assert some_of(found)
    for q, of_all, taken in zip(found, expected, retrieved, strict=True):
        of_all[taken] = -np.inf
        assert q.without(np.array(taken, dtype=int)).best(4) == np.argsort(-of_all)[:4].tolist()


def test_where_torch_does_not_tell_in_how_many_bits_it_multiplies():
    torch.manual_seed(0)
    arguments = (torch.randn(2, 64), torch.randn(20_000, 64), [[5], [1, 2]], CONTINUOUS, 4)
    expected = score_best(*arguments, longest=lambda: 20.0)
    refuse = mock.Mock(side_effect=RuntimeError("a mix of the legacy and new APIs"))
    with mock.patch.object(torch, "get_float32_matmul_precision", refuse):
        found = score_best(*arguments, longest=lambda: 20.0)
    assert [q.best(4) for q in found] == [q.best(4) for q in expected]


def test_inside_autocast():
    torch.manual_seed(0)
    arguments = (torch.randn(2, 16), torch.randn(20_000, 16), [[5], [1, 2]], CONTINUOUS, 4)
    expected = score_best(*arguments, longest=lambda: 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = score_best(*arguments, longest=lambda: 10.0)
    for q, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(q.values, other.values)
        np.testing.assert_array_equal(q.numbers, other.numbers)


def test_q_of_a_chunk_is_the_same_whoever_asks_with_it():
    torch.manual_seed(0)
    states, matrix = torch.randn(5, 64), torch.randn(20_000, 64)
    retrieved = [[number] for number in range(5)]
    together = score_best(states, matrix, retrieved, CONTINUOUS, 4, longest=lambda: 12.0)
    for number, q in enumerate(together):
        one = slice(number, number + 1)
        (alone,) = score_best(
            states[one], matrix, retrieved[one], CONTINUOUS, 4, longest=lambda: 12.0
        )
        assert some_of([alone, q])
        best = q.best(4)
        assert alone.best(4) == best
        assert [alone.of(chunk) for chunk in best] == [q.of(chunk) for chunk in best]


@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, *map(PositionScheme, MODES[:2])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_never_copies_the_corpus(scheme, dtype):
    matrix, _, longest = stored(torch.randn(20_000, 256).numpy(), dtype)
    states = torch.randn(4, 256)
    retrieved = [[7], [1000, 3], [], [5, 6]]
    kind = {"integers": False, "halves": True}
    with Largest(matrix) as largest, going_about_it({"BLOCK": 1 << 18}), processor(**kind):
        score_best(states, matrix, retrieved, scheme, 4, longest=longest)
    assert 0 < largest.bytes < 4 * matrix.numel() * 0.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("scheme", [CONTINUOUS, TRUNCATED, *map(PositionScheme, MODES)])
def test_on_a_gpu(scheme):
    torch.manual_seed(0)
    states, matrix, retrieved = torch.randn(3, 16), torch.randn(20_000, 16), [[], [3], [40, 7]]
    on_gpu, here = (
        score_best(states, where, retrieved, scheme, 4, longest=lambda: 20.0)
        for where in (matrix.cuda(), matrix)
    )
    for q, other in zip(on_gpu, here, strict=True):
        assert q.best(4) == other.best(4)


def test_errors_are_those_of_score():
    with pytest.raises(InvalidInputError, match="do not fit"):
        score_best(torch.randn(2, 8), torch.randn(5, 8), [[]], CONTINUOUS, 3, longest=lambda: 1.0)
    with pytest.raises(InvalidInputError, match="retrieved"):
        score_best(torch.randn(1, 8), torch.randn(5, 8), [[5]], CONTINUOUS, 3, longest=lambda: 1.0)
    many = torch.randn(20_000, 6)
    with pytest.raises(ConfigError, match="multiple of 4"):
        score_best(many[:1], many, [[5]], CONTINUOUS, 3, longest=lambda: 20.0)


def test_without_candidates():
    nothing = np.array([], dtype=np.int64)
    states, matrix = torch.randn(2, 8), torch.randn(5, 8)
    assert score_best(states[:0], matrix, [], CONTINUOUS, 3, longest=lambda: 9.0) == []
    found = score_best(states, matrix, [[], []], CONTINUOUS, 3, longest=lambda: 9.0, rows=nothing)
    assert [q.best(3) for q in found] == [[], []]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_longest_vector(dtype):
    vectors = np.random.default_rng(0).normal(size=(5000, 16)).astype(np.float32)
    vectors[4321] *= 10
    first, more = (StoredVectors.of(part, dtype) for part in (vectors[:4000], vectors[4000:]))
    true = np.linalg.norm(StoredVectors.of(vectors, dtype).float32().astype(np.float64), axis=1)
    assert true.max() <= StoredVectors.of(vectors, dtype).longest() <= 1.001 * true.max()
    assert true[:4000].max() <= first.longest() <= 1.001 * true[:4000].max()
    assert true.max() <= first.extended(more).longest() <= 1.001 * true.max()
    assert true[4000:].max() <= first.replaced(list(range(1000)), more).longest()
    assert 1.001 * true[[3, 5]].max() >= first.take([3, 5]).longest() >= true[[3, 5]].max()
    assert StoredVectors.of(vectors[:0], dtype).longest() == 0


def test_bfloat16_needs_a_processor_that_adds_up_in_float32():
    products._multiplies_bfloat16.cache_clear()
    supported = mock.Mock(return_value=True)
    with mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", supported, create=True):
        assert products._multiplies_bfloat16() == torch.backends.mkldnn.is_available()
        products._multiplies_bfloat16.cache_clear()
        halves = mock.Mock(return_value=torch.tensor([256.0]))
        with mock.patch.object(torch.Tensor, "__matmul__", halves):
            assert not products._multiplies_bfloat16()
    products._multiplies_bfloat16.cache_clear()
