from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.errors import InvalidInputError
from qrag_train import metrics

orders = st.permutations(range(7)).flatmap(lambda p: st.integers(0, 7).map(lambda n: list(p[:n])))
supports = st.sets(st.integers(0, 6), min_size=1, max_size=4)


@given(orders, supports)
def test_fact_scores_by_counting(order, support):
    scores = metrics.fact_scores(order, support)
    true_positive = sum(chunk in support for chunk in order)
    false_positive = len(order) - true_positive
    false_negative = len(support) - true_positive
    assert scores.em == (false_negative == 0)
    assert scores.recall == true_positive / len(support)
    assert scores.precision == (true_positive / len(order) if order else 0)
    assert math.isclose(
        scores.f1, 2 * true_positive / (2 * true_positive + false_positive + false_negative)
    )


@given(orders, supports)
def test_completion_step_and_recall_at_k(order, support):
    recalls = [metrics.recall_at(k, order, support) for k in range(len(order) + 1)]
    assert recalls == sorted(recalls)
    complete = [k for k, recall in enumerate(recalls) if recall == 1]
    assert metrics.completion_step(order, support) == (complete[0] if complete else None)


@given(orders, supports, st.integers(0, 7))
def test_stop_kinds(order, support, stop):
    kind = metrics.stop_kind(stop, order, support)
    if not support <= set(order):
        assert kind == "missed"
    elif not support <= set(order[:stop]):
        assert kind == "early"
    else:
        assert kind == ("perfect" if stop > 0 and not support <= set(order[: stop - 1]) else "late")


def test_stop_rates_are_of_the_episodes_that_could_stop_perfectly():
    rates = metrics.stop_rates(["early", "late", "late", "perfect", "missed", "missed"])
    assert rates == {"early": 0.25, "perfect": 0.25, "late": 0.5}
    assert metrics.stop_rates(["missed"]) == {"early": 0, "perfect": 0, "late": 0}


@given(st.lists(st.tuples(orders, supports), min_size=1, max_size=5), st.floats(0.1, 1))
def test_retrieval_metrics_are_means(questions, gamma):
    retrieved, wanted = zip(*questions, strict=True)
    means = metrics.retrieval_metrics(retrieved, wanted, gamma=gamma, ks=(2,))
    scores = [metrics.fact_scores(*question) for question in questions]
    n = len(questions)
    assert math.isclose(means["fact_em"], sum(s.em for s in scores) / n)
    assert math.isclose(means["fact_f1"], sum(s.f1 for s in scores) / n)
    assert math.isclose(means["fact_precision"], sum(s.precision for s in scores) / n)
    assert math.isclose(means["fact_recall"], sum(s.recall for s in scores) / n)
    assert math.isclose(means["steps"], sum(map(len, retrieved)) / n)
    assert math.isclose(
        means["recall@2"], sum(len(set(o[:2]) & s) / len(s) for o, s in questions) / n
    )
    rewards = [
        [float(s <= set(o[: t + 1]) and not s <= set(o[:t])) for t in range(len(o))]
        for o, s in questions
    ]
    returns = [sum(r * gamma**t for t, r in enumerate(episode)) for episode in rewards]
    assert math.isclose(means["return"], sum(returns) / n, abs_tol=1e-12)


def test_supports_may_be_read_once_only():
    means = metrics.retrieval_metrics([[1, 2]], [iter([1, 2])], ks=(1, 2))
    assert (means["fact_em"], means["recall@1"], means["recall@2"]) == (1, 0.5, 1)


def test_what_cannot_be_scored():
    with pytest.raises(InvalidInputError, match="without support"):
        metrics.fact_scores([1], [])
    for retrieved, wanted in (([], []), ([[1]], [])):
        with pytest.raises(InvalidInputError, match="one of each per question"):
            metrics.retrieval_metrics(retrieved, wanted)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("eiffel tower in paris", ["the Eiffel Tower"], 0, 2 / 3),
        ("a cat, a dog", ["dog"], 0, 2 / 3),  # articles go
        ("theatre", ["atre"], 0, 0),  # but not inside words
        ("north-east", ["northeast"], 1, 1),
        ("red red blue", ["red blue blue"], 0, 2 / 3),
        ("york", ["London", "New York"], 0, 2 / 3),  # the best of several
        ("the", [""], 1, 1),
        ("", ["x"], 0, 0),
        ("x", [], 0, 0),
    ],
)
def test_answers(prediction, answers, em, f1):
    assert metrics.answer_em(prediction, answers) == em
    assert metrics.answer_f1(prediction, answers) == pytest.approx(f1)
