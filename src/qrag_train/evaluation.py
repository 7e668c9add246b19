"""Retrieval on annotated samples: search many at once, and score what was found."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch

from qrag_retriever.scoring import score
from qrag_retriever.search import Beam, Search, SearchOptions
from qrag_train.environment import in_state_order
from qrag_train.metrics import retrieval_metrics, stop_kind, stop_rates

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from qrag_retriever.model import QRAGModel
    from qrag_train.data.sample import SupportSample

# Chunks whose embeddings are held at once.
_MOST_CHUNKS = 200_000


def search_samples(
    model: QRAGModel, samples: Sequence[SupportSample], options: SearchOptions
) -> list[Beam]:
    """Retrieve for many samples at once, each among its own chunks.

    Args:
        model: The model.
        samples: What to search.
        options: How; the same for all.

    Returns:
        The best trajectory of each sample.
    """
    results: list[Beam] = []
    for group in _groups(samples):
        results += _search_group(model, group, options)
    return results


def hard_negatives(
    model: QRAGModel, questions: Sequence[SupportSample], steps: int, count: int
) -> list[list[int]]:
    """What a model would rather retrieve than the support: its best wrong chunks at each step.

    Args:
        model: The model.
        questions: Questions with their support.
        steps: Retrieval budget T of the search.
        count: Most wrong chunks of a question.

    Returns:
        For each question chunk numbers: those retrieved, then the next best of each step in turn.
    """
    options = SearchOptions(steps, runners_up=count)
    found = []
    for beam, question in zip(search_samples(model, questions, options), questions, strict=True):
        ranks = [[index for index, _ in pick.runners_up] for pick in beam.picks]
        rivals = (index for rank in zip_longest(*ranks) for index in rank if index is not None)
        wrong = dict.fromkeys(i for i in (*beam.retrieved, *rivals) if i not in question.support)
        found.append(list(wrong)[:count])
    return found


def evaluate(
    model: QRAGModel, samples: Sequence[SupportSample], options: SearchOptions
) -> dict[str, float]:
    """Retrieve for all samples and score what was found (METHOD §5).

    Args:
        model: The model.
        samples: Questions with their support.
        options: How to search. With a ``q_threshold`` and one beam the scores also tell how often
            it stopped early, at the right step, or late.

    Returns:
        ``fact_em``, ``fact_f1``, … as `retrieval_metrics`, ``recall@k`` for 1, 2, … up to the
        budget, and perhaps ``stop_early``, ``stop_perfect`` and ``stop_late``.
    """
    whole = options
    if options.beams == 1:  # a threshold only cuts the same trajectory short
        whole = dataclasses.replace(options, q_threshold=None)
    supports = [sample.support for sample in samples]
    beams = search_samples(model, samples, whole)
    paths = [beam.retrieved for beam in beams]
    found = paths
    if whole is not options:
        found = [beam.retrieved[: steps_above(beam, options.q_threshold)] for beam in beams]
    scores = retrieval_metrics(found, supports, ks=range(1, options.k + 1))
    if options.q_threshold is not None and options.beams == 1:
        lengths = [len(chunks) for chunks in found]
        kinds = [stop_kind(*stop) for stop in zip(lengths, paths, supports, strict=True)]
        scores |= {f"stop_{kind}": share for kind, share in stop_rates(kinds).items()}
    return scores


def steps_above(beam: Beam, threshold: float | None) -> int:
    """Steps of a trajectory before the first whose Q lies below a threshold (paper App. B).

    Args:
        beam: A greedy trajectory, one chunk a step.
        threshold: The threshold; ``None``: none is below.
    """
    if threshold is None:
        return len(beam.picks)
    # compared as a search compares them, in float32
    below = (np.float32(pick.q_value) < threshold for pick in beam.picks)
    return next((step for step, stops in enumerate(below) if stops), len(beam.picks))


def _search_group(
    model: QRAGModel, samples: Sequence[SupportSample], options: SearchOptions
) -> list[Beam]:
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(t, len(numbers)) for t in s.chunks] for s in samples]
    vectors = torch.from_numpy(model.encode_actions(list(numbers))).to(model.device)
    searches = [Search(len(sample.chunks), options) for sample in samples]
    actions: dict[int, Tensor] = {}
    while active := [i for i, search in enumerate(searches) if not search.done]:
        paths = [(i, path) for i in active for path in searches[i].states]
        order = model.config.state_order
        states = torch.from_numpy(
            model.encode_states(
                [
                    (samples[i].question, [samples[i].chunks[c] for c in in_state_order(p, order)])
                    for i, p in paths
                ]
            )
        )
        first = 0
        for i in active:
            if i not in actions:
                actions[i] = vectors[torch.tensor(rows[i], device=vectors.device)]
            retrieved = searches[i].states
            last = first + len(retrieved)
            q = score(
                states[first:last],
                actions[i],
                retrieved,
                model.config.position_scheme,
                base=model.config.rotary_base,
            )
            searches[i].advance(q.cpu().numpy())
            first = last
    return [search.best for search in searches]


def _groups(samples: Sequence[SupportSample]) -> Iterator[list[SupportSample]]:
    group: list[SupportSample] = []
    chunks = 0
    for sample in samples:
        if group and chunks + len(sample.chunks) > _MOST_CHUNKS:
            yield group
            group, chunks = [], 0
        group.append(sample)
        chunks += len(sample.chunks)
    yield group
