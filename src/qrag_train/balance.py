"""Components of action embeddings made equally large, so that few bits keep them well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from qrag_retriever.errors import ConfigError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qrag_retriever.encoder import Encoder
    from qrag_retriever.model import QRAGModel


def balance(model: QRAGModel, texts: Sequence[str]) -> None:
    """Make the components of a model's action embeddings equally large, in place.

    ``⟨s, R(ρ)a⟩`` stays as it is where a pair of components ``(2m, 2m + 1)`` of a is divided by a
    number and the same pair of s multiplied by it, since R(ρ) turns each pair by itself. So Q, and
    what is retrieved, does not change; but an index of int8, which has one factor for all
    components of a chunk, loses less where none of them is much larger than the others. The numbers
    go into the last norm of each encoder.

    Args:
        model: A trained model.
        texts: Chunks of the kind that it is for; some hundreds suffice.

    Raises:
        ConfigError: If the model's encoders are one and the same, or do not end with a norm and
            pooling.
        InvalidInputError: If there are no texts.
    """
    if not texts:
        raise InvalidInputError("There are no texts to balance on; give some chunks.")
    states, actions = _last_norm(model.state_encoder), _last_norm(model.action_encoder)
    if states is actions:
        raise ConfigError("Both encoders are one and the same; balance a model that has two.")
    vectors = model.encode_actions(list(texts))
    pairs = vectors.reshape(len(vectors), -1, 2)
    size = np.sqrt(np.square(pairs, dtype=np.float64).mean(axis=(0, 2)))
    # a pair that is always 0 stays so
    factors = torch.from_numpy(np.repeat(np.where(size > 0, size, size.max()), 2))
    factors /= factors.log().mean().exp()
    for norm, factor in ((states, factors), (actions, 1 / factors)):
        _scale(norm, factor)
    model.weights_changed()


@torch.no_grad()
def _scale(norm: nn.Module, factors: Tensor) -> None:
    for parameter in norm.parameters():
        parameter.mul_(factors.to(parameter))


@torch.no_grad()
def _last_norm(encoder: Encoder) -> nn.Module:
    """The module that multiplies the components of an encoder's output by numbers of its own."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        seen.append((module, output))

    weighted = [m for m in encoder.transformer.modules() if "Norm" in type(m).__name__]
    hooks = [module.register_forward_hook(keep) for module in weighted]
    try:
        ids = [*encoder.prefix, *encoder.tokenize(["a"])[0], *encoder.suffix]
        vector = encoder([ids])
    finally:
        for hook in hooks:
            hook.remove()
    _, *others = encoder.layers
    if seen and len(others) == 1 and isinstance(others[0], Pooling):
        norm, output = seen[-1]
        mask = torch.ones(1, len(ids), device=output.device)
        pooled = others[0]({"token_embeddings": output, "attention_mask": mask})
        if torch.equal(pooled["sentence_embedding"] * encoder.scale, vector):
            return norm
    raise ConfigError(
        "The encoder does not end with a norm and pooling, so its components cannot be balanced."
    )
