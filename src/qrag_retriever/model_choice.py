"""The model that a user names: an object, a folder, a hub name, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from qrag_retriever import model_names
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.model import QRAGModel


def resolve_model(model: Any, *, trust_remote_code: bool = False) -> QRAGModel:
    """The model that a user names in any of the ways a retriever accepts.

    Args:
        model: A model, or what embeds with one (`QRAGEmbedding`, `QRAGEmbeddings`); folder or hub
            name of a Q-RAG model, or of an embedder to use untrained, or such a
            ``SentenceTransformer`` itself; ``None``: multihop-en, which comes with the package.
        trust_remote_code: Let the code of a model that is loaded run.

    Raises:
        InvalidInputError: If it is something else.
        ModelFormatError: If it cannot be loaded.
    """
    if isinstance(model, QRAGModel):
        return model
    if isinstance(model, SentenceTransformer):
        return QRAGModel.from_encoder(model)
    if isinstance(own := getattr(model, "model", None), QRAGModel):  # QRAGEmbedding(s)
        return own
    if model is None:
        model = model_names.default_model()
    if not isinstance(model, (str, Path)):
        raise InvalidInputError(
            "A model is a QRAGModel, a SentenceTransformer, a folder or a hub name, not "
            f"{type(model).__name__}; for another embedder of a framework give the folder or name "
            "it was loaded from."
        )
    if not str(model).strip():
        raise InvalidInputError(
            f"model={model!r} is empty; name a model, or leave it out for "
            f"{model_names.DEFAULT_MODEL}."
        )
    trained = model_names.is_qrag_model(model)
    load = QRAGModel.from_pretrained if trained else QRAGModel.from_encoder
    return load(model, trust_remote_code=trust_remote_code)


def name_of(model: Any) -> str:
    """What a dump may call a model, so that it can be loaded again where it was given by a name."""
    if model is None:
        return model_names.DEFAULT_MODEL
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__
