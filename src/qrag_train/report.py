"""Several ways to retrieve side by side, as a table."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from qrag_retriever.errors import ModelFormatError
from qrag_retriever.model_names import is_qrag_model
from qrag_retriever.search import SearchOptions
from qrag_train.build import starting_model
from qrag_train.evaluation import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qrag_retriever.model import QRAGModel
    from qrag_train.data.sample import SupportSample

_TITLES = {
    "data": "data",
    "questions": "questions",
    "retrieval": "retrieval",
    "q_threshold": "threshold",
    "fact_em": "Fact-EM",
    "fact_f1": "Fact-F1",
    "steps": "steps",
    "stop_early": "early",
    "stop_perfect": "perfect",
    "stop_late": "late",
    "answer_em": "answer EM",
    "answer_f1": "answer F1",
}
_RECALLS = (1, 2, 5, 10, 20, 50)


def reports(
    model: QRAGModel,
    samples: Sequence[SupportSample],
    k: int | None = None,
    q_threshold: float | None = None,
    beams: int = 1,
    *,
    baselines: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[dict[str, Any]]:
    """Judge a model on questions.

    Args:
        model: The model.
        samples: The questions.
        k: Budget; ``None``: the model's own.
        q_threshold: Threshold of a second row; ``None``: the model's own, if it has one.
        beams: Trajectories followed at once.
        baselines: Add rows for one step alone and for the embedder before training.
        trust_remote_code: Let that embedder's own code run.

    Yields:
        What was done, in words, as ``retrieval``, and the scores.

    Raises:
        InvalidInputError: If ``k`` or ``beams`` is below 1, or the threshold is no number.
    """
    k = model.config.max_steps if k is None else k
    q_threshold = model.config.q_threshold if q_threshold is None else q_threshold
    plan = f", {beams} beams" if beams > 1 else ""
    searches = [(f"{k} steps{plan}", model, SearchOptions(k, beams=beams))]
    if q_threshold is not None:
        stopping = SearchOptions(k, q_threshold, beams)
        searches.append((f"at most {k} steps{plan}, until Q < {q_threshold:.3f}", model, stopping))
    if baselines:
        searches += _baselines(model, k, trust_remote_code)
    for name, judged, options in searches:
        yield {"retrieval": name, **evaluate(judged, samples, options)}


def _baselines(
    model: QRAGModel, k: int, trust_remote_code: bool
) -> Iterator[tuple[str, QRAGModel, SearchOptions]]:
    once = SearchOptions(k, chunks_per_step=k)
    yield f"the best {k} of one step", model, once
    before = untrained(model, trust_remote_code=trust_remote_code)
    if before is not None:
        yield f"before training, {k} steps", before, SearchOptions(k)
        yield f"before training, the best {k} of one step", before, once


def untrained(model: QRAGModel, *, trust_remote_code: bool = False) -> QRAGModel | None:
    """What a model was trained from; ``None`` for random weights, or where it is not to be had.

    A model may name a folder of the machine that it was trained on, or a name that stands for the
    model itself by now, as that of a packaged one does: a warning says so.
    """
    settings = model.config.training.get("settings", {}).get("model")
    if settings is None or settings["scratch"] is not None:
        return None
    values = {"positions": model.config.positions, **(settings["settings"] or {})}
    name = settings["encoder"]
    problem = f"{name} is a name of the model itself by now."
    try:
        start = starting_model(name, values, trust_remote_code=trust_remote_code)
        start = start.to(model.device)
        if name is None or not is_qrag_model(name) or not _have_equal_weights(start, model):
            return start
    except ModelFormatError as error:
        problem = str(error)
    warnings.warn(f"What this model was trained from is left out: {problem}", stacklevel=2)
    return None


def _have_equal_weights(first: QRAGModel, second: QRAGModel) -> bool:
    weights, others = first.state_dict(), second.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(weight, others[name]) for name, weight in weights.items()
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Reports as a Markdown table; figures that none of them has are left out.

    Example:
        >>> print(markdown([{"retrieval": "2 steps", "fact_em": 0.5, "recall@1": 0.25}]))
        | retrieval | Fact-EM | recall@1 |
        | --- | --- | --- |
        | 2 steps | 0.500 | 0.250 |
    """
    titles = _TITLES | {f"recall@{k}": f"recall@{k}" for k in _RECALLS}
    used = [name for name in titles if any(name in row for row in rows)]
    lines = [[titles[name] for name in used], ["---"] * len(used)]
    lines += [[_cell(row.get(name, "")) for name in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
