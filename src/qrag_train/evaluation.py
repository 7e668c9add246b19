"""Retrieval on annotated samples: search many at once, and score what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from qrag_retriever.scoring import score
from qrag_retriever.search import Beam, Search, SearchOptions
from qrag_retriever.state import in_state_order
from qrag_train.metrics import retrieval_metrics, stop_kind, stop_rates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from qrag_retriever.model import QRAGModel
    from qrag_train.data.sample import SupportSample

# Chunks whose embeddings are held at once, and samples that are searched together.
_MOST_CHUNKS = 200_000
_MOST_SAMPLES = 64
# Embedding more than so many chunks shows its progress.
_MANY_CHUNKS = 2000


class EmbeddedTexts:
    """Action embeddings for searches, kept for texts that recur: of a corpus, of a background.

    Args:
        model: The model; its action encoder must not change afterwards.
        recurring: The texts whose embeddings are kept once they were needed. All others are
            embedded for one call of `actions` alone. ``None``: those of a call are kept for the
            next one.
    """

    def __init__(self, model: QRAGModel, recurring: Iterable[str] | None = None) -> None:
        self._model = model
        self._recurring = None if recurring is None else frozenset(recurring)
        self._rows: dict[str, int] = {}
        self._vectors = torch.empty(0, model.dimension, device=model.device)

    def actions(self, samples: Sequence[SupportSample]) -> list[Tensor]:
        """Embeddings of the chunks of samples, ``[n, d]`` each; one for samples on one corpus."""
        corpora = {id(sample.chunks): sample.chunks for sample in samples}
        texts = dict.fromkeys(text for chunks in corpora.values() for text in chunks)
        if self._recurring is None:
            self._keep([text for text in texts if text in self._rows])
        recurring = texts if self._recurring is None else self._recurring
        missing = [text for text in texts if text not in self._rows]
        self._rows, self._vectors = self._with([text for text in missing if text in recurring])
        rows, vectors = self._with([text for text in missing if text not in recurring])
        numbers = {name: [rows[text] for text in chunks] for name, chunks in corpora.items()}
        actions = {
            name: vectors[torch.tensor(some, device=vectors.device)]
            for name, some in numbers.items()
        }
        return [actions[id(sample.chunks)] for sample in samples]

    def _keep(self, texts: Sequence[str]) -> None:
        """Forget all other texts."""
        rows = [self._rows[text] for text in texts]
        index = torch.tensor(rows, dtype=torch.long, device=self._vectors.device)
        self._vectors = self._vectors[index]
        self._rows = {text: row for row, text in enumerate(texts)}

    def _with(self, texts: Sequence[str]) -> tuple[dict[str, int], Tensor]:
        if not texts:
            return self._rows, self._vectors
        show = len(texts) >= _MANY_CHUNKS
        fresh = torch.from_numpy(self._model.encode_actions(texts, show_progress=show))
        start = len(self._vectors)
        rows = self._rows | {text: start + i for i, text in enumerate(texts)}
        return rows, torch.cat([self._vectors, fresh.to(self._vectors.device)])


def search_samples(
    model: QRAGModel,
    samples: Iterable[SupportSample],
    options: SearchOptions,
    known: EmbeddedTexts | None = None,
) -> list[Beam]:
    """Retrieve for many samples at once, each among its own chunks.

    A search of more samples than are searched together shows its progress.

    Args:
        model: The model.
        samples: What to search.
        options: How; the same for all.
        known: Embeddings of this model that need not be made again. Whoever keeps them searches
            part by part, as a validation does, and shows the progress of all: here none is shown.

    Returns:
        The best trajectory of each sample.
    """
    count = len(samples) if isinstance(samples, Sized) else None
    few = known is not None or count is None or count <= _MOST_SAMPLES
    known = EmbeddedTexts(model) if known is None else known
    results: list[Beam] = []
    with tqdm(total=count, unit="question", leave=False, mininterval=1, disable=few) as bar:
        for group in in_groups(samples):
            results += _search_group(model, group, options, known)
            bar.update(len(group))
    return results


def hard_negatives(
    model: QRAGModel, questions: Sequence[SupportSample], steps: int, count: int
) -> list[list[int]]:
    """What a model would rather retrieve than the support: its best wrong chunks at each step.

    A chunk that has the text of a support chunk is not wrong.

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
        chunks = question.chunks
        right = {chunks[i] for i in question.support}
        wrong = dict.fromkeys(i for i in (*beam.retrieved, *rivals) if chunks[i] not in right)
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
    greedy = options.beams == 1  # a threshold only cuts the same trajectory short
    searched = dataclasses.replace(options, q_threshold=None) if greedy else options
    beams = search_samples(model, samples, searched)
    supports = [sample.support for sample in samples]
    return judge(beams, supports, options.k, options.q_threshold if greedy else None)


def judge(
    beams: Sequence[Beam],
    supports: Sequence[Sequence[int]],
    k: int,
    q_threshold: float | None = None,
) -> dict[str, float]:
    """Score what searches found (METHOD §5).

    Args:
        beams: Trajectories of the whole budget.
        supports: The support of each.
        k: The budget.
        q_threshold: Stop each trajectory, which must be greedy, below this Q; adds how often that
            was early, at the right step, or late (paper App. B).

    Returns:
        As `evaluate`.
    """
    paths = [beam.retrieved for beam in beams]
    lengths = [steps_above(beam, q_threshold) for beam in beams]
    found = [path[:length] for path, length in zip(paths, lengths, strict=True)]
    scores = retrieval_metrics(found, supports, ks=range(1, k + 1))
    if q_threshold is not None:
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
    model: QRAGModel, samples: Sequence[SupportSample], options: SearchOptions, known: EmbeddedTexts
) -> list[Beam]:
    actions = known.actions(samples)
    alpha = model.config.alpha
    searches = [Search(len(sample.chunks), options, alpha=alpha) for sample in samples]
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


def in_groups(samples: Iterable[SupportSample]) -> Iterator[list[SupportSample]]:
    """Samples as many at a time as are searched together: long documents one by one."""
    group: list[SupportSample] = []
    chunks = 0
    for sample in samples:
        same_corpus = bool(group) and sample.chunks is group[-1].chunks
        chunks += 0 if same_corpus else len(sample.chunks)
        if group and (chunks > _MOST_CHUNKS or len(group) == _MOST_SAMPLES):
            yield group
            group, chunks = [], len(sample.chunks)
        group.append(sample)
    if group:
        yield group
