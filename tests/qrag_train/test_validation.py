"""Validation inside a training run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pytest
from tiny import Colours, tiny_model

from qrag_retriever.model import QRAGModel
from qrag_retriever.search import SearchOptions
from qrag_train.data.sample import SupportSample
from qrag_train.evaluation import search_samples
from qrag_train.loader import RolloutLoader, SampleLoader
from qrag_train.metrics import retrieval_metrics
from qrag_train.settings import OptimizerConfig, PQNConfig
from qrag_train.validation import ValidatedTrainingModule

CHUNKS = tuple(f"the {colour} cup fell" for colour in ("red", "blue", "green", "black"))
SAMPLES = [
    SupportSample(f"{i}", f"where is the {CHUNKS[i % 4].split()[1]} cup", CHUNKS, (i % 4,))
    for i in range(8)
]


def test_each_validation_embeds_a_text_once_and_with_the_weights_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[Counter[str]] = []
    judged: list[float] = []
    encode = QRAGModel.encode_actions

    def counted(self: QRAGModel, texts: Any, **options: Any) -> Any:
        embedded[-1].update(texts)
        return encode(self, texts, **options)

    class Watch(lightning.Callback):
        def on_validation_epoch_start(self, *_: object) -> None:
            embedded.append(Counter())

        def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
            judged.append(float(trainer.callback_metrics["val/fact_f1"]))
            embedded.append(Counter())  # what the test itself embeds
            beams = search_samples(module.averaged, SAMPLES, SearchOptions(2))
            found = [beam.retrieved for beam in beams]
            scores = retrieval_metrics(found, [sample.support for sample in SAMPLES])
            assert judged[-1] == pytest.approx(scores["fact_f1"])

    monkeypatch.setattr(QRAGModel, "encode_actions", counted)
    model = tiny_model(tmp_path / "encoder", "none", scale=0.2)
    # shorter episodes than the model's budget of 2, with which it is judged
    pqn = PQNConfig(environments=4, random_transitions=8, max_steps=1)
    module = ValidatedTrainingModule(model, pqn, OptimizerConfig(lr=3e-2, warmup_updates=0))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        default_root_dir=tmp_path,
        callbacks=[Watch()],
    )
    trainer.fit(module, RolloutLoader(Colours(), 4), SampleLoader(SAMPLES, size=3))
    assert len(judged) == 2
    for counts in embedded[::2]:
        assert counts == Counter(CHUNKS)
