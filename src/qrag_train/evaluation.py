"""Retrieval on annotated samples: search many at once, score, and choose ``q_threshold``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qrag_retriever.scoring import score
from qrag_retriever.search import Beam, Search, SearchOptions
from qrag_train.environment import in_state_order

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
