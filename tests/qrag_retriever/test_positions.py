"""Positions against the paper's formula, numpy.linspace and the released code's own values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qrag_retriever.errors import ConfigError, InvalidInputError
from qrag_retriever.positions import PositionScheme

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/reference/relative"


@st.composite
def corpora(draw, most=300):
    """A number of chunks and some of them, as retrieved, in any order."""
    n = draw(st.integers(1, most))
    return n, draw(st.lists(st.integers(0, n - 1), unique=True, max_size=min(n, 40)))


@st.composite
def schemes(draw):
    step = draw(st.sampled_from([10.0, 20.0]) | st.floats(0.5, 30))
    span = draw(st.sampled_from([9.0, 18.0, 1.0]) | st.floats(0.1, 30))
    return PositionScheme("relative", step, span, draw(st.booleans()), draw(st.booleans()))


def equation_6(n, retrieved, delta, ell):
    """Eq. 6, letter by letter: b_0 = 0, b_1 < … < b_k, b_{k+1} = N."""
    b = [0, *sorted(retrieved), n]
    rho = np.empty(n)
    for j in range(len(b) - 1):
        for i in range(b[j], b[j + 1]):
            rho[i] = j * delta + ell * (i - b[j]) / (b[j + 1] - b[j])
    return rho


def with_endpoint(n, retrieved, delta, ell):
    """The released code's spacing, in its float32."""
    b = [0, *sorted(retrieved), n]
    parts = [np.linspace(0, ell, b[j + 1] - b[j]) + j * delta for j in range(len(b) - 1)]
    return np.concatenate(parts).astype(np.float32)


@given(corpora(), st.floats(0.5, 30), st.floats(0.1, 30))
def test_default_is_equation_6(corpus, step, span):
    rho = PositionScheme("relative", step, span).positions(*corpus)
    np.testing.assert_allclose(rho, equation_6(*corpus, step, span), rtol=1e-13, atol=1e-13)


@given(corpora(), st.sampled_from([(20.0, 18.0), (10.0, 9.0), (7.0, 3.0)]))
def test_endpoint_and_truncation_are_the_released_code(corpus, lengths):
    expected = with_endpoint(*corpus, *lengths)
    continuous = PositionScheme("relative", *lengths, endpoint=True)
    truncated = PositionScheme("relative", *lengths, endpoint=True, truncate=True)
    np.testing.assert_array_equal(continuous.positions(*corpus).astype(np.float32), expected)
    np.testing.assert_array_equal(truncated.positions(*corpus), expected.astype(np.int64))


@pytest.mark.skipif(not FIXTURES.exists(), reason="the released code's outputs are not here")
def test_released_values():
    samples = json.loads((FIXTURES / "outputs.json").read_text())
    arrays = np.load(FIXTURES / "outputs.npz")
    continuous = PositionScheme("relative", 20, 18, endpoint=True)
    truncated = PositionScheme("relative", 20, 18, endpoint=True, truncate=True)
    for number, sample in enumerate(samples):
        for t in range(len(sample["action"])):
            corpus = sample["n_chunks"], sample["action"][:t]
            rho = continuous.positions(*corpus).astype(np.float32)
            np.testing.assert_array_equal(rho, arrays[f"{number}/positions"][t])
            cut = truncated.positions(*corpus)
            np.testing.assert_array_equal(cut, arrays[f"{number}/pos_int"][t])


@given(corpora(), schemes(), st.floats(0.05, 3), st.booleans())
def test_runs_describe_every_chunk(corpus, scheme, width, aligned):
    n, retrieved = corpus
    bounds, first, last = scheme.runs(n, retrieved, width, aligned=aligned)
    expected = scheme.positions(n, retrieved)
    assert [scheme.position(n, retrieved, chunk) for chunk in range(n)] == expected.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == n
    lengths = np.diff(bounds)
    assert (lengths > 0).all()
    linear = np.concatenate(list(map(np.linspace, first, last, lengths)))
    if scheme.truncate:
        np.testing.assert_array_equal(first, last)
        np.testing.assert_array_equal(linear, expected)
    else:
        np.testing.assert_allclose(linear, expected, rtol=0, atol=1e-12 * max(1, expected.max()))
        assert (last - first <= width * (1 + 1e-9)).all()


