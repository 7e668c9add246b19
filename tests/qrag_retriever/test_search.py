"""Search against brute force over all trajectories of small Q tables."""

from __future__ import annotations

import itertools
import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrag_retriever.errors import InvalidInputError, QRAGError
from qrag_retriever.q_values import best_actions
from qrag_retriever.search import Search, SearchOptions


def q_table(seed: int, n: int, *, by_set: bool):
    """A Q function: depends on the set (document order) or on the order of what was retrieved."""

    def q_values(retrieved: tuple[int, ...]) -> np.ndarray:
        key = tuple(sorted(retrieved)) if by_set else retrieved
        random = np.random.default_rng(zlib.crc32(repr((seed, key)).encode()))
        return random.normal(size=n).astype(np.float32)

    return q_values


def run(n, options, q_values, excluded=(), keep=False, alpha=0.05) -> Search:
    search = Search(n, options, excluded, keep_q_values=keep, alpha=alpha)
    while not search.done:
        search.advance(np.stack([q_values(state) for state in search.states]))
    return search


def greedy(n, k, q_values, excluded=(), threshold=-math.inf) -> list[tuple[int, float]]:
    taken: list[tuple[int, float]] = []
    while len(taken) < k:
        q = q_values(tuple(index for index, _ in taken))
        free = [i for i in range(n) if i not in excluded and i not in [j for j, _ in taken]]
        if not free:
            break
        best = max(free, key=lambda i: (q[i], -i))
        if q[best] < threshold:
            break
        taken.append((best, float(q[best])))
    return taken


@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 8),
    k=st.integers(1, 10),
    threshold=st.one_of(st.none(), st.floats(-1, 2)),
    excluded=st.sets(st.integers(0, 7), max_size=3),
)
def test_greedy_is_the_argmax_of_every_step(seed, n, k, threshold, excluded):
    excluded = {index for index in excluded if index < n}
    q_values = q_table(seed, n, by_set=False)
    search = run(n, SearchOptions(k=k, q_threshold=threshold), q_values, excluded)
    expected = greedy(n, k, q_values, excluded, -math.inf if threshold is None else threshold)
    assert [(pick.index, pick.q_value) for pick in search.best.picks] == expected
    assert [pick.step for pick in search.best.picks] == list(range(1, len(expected) + 1))
    if len(expected) == k:
        assert search.best.stopped == "budget"
    elif len(expected) == n - len(excluded):
        assert search.best.stopped == "exhausted"
    else:
        assert search.best.stopped == "threshold"


def log_policies(n, k, q_values, alpha, threshold, order=()) -> dict[tuple[int, ...], float]:
    """Log-probability of every trajectory under the soft policy; to stop is an action too."""
    if len(order) == k:
        return {order: 0.0}
    q = q_values(order).astype(np.float64)
    free = [i for i in range(n) if i not in order]
    worth = [q[i] for i in free] + ([] if threshold is None else [threshold])
    log_sum = float(np.logaddexp.reduce(np.array(worth) / alpha))
    if threshold is not None and max(q[i] for i in free) < threshold:
        return {order: threshold / alpha - log_sum}
    return {
        path: q[i] / alpha - log_sum + rest
        for i in free
        if threshold is None or q[i] >= threshold
        for path, rest in log_policies(n, k, q_values, alpha, threshold, (*order, i)).items()
    }


@given(
    seed=st.integers(0, 999),
    n=st.integers(2, 5),
    k=st.integers(1, 3),
    alpha=st.sampled_from([0.05, 0.3, 2.0]),
    threshold=st.one_of(st.none(), st.floats(-1, 1.5)),
    by_set=st.booleans(),
)
def test_a_wide_beam_finds_the_most_probable_trajectory(seed, n, k, alpha, threshold, by_set):
    q_values = q_table(seed, n, by_set=by_set)
    expected = log_policies(n, min(k, n), q_values, alpha, threshold)
    options = SearchOptions(k=k, beams=200, q_threshold=threshold)
    best = run(n, options, q_values, alpha=alpha).best
    if best.retrieved == ():  # the only one
        assert set(expected) == {()}
        return
    assert best.log_probability == pytest.approx(expected[best.retrieved], abs=1e-4)
    if by_set:  # orders of one set share their future, so merging them loses nothing
        assert best.log_probability == pytest.approx(max(expected.values()), abs=1e-4)


def test_beams_do_not_follow_q_that_stays_high_because_nothing_was_found():
    table = {(): [0.6, 0.5, 0.1], (0,): [0, 0.1, 0.05], (1,): [0.5, 0, 0.55], (2,): [0, 0, 0]}
    search = run(3, SearchOptions(k=2, beams=3), lambda state: np.array(table[state], np.float32))
    assert search.best.retrieved == (0, 1)  # by mean Q: (1, 2)


