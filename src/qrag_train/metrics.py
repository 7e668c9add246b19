"""Measures of retrieved chunks and of answers (METHOD §5)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from qrag_retriever.errors import InvalidInputError


class FactScores(NamedTuple):
    """How the retrieved chunks P compare with the support F*.

    Attributes:
        em: Fact-EM: 1 if F* ⊆ P, else 0; chunks beyond the support do no harm.
        precision: |F* ∩ P| / |P|, 0 if nothing was retrieved.
        recall: |F* ∩ P| / |F*|.
        f1: Harmonic mean of precision and recall.
    """

    em: float
    precision: float
    recall: float
    f1: float


def fact_scores(retrieved: Iterable[int], support: Iterable[int]) -> FactScores:
    """Compare the retrieved chunks with the support.

    Args:
        retrieved: Indices of the retrieved chunks P.
        support: Indices of the support chunks F*, at least one.

    Raises:
        InvalidInputError: If there is no support.

    Example:
        >>> fact_scores([4, 1, 9, 7], support=[1, 4])
        FactScores(em=1.0, precision=0.5, recall=1.0, f1=0.666...)
    """
    chunks, facts = set(retrieved), _facts(support)
    hits = len(chunks & facts)
    precision = hits / len(chunks) if chunks else 0.0
    recall = hits / len(facts)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return FactScores(float(hits == len(facts)), precision, recall, f1)


def recall_at(k: int, retrieved: Sequence[int], support: Iterable[int]) -> float:
    """Recall after the first ``k`` steps: |F* ∩ first k| / |F*|.

    Example:
        >>> recall_at(1, [4, 1, 9], support=[1, 4])
        0.5
    """
    return fact_scores(retrieved[:k], support).recall


def completion_step(retrieved: Sequence[int], support: Iterable[int]) -> int | None:
    """Number of steps after which the support was complete; ``None`` if it never was.

    Example:
        >>> completion_step([4, 9, 1, 7], support=[1, 4])
        3
    """
    missing = _facts(support)
    for step, chunk in enumerate(retrieved, start=1):
        missing.discard(chunk)
        if not missing:
            return step
    return None


Stop = Literal["early", "perfect", "late", "missed"]


def stop_kind(stopped_after: int, retrieved: Sequence[int], support: Iterable[int]) -> Stop:
    """Whether an episode stopped at the right step (paper App. B).

    Args:
        stopped_after: Number of chunks retrieved before the stopping rule applied.
        retrieved: Chunks in the order of the whole budget, also those past the stop.
        support: Indices of the support chunks.

    Returns:
        ``"perfect"`` if it stopped at the step that completed the support, ``"early"`` before,
        ``"late"`` after; ``"missed"`` if the whole budget does not complete it.

    Example:
        >>> [stop_kind(n, [4, 1, 9], support=[1, 4]) for n in (1, 2, 3)]
        ['early', 'perfect', 'late']
    """
    complete = completion_step(retrieved, support)
    if complete is None:
        return "missed"
    if stopped_after == complete:
        return "perfect"
    return "early" if stopped_after < complete else "late"


def stop_rates(kinds: Collection[Stop]) -> dict[str, float]:
    """Shares of early, perfect and late stops among the episodes that could stop perfectly.

    Example:
        >>> stop_rates(["early", "perfect", "perfect", "late", "missed"])
        {'early': 0.25, 'perfect': 0.5, 'late': 0.25}
    """
    counts = Counter(kinds)
    total = len(kinds) - counts["missed"]
    names: tuple[Stop, ...] = ("early", "perfect", "late")
    return {name: counts[name] / total if total else 0.0 for name in names}


def retrieval_metrics(
    retrieved: Sequence[Sequence[int]],
    supports: Sequence[Iterable[int]],
    *,
    gamma: float = 0.99,
    ks: Sequence[int] = (),
) -> dict[str, float]:
    """Means over questions of all measures of retrieval.

    Args:
        retrieved: For each question the retrieved chunks, in order.
        supports: For each question the support chunks.
        gamma: Discount of ``return``, the sparse reward of 1 at completion.
        ks: Adds ``recall@k`` for each of these k.

    Returns:
        ``fact_em``, ``fact_precision``, ``fact_recall``, ``fact_f1``, ``return``, ``steps`` (number
        of chunks retrieved) and ``recall@k``.

    Raises:
        InvalidInputError: If the two have different lengths, are empty, or a support is empty.

    Example:
        >>> retrieval_metrics([[4, 1]], [[1, 4]], gamma=0.5, ks=[1])
        {'fact_em': 1.0, 'fact_precision': 1.0, 'fact_recall': 1.0, 'fact_f1': 1.0, 'return': 0.5,
        'steps': 2.0, 'recall@1': 0.5}
    """
    if len(retrieved) != len(supports) or not retrieved:
        raise InvalidInputError(
            f"{len(retrieved)} lists of retrieved chunks and {len(supports)} supports; give one of "
            "each per question, and at least one question."
        )
    rows: list[dict[str, float]] = []
    for chunks, support in zip(retrieved, supports, strict=True):
        facts = _facts(support)
        complete = completion_step(chunks, facts)
        rows.append(
            {f"fact_{name}": v for name, v in fact_scores(chunks, facts)._asdict().items()}
            | {"return": gamma ** (complete - 1) if complete else 0.0, "steps": float(len(chunks))}
            | {f"recall@{k}": recall_at(k, chunks, facts) for k in ks}
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces.

    Example:
        >>> normalize_answer("The  Eiffel-Tower, (Paris)!")
        'eiffeltower paris'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_em(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction equals one of the answers in normal form, else 0.

    Example:
        >>> answer_em("The garden.", ["garden", "yard"])
        1.0
    """
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def answer_f1(prediction: str, answers: Iterable[str]) -> float:
    """Best F1 of the prediction's words against one of the answers, both in normal form.

    As SQuAD's; HotpotQA's own is 0 where one of both is yes, no or noanswer and the other is not.

    Example:
        >>> answer_f1("the old garden", ["garden"])
        0.666...
    """
    return max((_word_f1(prediction, answer) for answer in answers), default=0.0)


def _word_f1(prediction: str, answer: str) -> float:
    given, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def _facts(support: Iterable[int]) -> set[int]:
    facts = set(support)
    if not facts:
        raise InvalidInputError("A question without support cannot be scored; give its support.")
    return facts
