"""From settings to a module ready for training: the encoder, what of it is trained, the rest."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qrag_retriever.errors import ConfigError, MissingDependencyError
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_names import is_qrag_model
from qrag_retriever.positions import PositionMode
from qrag_train.scratch import ScratchConfig, make_encoder
from qrag_train.settings import OptimizerConfig, PQNConfig
from qrag_train.validation import ValidatedTrainingModule


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """What of a pretrained encoder is trained, and how it saves memory.

    Attributes:
        freeze_word_embeddings: Keep the word embeddings as they are; they are most of a small
            encoder and their optimiser step most of an update.
        freeze_layers: Keep the first so many layers as they are, too: less to compute, and a
            compact model stores them once for both encoders.
        first_layers: Use the first so many layers only; ``None``: all.
        lora_rank: Train low-rank updates of this rank instead of the weights; 0: the weights.
        gradient_checkpointing: Save memory by computing activations twice.
        dropout: Dropout in the layers that are trained, where gradients are computed; never in
            rollouts and targets. Attention weights of BERT and its kin are kept whole, so that
            torch computes attention in its fast way.

    Raises:
        ConfigError: If a value is out of range.
    """

    freeze_word_embeddings: bool = True
    freeze_layers: int = 0
    first_layers: int | None = None
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.first_layers is not None and self.first_layers < 1:
            raise ConfigError(f"first_layers={self.first_layers}; give at least 1, or None.")
        if self.freeze_layers < 0:
            raise ConfigError(
                f"freeze_layers={self.freeze_layers}; give at least 1, or 0 for none."
            )
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank={self.lora_rank}; give at least 1, or 0 for none.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}; give a number from 0 to below 1.")


def build_module(
    encoder: str | None = None,
    trust_remote_code: bool = False,
    scratch: ScratchConfig | None = None,
    positions: PositionMode | None = None,
    max_steps: int | None = None,
    settings: dict[str, Any] | None = None,
    adapt: AdaptConfig = AdaptConfig(),
    pqn: PQNConfig = PQNConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    seed: int = 0,
    texts: Callable[[], Iterable[str]] | None = None,
) -> ValidatedTrainingModule:
    """A module ready for training.

    Args:
        encoder: Embedder to start from, or a Q-RAG model to train on: folder or hub name. Left
            out: all-MiniLM-L6-v2.
        trust_remote_code: Let the encoder's own code run.
        scratch: Start from a new encoder of this size instead, its vocabulary from the training
            texts.
        positions: How a chunk's place counts: "relative" to the chunks found so far (long
            documents), its "absolute" number, or "none" (collections of passages). Left out:
            "none", or what a Q-RAG model had.
        max_steps: Retrieval budget T: that of validation, the model's default, and that of
            training episodes unless ``pqn.max_steps`` is given. Left out: 4, or what a Q-RAG model
            had.
        settings: Further settings of the model, those of QRAGConfig, and of a plain embedder also
            `pooling` and `normalize`.
        adapt: What of a pretrained encoder is trained.
        pqn: The algorithm.
        optimizer: The optimiser and its schedule.
        seed: Seed of the policy's draws and of new weights.
        texts: Gives the texts for the vocabulary of a new encoder.

    Raises:
        ConfigError: If settings contradict each other, or leave nothing to train.
        ModelFormatError: If the encoder cannot be loaded; UnsafeModelError, one of its kind, if it
            brings code and ``trust_remote_code`` is off.
    """
    given = {"positions": positions, "max_steps": max_steps}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values |= settings or {}
    if scratch is None:
        # a threshold belongs to the weights it was chosen for
        values.setdefault("q_threshold", None)
        start = starting_model(encoder, values, trust_remote_code=trust_remote_code)
        model = adapted(start, adapt)
    else:
        if encoder is not None or texts is None:
            raise ConfigError("A new encoder (scratch) needs texts, and no encoder to start from.")
        _refuse_for_new(adapt)
        with tempfile.TemporaryDirectory() as folder:
            make_encoder(folder, texts(), scratch, seed)
            model = QRAGModel.from_encoder(folder, device="cpu", **values)
        model = adapted(model, dataclasses.replace(adapt, freeze_word_embeddings=False))
    module = ValidatedTrainingModule(model, pqn, optimizer, seed=seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"freeze_layers={adapt.freeze_layers} freezes all layers and the embeddings before "
            "them, so nothing is left to train; give --model.adapt.freeze_layers less."
        )
    return module


def starting_model(
    encoder: str | None, values: dict[str, Any], *, trust_remote_code: bool = False
) -> QRAGModel:
    """The model that training starts from, on the CPU.

    Args:
        encoder: Embedder or Q-RAG model, folder or hub name; ``None``: all-MiniLM-L6-v2.
        values: Settings that differ from its own.
        trust_remote_code: Let the encoder's own code run.

    Raises:
        ConfigError: If settings do not fit it.
        ModelFormatError: If it cannot be loaded.
    """
    trusted: dict[str, Any] = {"device": "cpu", "trust_remote_code": trust_remote_code}
    if encoder is not None and is_qrag_model(encoder):
        model = QRAGModel.from_pretrained(encoder, **trusted)
        config = model.config.replace(**values)
        return QRAGModel(model.state_encoder, model.action_encoder, config)
    return QRAGModel.from_encoder(encoder, **trusted, **values)


def _refuse_for_new(adapt: AdaptConfig) -> None:
    given = {"freeze_layers": 0, "first_layers": None, "lora_rank": 0}
    for name, off in given.items():
        if getattr(adapt, name) != off:
            raise ConfigError(
                f"{name}={getattr(adapt, name)} is for a pretrained encoder; leave "
                f"--model.adapt.{name} out where --model.scratch makes a new one."
            )


def adapted(model: QRAGModel, config: AdaptConfig) -> QRAGModel:
    """Prepare a model's encoders in place as the settings say.

    Raises:
        ConfigError: If an encoder has fewer layers than asked for.
        MissingDependencyError: If LoRA is asked for and peft is not installed.
    """
    for encoder in (model.state_encoder, model.action_encoder):
        transformer: Any = encoder.transformer.model
        if config.first_layers is not None:
            _keep_layers(transformer, config.first_layers)
        _set_dropout(transformer, config.dropout)
        if config.lora_rank:
            _add_lora(transformer, config.lora_rank)
        if config.freeze_word_embeddings:
            transformer.get_input_embeddings().requires_grad_(False)
        if config.freeze_layers:
            _freeze_layers(transformer, config.freeze_layers)
        if config.gradient_checkpointing:
            _checkpoint_gradients(transformer)
    return model


def _keep_layers(transformer: Any, count: int) -> None:
    holder, name = _layers(transformer, first_layers=count)
    setattr(holder, name, getattr(holder, name)[:count])
    transformer.config.num_hidden_layers = count


def _set_dropout(part: nn.Module, probability: float) -> None:
    """Set the dropout of a part of a transformer, apart from that of attention weights."""
    for name, module in part.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if name.endswith("attention.self.dropout") else probability


def _freeze_layers(transformer: Any, count: int) -> None:
    """Freeze all that comes before the layers, and the first of them; they drop nothing."""
    holder, name = _layers(transformer, freeze_layers=count)
    before = [
        transformer.get_input_embeddings(),
        getattr(transformer, "embeddings", None),
        getattr(holder, "relative_attention_bias", None),  # MPNet's, which all layers share
    ]
    for part in [*getattr(holder, name)[:count], *before]:
        if part is not None:
            part.requires_grad_(False)
            _set_dropout(part, 0.0)


def _layers(transformer: Any, **asked: int) -> tuple[Any, str]:
    """Where the layers are: the module that holds them, and their name there."""
    holder = getattr(transformer, "encoder", getattr(transformer, "transformer", transformer))
    name = "layer" if hasattr(holder, "layer") else "layers"
    layers = getattr(holder, name, None)
    ((setting, count),) = asked.items()
    if layers is None or len(layers) < count:
        have = "no list of layers" if layers is None else f"{len(layers)} layers"
        raise ConfigError(f"{setting}={count}, but the encoder has {have}; give less.")
    return holder, name


def _checkpoint_gradients(transformer: Any) -> None:
    # transformers 5 renamed it
    enable = getattr(transformer, "activation_checkpointing_enable", None)
    try:
        (enable or transformer.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"A {type(transformer).__name__} cannot compute its activations again; leave "
            "--model.adapt.gradient_checkpointing out."
        ) from error


def _add_lora(transformer: Any, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError.of("LoRA (lora_rank above 0)", "peft", "train") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    inject_adapter_in_model(config, transformer)


def merge_lora(model: QRAGModel) -> QRAGModel:
    """Write low-rank updates into the weights, in place; a model without any stays as it is."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model
