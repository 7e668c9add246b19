from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from qrag_retriever import candidate_rows, quantized
from qrag_retriever.positions import PositionScheme
from qrag_retriever.quantized import QuantizedRows, in_parts, multiplies_integers
from qrag_retriever.scoring import score


def processor(capability: str) -> mock._patch:
    return mock.patch.object(torch.backends.cpu, "get_cpu_capability", return_value=capability)


@pytest.fixture(autouse=True)
def a_processor_that_multiplies_integers():
    multiplies_integers.cache_clear()
    with processor("AVX512"):
        yield
    multiplies_integers.cache_clear()


def rows(count: int, d: int) -> QuantizedRows:
    torch.manual_seed(count)
    return QuantizedRows(
        torch.randint(-127, 128, (count, d), dtype=torch.int8), torch.rand(count) / 127
    )


@pytest.mark.parametrize("fine", [1, 2])
def test_products_in_integers(fine, monkeypatch):
    monkeypatch.setattr(quantized, "_FINE", fine)
    matrix, edges = rows(37, 16), np.array([0, 5, 6, 37])
    vectors = torch.randn(5, 2, 16)  # of two states, which have two and three runs
    vectors[2:] *= 1000
    vectors[:2, 0] = 0
    runs = torch.tensor([[0, 2], [1, 3], [1, 4]])  # in each stretch
    parts, steps = in_parts(vectors, [2, 3])
    found = matrix.products(edges, parts[runs], steps)
    assert found.shape == (37, 2, 2)
    largest = [of_state.abs().amax(dim=(0, 2)) for of_state in (vectors[:2], vectors[2:])]
    whole = matrix.values.double() * matrix.scales.double()[:, None]
    for row in range(37):
        stretch = int(np.searchsorted(edges, row, side="right")) - 1
        for node, state in ((0, 0), (0, 1), (1, 0), (1, 1)):
            vector = vectors[runs[stretch, state], node].double()
            error = abs(float(found[row, node, state]) - float(whole[row] @ vector))
            of_bits = (2**-16 if node < fine else 2**-8) * largest[state][node]
            of_bits *= whole[row].abs().sum()
            of_float32 = 1e-6 * vector.norm() * whole[row].norm()
            assert error <= float(1.01 * of_bits + of_float32)


@pytest.mark.parametrize("retrieved", [[], [7, 30_000, 59_000]])
def test_terms_of_8_bits_lose_less_than_rows_of_8_bits(retrieved):
    torch.manual_seed(0)
    exact, state = torch.randn(60_000, 64), torch.randn(1, 64)
    scales = exact.abs().amax(dim=1) / 127
    matrix = QuantizedRows((exact / scales[:, None]).round().to(torch.int8), scales)
    scheme = PositionScheme("relative", span=1.0, step=1.5)
    of_rows, wanted = (score(state, a, [retrieved], scheme) for a in (matrix.float(), exact))
    found = score(state, matrix, [retrieved], scheme)
    lost = (of_rows - wanted).abs()
    assert (found - of_rows).abs().mean() < 0.1 * lost.mean()
    assert (found - of_rows).abs().max() < 0.2 * lost.max()


@pytest.mark.parametrize(
    "broken",
    [
        mock.Mock(side_effect=RuntimeError("not on this processor")),
        lambda a, b: (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1).int(),  # it saturates
    ],
)
def test_a_product_that_fails_or_saturates_is_not_used(broken):
    matrix, states = rows(5000, 32), torch.randn(2, 32)
    arguments = (states, matrix, [[7], [1, 9]], PositionScheme("relative"))
    expected = score(*arguments)
    multiplies_integers.cache_clear()
    with mock.patch.object(torch, "_int_mm", broken):
        assert not multiplies_integers()
        q = score(*arguments)
    bound = 3e-5 * float(states.norm(dim=1).max() * matrix.float().norm(dim=1).max())
    torch.testing.assert_close(q, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2"])
def test_rows_are_converted_where_integers_take_longer(capability):
    matrix, states = rows(5000, 32), torch.randn(2, 32)
    arguments = (states, matrix, [[7], [1, 9]], PositionScheme("relative"))
    integers = mock.Mock(side_effect=AssertionError)
    with processor(capability), mock.patch.object(QuantizedRows, "products", integers):
        q = score(*arguments)
    expected = score(states, matrix.float(), *arguments[2:])
    torch.testing.assert_close(q, expected, atol=1e-4, rtol=1e-5)


def test_the_corpus_is_never_converted_as_a_whole():
    matrix, most = rows(30_000, 64), []
    convert = QuantizedRows.float

    def record(self: QuantizedRows, out: torch.Tensor | None = None) -> torch.Tensor:
        most.append(len(self))
        return convert(self, out)

    schemes = [PositionScheme("none"), PositionScheme("relative"), PositionScheme("absolute")]
    for integers in (True, False):
        with (
            mock.patch.object(QuantizedRows, "float", record),
            mock.patch.object(candidate_rows, "BLOCK", 1 << 17),
            mock.patch.object(candidate_rows, "multiplies_integers", return_value=integers),
        ):
            for scheme in schemes:
                score(torch.randn(1, 64), matrix, [[]], scheme)
    assert 0 < max(most) <= (1 << 17) // 64


def test_no_candidates():
    nothing = np.array([], dtype=np.int64)
    for mode in ("none", "relative", "absolute"):
        arguments = (torch.randn(2, 16), rows(9, 16), [[], []], PositionScheme(mode))
        assert score(*arguments, rows=nothing).shape == (2, 0)
