from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.q_values import QValues
from qrag_retriever.search import Search, SearchOptions

numbers = st.integers(2, 40)


@given(numbers, st.integers(0, 2**32 - 1), st.data())
def test_some_are_all_with_the_others_unknown(n, seed, data):
    random = np.random.default_rng(seed)
    q = random.integers(0, 6, n).astype(np.float32)
    known = np.sort(random.permutation(n)[: random.integers(1, n, endpoint=True)])
    some = QValues(q[known], known)
    every = np.full(n, -np.inf, dtype=np.float32)
    every[known] = q[known]
    np.testing.assert_array_equal(some.filled(n), every)
    count = data.draw(st.integers(0, n))
    assert some.best(count) == QValues(every).best(count)
    assert [some.of(number) for number in known] == q[known].tolist()
    left_out = random.permutation(n)[: random.integers(0, n)]
    without = some.without(left_out)
    assert without.best(n) == QValues(every).without(left_out).best(n)
    np.testing.assert_array_equal(some.values, q[known])  # not changed


options = st.builds(
    SearchOptions,
    k=st.integers(1, 6),
    q_threshold=st.none() | st.floats(-1, 1),
    beams=st.integers(1, 4),
    chunks_per_step=st.integers(1, 3),
    runners_up=st.integers(0, 4),
)


@given(numbers, options, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 1), max_size=3))
def test_a_search_needs_no_more_than_the_best_of_each_state(n, options, seed, excluded):
    everything = Search(n, options, excluded)
    the_best = Search(n, options, excluded)
    while not everything.done:
        assert the_best.states == everything.states
        all_q, best_q = [], []
        for state in everything.states:
            q = np.random.default_rng([seed, *state]).normal(size=n).astype(np.float32)
            taken = np.array([*state, *excluded], dtype=np.int64)
            best = np.sort(QValues(q).without(taken).best(options.breadth)).astype(np.int64)
            all_q.append(q)
            best_q.append(QValues(q[best], best))
        everything.advance(all_q)
        the_best.advance(best_q)
    assert the_best.done
    assert the_best.best == everything.best
