"""Validation and test inside a training run: retrieval with a fixed budget, scored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from qrag_retriever.search import SearchOptions
from qrag_train.evaluation import EmbeddedTexts, search_samples
from qrag_train.metrics import retrieval_metrics
from qrag_train.module import QRAGTrainingModule
from qrag_train.rewards import path_return

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qrag_train.data.sample import SupportSample

_LOGGED = ("fact_em", "fact_f1")


class ValidatedTrainingModule(QRAGTrainingModule):
    """A `QRAGTrainingModule` that can also be judged: by greedy retrieval of T chunks.

    Logs ``val/fact_em``, ``val/fact_f1`` and ``val/return``, or ``test/…``, means over all
    questions of all processes. The return is that of training: its rewards, discounted. Judged
    are the mean weights, where training keeps them (`OptimizerConfig.average_updates`).
    """

    @property
    def budget(self) -> int:
        """Number T of chunks that the model retrieves when it is judged and used."""
        return self.model.config.max_steps

    @property
    def episode_steps(self) -> int:
        """Number of chunks that a training episode retrieves."""
        return self.pqn.max_steps or self.budget

    def on_validation_epoch_start(self) -> None:
        """Begin to keep embeddings of texts that recur from batch to batch."""
        self._known = EmbeddedTexts(self.averaged)
        self._sums: dict[str, float] = {}
        self._judged = 0

    def on_validation_epoch_end(self) -> None:
        """Log the means and forget the embeddings: the encoder is about to change."""
        self._log_means("val")
        del self._known

    def on_test_epoch_start(self) -> None:
        """Begin to keep embeddings, as in a validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Log the means and forget the embeddings."""
        self._log_means("test")
        del self._known

    def validation_step(self, batch: Sequence[SupportSample], batch_idx: int) -> None:
        """Retrieve for some validation questions."""
        del batch_idx
        self._judge(batch)

    def test_step(self, batch: Sequence[SupportSample], batch_idx: int) -> None:
        """Retrieve for some test questions."""
        del batch_idx
        self._judge(batch)

    def on_validation_end(self) -> None:
        """Leave the validation out of the transitions per second."""
        self._clock = time.monotonic()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave batches as they are: they hold texts."""
        del device, dataloader_idx
        return batch

    def _judge(self, samples: Sequence[SupportSample]) -> None:
        options = SearchOptions(self.budget, runners_up=0)
        beams = search_samples(self.averaged, samples, options, self._known)
        paths = [beam.retrieved for beam in beams]
        support = [sample.support for sample in samples]
        scores = retrieval_metrics(paths, support)
        found = {name: scores[name] * len(samples) for name in _LOGGED}
        found["return"] = sum(
            path_return(path, facts, self.pqn.reward, self.pqn.gamma)
            for path, facts in zip(paths, support, strict=True)
        )
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._judged += len(samples)

    def _log_means(self, part: str) -> None:
        """Means over the questions of all processes, which may have different numbers of them."""
        names = [*_LOGGED, "return"]
        sums = [self._sums.get(name, 0.0) for name in names]
        total = torch.tensor([*sums, self._judged], device=self.device)
        *means, count = self.trainer.strategy.reduce(total, reduce_op="sum").tolist()
        if count:
            logged = {
                f"{part}/{name}": mean / count for name, mean in zip(names, means, strict=True)
            }
            self.log_dict(logged)
