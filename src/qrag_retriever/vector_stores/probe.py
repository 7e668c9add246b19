"""What a store's scores mean, found out with a vector whose Q is known."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError, VectorStoreError
from qrag_retriever.vector_stores.store import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from qrag_retriever.model import QRAGModel
    from qrag_retriever.vector_stores.store import Hit, Store

    Array = NDArray[np.float64]

_HITS = 8
_Q = 3.0  # of the vector tried: q, -q, 1 - q and a cosine are all different
_TOLERANCE = 5e-3  # of |vector| |embedding|: stores may keep half precision

# no lambdas: a corpus keeps one of them, and can be pickled if its store can
_TO_Q: list[Callable[[Any], Any]] = [
    operator.pos,
    operator.neg,
    functools.partial(operator.sub, 1),
]


def score_to_q(store: Store, model: QRAGModel) -> Callable[[Any], Any]:
    """How to read Q from a store's scores, of one or of an array of them.

    Embeds some of its chunks again and compares the scores it gives them with their inner products.

    Args:
        store: The store.
        model: The model it should have been filled by.

    Raises:
        InvalidInputError: If it holds no chunks.
        VectorStoreError: If it fails, or its metric is not the inner product.
        FingerprintMismatchError: If it was filled by another model, or its scores cannot be
            explained otherwise.
    """
    ones = np.full(model.dimension, model.dimension**-0.5, dtype=np.float32)
    actions, _ = _embedded(store, model, ones)
    action = actions[np.argmax(np.linalg.norm(actions, axis=1))]
    vector = (_Q / (action @ action) * action).astype(np.float32)
    actions, scores = _embedded(store, model, vector)
    q, sizes = actions @ vector, np.linalg.norm(actions, axis=1) * np.linalg.norm(vector)
    for to_q in _TO_Q:
        if (abs(to_q(scores) - q) <= _TOLERANCE * sizes).all():
            return to_q
    cosine, distance = q / sizes, np.linalg.norm(actions - vector, axis=1)
    for metric, expected in (
        ("cosine", [cosine, -cosine, 1 - cosine, (1 + cosine) / 2]),
        ("Euclidean distance", [distance, distance**2, -distance, -(distance**2)]),
    ):
        if any(np.allclose(scores, values, rtol=1e-2, atol=1e-2) for values in expected):
            raise VectorStoreError(
                f"The metric of this {store.kind} store is the {metric}, and Q is an inner product:"
                " its order would be another. Make the store again with the inner product (dot "
                "product, IP) as its metric."
            )
    raise FingerprintMismatchError(
        f"This {store.kind} store scores {_listed(scores)} where the model's inner products are "
        f"{_listed(q)}. It was filled by another model, or with other texts than it returns; or it "
        "has another metric, or compressed vectors whose scores are rough (product quantization). "
        "Fill it with QRAGEmbeddings (LangChain) or QRAGEmbedding (LlamaIndex) of this model, with "
        "the inner product as its metric and vectors of full or half precision."
    )


def _embedded(store: Store, model: QRAGModel, vector: NDArray[np.float32]) -> tuple[Array, Array]:
    """Embeddings of the chunks found for a vector, made anew, and the store's scores."""
    hits: Sequence[Hit] = store.search([Request(vector, _HITS, needed=1)])[0]
    if not hits:
        raise InvalidInputError(
            f"This {store.kind} store holds no chunks, or none that passes the filter; fill it "
            "first, with QRAGEmbeddings (LangChain) or QRAGEmbedding (LlamaIndex) of the model."
        )
    actions = model.encode_actions([hit.chunk.embed_text for hit in hits])
    return actions.astype(np.float64), np.array([hit.score for hit in hits], dtype=np.float64)


def _listed(values: Array) -> str:
    return ", ".join(f"{value:.3f}" for value in values[:3])
