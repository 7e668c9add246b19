from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever import shortlist as module
from qrag_retriever.shortlist import shortlist


@given(st.data(), st.integers(0, 2**32 - 1))
def test_whatever_the_error_the_best_are_listed(data, seed):
    random = np.random.default_rng(seed)
    n, states, count = (data.draw(st.integers(1, most)) for most in (60, 3, 5))
    # in quarters, which float32 adds exactly: often equal, and often off by the whole error
    exact = random.integers(0, 8, (n, states)) / 4
    error = random.integers(0, 4, states) / 4
    known = exact + random.integers(-1, 2, (n, states)) * error
    never = [random.permutation(n)[: random.integers(0, n)].tolist() for _ in range(states)]
    excluded = random.permutation(n)[: random.integers(0, 3)].tolist()
    cuts = np.unique([0, n, *random.integers(0, n, 3)])
    blocks = [
        (int(first), torch.tensor(known[first:last], dtype=torch.float32))
        for first, last in itertools.pairwise(cuts)
    ]
    span = data.draw(st.sampled_from([1, 4, 16]))
    with mock.patch.object(module, "_SPAN", span):
        error_of = torch.tensor(error, dtype=torch.float32)
        listed = shortlist(blocks, error_of, count, never, excluded, most=n)
    for state in range(states):
        free = np.setdiff1d(np.arange(n), [*never[state], *excluded])
        least = np.sort(exact[free, state])[::-1][:count].min(initial=np.inf)
        best = free[exact[free, state] >= least]  # and all that equal the last of them
        assert set(best) <= set(listed[state])
        assert set(listed[state]) <= set(free)
        assert (np.diff(listed[state]) > 0).all()
        # nothing that cannot be among them: with one span for each chunk this is known exactly
        if span == 1 and len(free) >= count:
            cut = np.sort(known[free, state])[::-1][count - 1] - 2 * error[state]
            assert set(listed[state]) == set(free[known[free, state] >= cut])


def test_too_many_or_an_unknown_error():
    def listed(error: float, retrieved: list[int], most: int):
        return shortlist(
            [(0, torch.zeros(50, 1))], torch.tensor([float(error)]), 1, [retrieved], [], most
        )

    assert listed(0, [], 49) == [None]
    assert listed(torch.nan, [], 50) == [None]
    (chunks,) = listed(0, [3], 49)
    assert chunks.tolist() == [0, 1, 2, *range(4, 50)]


def test_too_many_for_one_state_are_no_matter_to_others():
    q = torch.stack([torch.zeros(100), torch.arange(100.0)], dim=1)
    blocks = [(0, q[:30].clone()), (30, q[30:].clone())]
    equal, rising = shortlist(blocks, torch.zeros(2), 2, [[], [99]], [98], most=20)
    assert equal is None
    assert {96, 97} <= set(rising) <= set(range(80, 98))


def test_what_later_blocks_rule_out_is_no_longer_listed():
    blocks = [(first, torch.arange(first, first + 10.0)[:, None]) for first in range(0, 1000, 10)]
    (chunks,) = shortlist(blocks, torch.ones(1), 2, [[]], [], most=20)
    assert set(range(996, 1000)) <= set(chunks) <= set(range(950, 1000))