def test_the_policy_chooses_among_the_five_best():
    q = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], dtype=np.float32)
    best = run(7, SearchOptions(k=1, beams=2), lambda _: q, alpha=0.1).best
    expected = 5 - math.log(sum(map(math.exp, [5, 4, 3, 2, 1])))
    assert best.log_probability == pytest.approx(expected, abs=1e-5)


def test_several_chunks_at_once_are_as_probable_as_one_after_the_other():
    q = np.array([0.5, 0.4, 0.3, 0.2], dtype=np.float32)
    at_once = run(4, SearchOptions(k=3, beams=2, chunks_per_step=3), lambda _: q)
    in_turn = run(4, SearchOptions(k=3, beams=2), lambda _: q)
    assert at_once.best.retrieved == in_turn.best.retrieved == (0, 1, 2)
    assert at_once.best.log_probability == pytest.approx(in_turn.best.log_probability)


def all_beams(n, k, q_values, alpha, threshold, beams) -> tuple[tuple[int, ...], float]:
    """The best of a beam search that follows every beam to its end."""
    going: list[tuple[float, tuple[int, ...], bool]] = [(0.0, (), False)]
    while not all(ended for _, _, ended in going):
        pool = []
        for score, order, ended in going:
            if ended:
                pool.append((score, order, True))
                continue
            q = q_values(order).astype(np.float64)
            free = sorted(set(range(n)) - set(order), key=lambda i, q=q: (-q[i], i))
            rivals = free[: max(beams, 5)]
            worth = [q[i] for i in rivals] + ([] if threshold is None else [threshold])
            log_sum = float(np.logaddexp.reduce(np.array(worth) / alpha))
            good = [i for i in rivals[:beams] if threshold is None or q[i] >= threshold]
            if not good:
                stops = threshold / alpha - log_sum if order else 0.0
                pool.append((score + stops, order, True))
            for i in good:
                own = (*order, i)
                pool.append((score + q[i] / alpha - log_sum, own, len(own) == min(k, n)))
        pool.sort(key=lambda beam: -beam[0])
        sets = {frozenset(order): beam for beam in reversed(pool) for order in [beam[1]]}
        going = [beam for beam in pool if sets[frozenset(beam[1])] is beam][:beams]
    return going[0][1], going[0][0]


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 9),
    k=st.integers(1, 5),
    beams=st.integers(2, 5),
    alpha=st.sampled_from([0.02, 0.2, 0.6, 2.0]),
    threshold=st.one_of(st.none(), st.floats(-1, 1.5)),
    by_set=st.booleans(),
)
def test_beams_that_are_dropped_change_nothing(seed, n, k, beams, alpha, threshold, by_set):
    q_values = q_table(seed, n, by_set=by_set)
    options = SearchOptions(k=k, beams=beams, q_threshold=threshold)
    best = run(n, options, q_values, alpha=alpha).best
    order, score = all_beams(n, k, q_values, alpha, threshold, beams)
    assert best.retrieved == order
    assert best.log_probability == pytest.approx(score, abs=1e-4)


def test_beams_that_cannot_lead_any_more_are_dropped():
    search = Search(9, SearchOptions(k=3, beams=5), alpha=0.1)
    search.advance(np.arange(9, dtype=np.float32)[None] / 100)
    assert len(search.states) == 5
    sure, unsure = np.array([[9] + 8 * [0], 9 * [0]], dtype=np.float32)
    search.advance([sure if state == (8,) else unsure for state in search.states])
    assert search.states == [(8, 0)]


@pytest.mark.parametrize(("threshold", "rivals"), [(None, 5), (0.0, 6)])
@pytest.mark.parametrize(("ahead", "expected"), [(1e-3, (0, 2, 10, 11)), (-1e-3, (0, 1, 2, 3))])
def test_a_beam_may_be_overtaken_by_as_much_as_all_that_is_to_come(
    threshold, rivals, ahead, expected
):
    options = SearchOptions(k=4, beams=2, chunks_per_step=2, q_threshold=threshold)
    search = Search(30, options, alpha=1.0)
    q, unsure, sure = np.zeros((3, 30), dtype=np.float32)
    q[:] = -50
    q[:3] = 60, 30, 30 - 2 * math.log(rivals) + ahead
    search.advance([q])
    sure[10:12] = 100, 50
    search.advance([unsure if state == (0, 1) else sure for state in search.states])
    assert search.best.retrieved == expected


def test_a_search_ends_when_the_leading_beam_does():
    table = {(): [0.9, 0.8, 0.1], (0,): [0.0, 0.1, 0.0], (1,): [0.0, 0.0, 0.7]}
    search = Search(3, SearchOptions(k=3, beams=2, q_threshold=0.5))
    for _ in range(2):
        search.advance(np.array([table[state] for state in search.states], dtype=np.float32))
    assert search.done
    assert (search.best.retrieved, search.best.stopped) == ((0,), "threshold")


