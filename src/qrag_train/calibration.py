"""The choice of ``q_threshold`` on validation data (paper App. B)."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qrag_retriever import compact
from qrag_retriever.config import CONFIG_FILE, QRAGConfig
from qrag_retriever.errors import InvalidInputError, ModelFormatError
from qrag_retriever.model_files import plain_card, replacing
from qrag_retriever.model_names import packaged
from qrag_retriever.search import SearchOptions
from qrag_train.card import model_card
from qrag_train.evaluation import search_samples
from qrag_train.metrics import fact_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.model import QRAGModel
    from qrag_retriever.search import Beam
    from qrag_train.data.sample import SupportSample


class Calibration(NamedTuple):
    """A threshold and what it leads to on the data it was chosen on."""

    q_threshold: float
    fact_em: float
    fact_f1: float
    steps: float


class Thresholds(NamedTuple):
    """What each threshold leads to, the highest first; float64 ``[n]`` each.

    Attributes:
        values: The thresholds; all others lead to what one of these leads to.
        fact_em: Mean Fact-EM.
        fact_f1: Mean Fact-F1.
        steps: Mean number of chunks retrieved.
    """

    values: NDArray[np.float64]
    fact_em: NDArray[np.float64]
    fact_f1: NDArray[np.float64]
    steps: NDArray[np.float64]

    @property
    def lowest(self) -> Calibration:
        """The threshold that stops no search: what the whole budget leads to."""
        return self.row(-1)

    def row(self, number: int) -> Calibration:
        """One threshold with what it leads to."""
        return Calibration(*(float(column[number]) for column in self))


def search_thresholds(
    model: QRAGModel, samples: Sequence[SupportSample], k: int | None = None
) -> Thresholds:
    """Judge all thresholds of a model by one search for each question.

    Args:
        model: The model; left as it is.
        samples: Validation questions.
        k: Budget of the searches; ``None``: the model's own.
    """
    beams = search_samples(model, samples, SearchOptions(k or model.config.max_steps, runners_up=0))
    return judge_thresholds(beams, [sample.support for sample in samples])


def judge_thresholds(beams: Sequence[Beam], supports: Sequence[Sequence[int]]) -> Thresholds:
    """Judge all thresholds from one record of searches without any.

    A trajectory goes on under a threshold as long as the least of its Q-values so far is not below
    it. Lowered step by step, the threshold lets one more trajectory take one more step at a time.

    Args:
        beams: Greedy trajectories of the whole budget.
        supports: The support of each.
    """
    least: list[float] = []
    gains: list[NDArray[np.float64]] = []
    for beam, support in zip(beams, supports, strict=True):
        scores = [fact_scores(beam.retrieved[:n], support) for n in range(len(beam.picks) + 1)]
        table = np.array([(s.em, s.f1, n) for n, s in enumerate(scores)], dtype=np.float64)
        least.extend(np.minimum.accumulate([pick.q_value for pick in beam.picks]))
        gains.extend(np.diff(table, axis=0))
    order = np.argsort(least)[::-1]
    q = np.array(least, dtype=np.float32)[order]
    totals = np.array(gains)[order].cumsum(axis=0) / len(beams)
    last = np.flatnonzero(np.append(q[1:] != q[:-1], True))  # of each run of equal values
    em, f1, steps = totals[last].T
    return Thresholds(_between(q[last]), em, f1, steps)


def choose_threshold(thresholds: Thresholds, target_em: float | None = None) -> Calibration:
    """Choose the threshold below which a search stops: the best Fact-F1.

    Args:
        thresholds: All there are, judged on validation questions.
        target_em: Choose the fewest steps that reach this Fact-EM instead.

    Raises:
        InvalidInputError: If the target is not reached with the whole budget, or is none.
    """
    if target_em is None:
        # of equal ones the one with the fewest steps
        return thresholds.row(int(np.argmax(thresholds.fact_f1)))
    if not target_em > 0:
        raise InvalidInputError(f"target_em={target_em} is not allowed; give a share above 0.")
    enough = np.flatnonzero(thresholds.fact_em >= target_em - 1e-9)
    if not len(enough):
        raise InvalidInputError(
            f"target_em={target_em} is not reached: the whole budget gives Fact-EM "
            f"{thresholds.lowest.fact_em:.3f}. Give a lower target, or a larger k."
        )
    return thresholds.row(int(enough[0]))


def model_config(folder: str | Path) -> QRAGConfig:
    """The settings of a model folder that a threshold can be written into.

    Raises:
        ModelFormatError: If the folder holds no Q-RAG model.
    """
    file = Path(folder) / CONFIG_FILE
    if not file.is_file() and packaged(folder) is not None:
        raise ModelFormatError(
            f"{folder} comes with the package, whose files stay as they are. Take a copy: "
            f"QRAGModel.from_pretrained({str(folder)!r}).save_pretrained('mine'); then calibrate "
            "mine."
        )
    if not file.is_file():
        raise ModelFormatError(
            f"{folder} is no folder of a Q-RAG model; give one that save_pretrained wrote."
        )
    return QRAGConfig.from_json(file.read_text(encoding="utf-8"))


def write_threshold(folder: str | Path, calibration: Calibration, max_steps: int) -> None:
    """Put a threshold into a model folder, whole or not at all.

    Args:
        folder: The model.
        calibration: The threshold and its figures, kept in the model's `training`.
        max_steps: Budget it was chosen with, from now on the model's.

    Raises:
        ModelFormatError: If the folder holds no Q-RAG model.
    """
    before = model_config(folder)
    config = before.replace(
        q_threshold=calibration.q_threshold,
        max_steps=max_steps,
        training={**before.training, "calibration": calibration._asdict()},
    )
    with replacing(Path(folder)) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        (new / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        changed = [CONFIG_FILE]
        card, name = new / "README.md", Path(folder).name
        if make := _maker(card, (name, "model"), before):
            card.write_text(make(name, config), encoding="utf-8")
            changed.append(card.name)
        else:
            warnings.warn(
                f"{Path(folder) / card.name} was edited and stays as it is; correct what it says "
                "of the threshold by hand.",
                stacklevel=2,
            )
        if compact.is_compact(new):
            compact.renew_manifest(new, changed)


def _maker(
    file: Path, names: Sequence[str], config: QRAGConfig
) -> Callable[[str, QRAGConfig], str] | None:
    """What wrote a model card, under one of these names; ``None`` if somebody has edited it."""
    # a card of a training names its settings
    makers = [model_card, plain_card] if "settings" in config.training else [plain_card]
    if not file.is_file():
        return makers[0]
    text = file.read_text(encoding="utf-8")
    return next((make for make in makers if text in {make(n, config) for n in names}), None)


def _between(q: NDArray[np.float32]) -> NDArray[np.float64]:
    """Thresholds that let pass q[0], …, q[i] and nothing below, halfway to what is below."""
    below = np.append(q[1:], q[-1])
    middle = (q + below) / 2
    return np.where(middle > below, middle, q).astype(np.float64)
