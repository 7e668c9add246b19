"""Validation and test inside a training run: retrieval with a fixed budget, scored."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from qrag_retriever.search import SearchOptions
from qrag_train.evaluation import EmbeddedTexts, search_samples
from qrag_train.metrics import retrieval_metrics
from qrag_train.module import QRAGTrainingModule
from qrag_train.rewards import path_return

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

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

    def on_validation_epoch_end(self) -> None:
        """Forget them: the encoder is about to change."""
        del self._known

    def on_test_epoch_start(self) -> None:
        """Begin to keep embeddings, as in a validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Forget them."""
        self.on_validation_epoch_end()

    def validation_step(self, batch: Sequence[SupportSample], batch_idx: int) -> None:
        """Retrieve for some validation questions and log the scores."""
        del batch_idx
        self._judge("val", batch)

    def test_step(self, batch: Sequence[SupportSample], batch_idx: int) -> None:
        """Retrieve for some test questions and log the scores."""
        del batch_idx
        self._judge("test", batch)

    def on_validation_end(self) -> None:
        """Leave the validation out of the transitions per second."""
        self._clock = time.monotonic()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave batches as they are: they hold texts."""
        del device, dataloader_idx
        return batch

    def _judge(self, part: str, samples: Sequence[SupportSample]) -> None:
        options = SearchOptions(self.budget, runners_up=0)
        beams = search_samples(self.averaged, samples, options, self._known)
        paths = [beam.retrieved for beam in beams]
        support = [sample.support for sample in samples]
        scores = retrieval_metrics(paths, support)
        logged = {f"{part}/{name}": scores[name] for name in _LOGGED}
        logged[f"{part}/return"] = sum(
            path_return(path, facts, self.pqn.reward, self.pqn.gamma)
            for path, facts in zip(paths, support, strict=True)
        ) / len(samples)
        self.log_dict(logged, batch_size=len(samples), sync_dist=True)