@given(seed=st.integers(0, 999), beams=st.integers(1, 4), n=st.integers(1, 7))
def test_no_two_beams_hold_the_same_set(seed, beams, n):
    search = Search(n, SearchOptions(k=4, beams=beams))
    q_values = q_table(seed, n, by_set=False)
    while not search.done:
        search.advance(np.stack([q_values(state) for state in search.states]))
        sets = [frozenset(state) for state in search.states]
        assert len(set(sets)) == len(sets) <= beams


@given(seed=st.integers(0, 999), n=st.integers(1, 9), chunks=st.integers(1, 4), k=st.integers(1, 9))
def test_several_chunks_a_step_are_the_best_of_that_state(seed, n, chunks, k):
    q_values = q_table(seed, n, by_set=False)
    search = run(n, SearchOptions(k=k, chunks_per_step=chunks), q_values)
    before: list[int] = []
    by_step = itertools.groupby(search.best.picks, key=lambda pick: pick.step)
    for _, picks in by_step:
        q = q_values(tuple(before))
        free = sorted(set(range(n)) - set(before), key=lambda i: (-q[i], i))
        taken = [pick.index for pick in picks]
        assert taken == free[: min(chunks, k - len(before))]
        before.extend(taken)
    assert len(before) == min(k, n)


def test_chunks_below_the_threshold_are_left_out_when_several_are_taken():
    q = np.array([[0.9, 0.5, 0.1]], dtype=np.float32)
    search = Search(3, SearchOptions(k=3, chunks_per_step=3, q_threshold=0.3))
    search.advance(q)
    assert (search.best.retrieved, search.best.stopped) == ((0, 1), "threshold")


def test_a_beam_that_stops_early_competes():
    table = {(): [0.9, 0.8], (0,): [0.0, 0.1], (1,): [0.7, 0.0]}
    search = Search(2, SearchOptions(k=2, beams=2, q_threshold=0.5))
    while not search.done:
        search.advance(np.array([table[state] for state in search.states], dtype=np.float32))
    assert search.best.retrieved == (0,)
    assert search.best.stopped == "threshold"


@pytest.mark.filterwarnings("error")
def test_beams_may_stop_before_the_first_chunk():
    q = np.array([0.3, 0.2], dtype=np.float32)
    for threshold in (0.5, math.inf):
        best = run(2, SearchOptions(k=2, beams=3, q_threshold=threshold), lambda _: q).best
        assert (best.retrieved, best.stopped) == ((), "threshold")


def test_runners_up_are_the_next_best():
    search = run(4, SearchOptions(k=1, runners_up=2), lambda _: np.array([3, 1, 2, 0], np.float32))
    assert search.best.picks[0].runners_up == ((2, 2.0), (1, 1.0))


def test_q_values_are_kept_for_every_step():
    search = run(3, SearchOptions(k=2), lambda _: np.array([3, 1, 2], np.float32), keep=True)
    np.testing.assert_array_equal(search.best.q_values, [[3, 1, 2], [-np.inf, 1, 2]])


def test_sampling_follows_the_soft_policy():
    q = np.array([0.0, 1.0, 2.0], dtype=np.float32)
    draws = 4000
    counts = np.zeros(3)
    for seed in range(draws):
        search = run(3, SearchOptions(k=1, temperature=0.7, seed=seed), lambda _: q)
        counts[search.best.retrieved[0]] += 1
    expected = np.exp(q / 0.7) / np.exp(q / 0.7).sum()
    # five standard deviations
    assert np.all(np.abs(counts / draws - expected) < 5 * np.sqrt(expected / draws))


@given(seed=st.integers(0, 99))
@settings(max_examples=20)
def test_sampling_is_seeded_and_never_repeats_a_chunk(seed):
    options = SearchOptions(k=5, temperature=1.0, seed=seed, chunks_per_step=2)
    first = run(6, options, q_table(seed, 6, by_set=False)).best
    assert first == run(6, options, q_table(seed, 6, by_set=False)).best
    assert len(set(first.retrieved)) == 5


def test_nothing_to_choose_from():
    assert Search(0, SearchOptions(k=2)).best.stopped == "exhausted"
    assert Search(2, SearchOptions(k=2), excluded=[0, 1]).done


def test_unknown_q_is_never_taken():
    q = np.array([[-np.inf, 0.5, -np.inf]], dtype=np.float32)
    search = Search(3, SearchOptions(k=3))
    search.advance(q)
    search.advance(q)
    assert (search.best.retrieved, search.best.stopped) == ((1,), "exhausted")