@given(corpora(), st.floats(0.05, 3))
def test_aligned_runs_begin_where_others_do(corpus, width):
    n, retrieved = corpus
    scheme = PositionScheme("relative")
    bounds, first, _ = scheme.runs(n, retrieved, width, aligned=True)
    at_most = 2 * len(scheme.runs(n, retrieved, width).first) + len(retrieved) + 1
    assert len(first) <= at_most
    intervals = zip([0, *sorted(retrieved)], [*sorted(retrieved), n], strict=True)
    for start, end in intervals:
        inside = [bound for bound in bounds.tolist() if start < bound < end]
        if inside:  # all multiples of one power of two
            step = min(bound & -bound for bound in inside)
            assert inside == list(range(start // step * step + step, end, step))


@given(corpora(), schemes(), st.floats(0.05, 3))
@example((80, [1, 57]), PositionScheme("relative", span=0.1, endpoint=True), 0.1)
def test_runs_are_few(corpus, scheme, width):
    n, retrieved = corpus
    bounds, first, _ = scheme.runs(n, retrieved, width)
    # the endpoint may lie at the start of a further piece, also by rounding
    per_interval = np.ceil(scheme.span) if scheme.truncate else np.floor(scheme.span / width + 1e-6)
    per_interval += 1
    assert len(first) <= min(n, per_interval * (len(retrieved) + 1))
    if scheme.truncate:  # nothing is cut without need
        same = np.flatnonzero(np.diff(first) == 0) + 1
        assert set(bounds[same]) <= set(retrieved)


@given(
    st.lists(st.integers(0, 10**12 - 1), unique=True, max_size=300),
    schemes(),
)
def test_runs_of_a_corpus_no_array_can_hold(retrieved, scheme):
    n = 10**12
    bounds, first, last = scheme.runs(n, retrieved)
    assert len(first) <= (len(retrieved) + 1) * (scheme.span + 2)
    assert {0, n, *retrieved} <= set(bounds.tolist())
    if not scheme.truncate:
        return
    b = np.array([0, *sorted(retrieved), n])
    for chunk, before, after in zip(bounds[1:-1], last[:-1], first[1:], strict=True):
        for i, rho in ((chunk - 1, before), (chunk, after)):
            j = np.searchsorted(b[:-1], i, side="right") - 1
            slope = scheme.span / max(b[j + 1] - b[j] - scheme.endpoint, 1)
            assert rho == int(np.float32((i - b[j]) * slope + j * scheme.step))


def test_position_depends_only_on_place_between_the_retrieved():
    """What carries a model to longer documents: stretching the document keeps ρ."""
    scheme = PositionScheme("relative")
    short, long = scheme.positions(40, [10, 20]), scheme.positions(4000, [1000, 2000])
    np.testing.assert_allclose(long[::100], short)


@pytest.mark.parametrize("truncate", [False, True])
def test_modes_without_dependence_on_the_retrieved(truncate):
    absolute = PositionScheme("absolute", truncate=truncate)
    none = PositionScheme("none", truncate=truncate)
    np.testing.assert_array_equal(absolute.positions(7, [3, 5]), np.arange(7))
    np.testing.assert_array_equal(none.positions(7, [3, 5]), np.zeros(7))
    assert [len(runs) for runs in none.runs(7, [3, 5])] == [2, 1, 1]
    bounds, first, last = absolute.runs(7, [3, 5])
    np.testing.assert_array_equal(first, bounds[:-1])
    np.testing.assert_array_equal(last, bounds[1:] - 1)


@pytest.mark.parametrize("endpoint", [False, True])
def test_one_chunk(endpoint):
    scheme = PositionScheme("relative", endpoint=endpoint, truncate=True)
    assert scheme.positions(1).tolist() == [0]
    assert scheme.positions(1, [0]).tolist() == [10]
    assert [x.tolist() for x in scheme.runs(1, [0])] == [[0, 1], [10], [10]]


@pytest.mark.parametrize("retrieved", [[5], [-1], [2, 2]])
@pytest.mark.parametrize("mode", ["relative", "none"])
def test_refuses_chunks_that_cannot_have_been_retrieved(mode, retrieved):
    with pytest.raises(InvalidInputError, match="different numbers from 0 to 4"):
        PositionScheme(mode).runs(5, retrieved)


@pytest.mark.parametrize(
    "setting", [{"mode": "sideways"}, {"step": 0.0}, {"span": float("nan")}, {"span": -1.0}]
)
def test_refuses_settings(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        PositionScheme(**{"mode": "relative", **setting})