def test_candidates_that_are_seen_on_the_way():
    search = Search(None, SearchOptions(k=4))
    for q in ([0.5], [0.9, 0.8, -np.inf], [-np.inf, 0.1, 0.4], [-np.inf] * 5):
        search.advance(np.array([q], dtype=np.float32))
    assert (search.best.retrieved, search.best.stopped) == ((0, 1, 2), "exhausted")
    assert search.done
    nothing = Search(None, SearchOptions(k=4))
    nothing.advance(np.empty((1, 0), dtype=np.float32))
    assert (nothing.best.retrieved, nothing.best.stopped) == ((), "exhausted")


def test_equal_q_goes_to_the_first():
    assert best_actions(np.array([1, 2, 2, 2], dtype=np.float32), 2) == [1, 2]


def test_nan_is_refused():
    with pytest.raises(QRAGError, match="NaN"):
        best_actions(np.array([1.0, np.nan], dtype=np.float32), 1)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 1.5}, "k=1.5"),
        ({"k": True}, "k=True"),
        ({"k": 1, "beams": 0}, "beams=0"),
        ({"k": 1, "seed": -1}, "seed=-1"),
        ({"k": 1, "seed": "a"}, "seed='a'"),
        ({"k": 1, "chunks_per_step": 0}, "chunks_per_step=0"),
        ({"k": 1, "runners_up": -1}, "runners_up=-1"),
        ({"k": 1, "q_threshold": math.nan}, "q_threshold=nan"),
        ({"k": 1, "q_threshold": "high"}, "q_threshold='high'"),
        ({"k": 1, "q_threshold": True}, "q_threshold=True"),
        ({"k": 1, "temperature": True}, "temperature=True"),
        ({"k": 1, "temperature": 0.0}, "temperature=0.0"),
        ({"k": 1, "temperature": 1.0, "beams": 2}, "exclude each other"),
    ],
)
def test_settings_out_of_range(settings_, message):
    with pytest.raises(InvalidInputError, match=message):
        SearchOptions(**settings_)


def test_where_nobody_counted_the_candidates_the_end_of_them_is_no_threshold():
    search = Search(None, SearchOptions(k=5, chunks_per_step=4))
    search.advance(np.array([[0.3, 0.1, 0.2]], dtype=np.float32))
    assert search.best.retrieved == (0, 2, 1)
    assert search.best.stopped == "exhausted"
    search = Search(None, SearchOptions(k=5, chunks_per_step=4, q_threshold=0.15))
    search.advance(np.array([[0.3, 0.1, 0.2]], dtype=np.float32))
    assert (search.best.retrieved, search.best.stopped) == ((0, 2), "threshold")


def test_nothing_below_the_threshold_is_drawn():
    q = np.array([0.9, 0.1, 0.8, 0.2], dtype=np.float32)
    for seed in range(20):
        options = SearchOptions(
            k=3, temperature=10.0, seed=seed, q_threshold=0.5, chunks_per_step=3
        )
        best = run(4, options, lambda _: q).best
        assert sorted(best.retrieved) == [0, 2]
        assert best.stopped == "threshold"


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-8])
def test_next_to_no_temperature_takes_the_best(temperature):
    q = {(): [-0.5, -0.2, -0.9], (1,): [-0.5, -0.2, -0.9]}
    options = SearchOptions(k=2, temperature=temperature, seed=0)
    search = run(3, options, lambda state: np.array(q[state], dtype=np.float32))
    assert search.best.retrieved == (1, 0)


def test_an_endless_temperature_draws_evenly():
    counts = np.zeros(3)
    for seed in range(300):
        options = SearchOptions(k=1, temperature=math.inf, seed=seed)
        search = run(3, options, lambda _: np.array([-9, 0, 9], dtype=np.float32))
        counts[search.best.retrieved[0]] += 1
    assert counts.min() > 60
    whole = run(3, SearchOptions(k=3, temperature=math.inf, seed=0), lambda _: np.zeros(3, "f4"))
    assert sorted(whole.best.retrieved) == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"k": 2, "q_threshold": 0.5}, {0}),
        ({"k": 3, "chunks_per_step": 3, "q_threshold": 0.25}, {0, 1}),
        ({"k": 2, "chunks_per_step": 2, "q_threshold": 0.25, "temperature": 1.0}, {0, 1}),
    ],
)
def test_q_equal_to_the_threshold_is_enough(settings: Any, taken: set[int]) -> None:
    search = Search(3, SearchOptions(**settings))
    search.advance(np.array([[0.5, 0.25, 0.125]], dtype=np.float32))
    assert set(search.best.retrieved) == taken


def test_the_first_step_begins_as_many_beams_as_asked_for() -> None:
    search = Search(9, SearchOptions(k=3, beams=5, runners_up=0))
    search.advance(np.arange(9, dtype=np.float32)[None] / 1000)
    assert len(search.states) == 5
