"""The model that a user names: an object, a folder, a hub name, or none."""

from __future__ import annotations

from pathlib import Path

from qrag_retriever import model_files
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.model import QRAGModel


def resolve_model(model: QRAGModel | str | Path | None) -> QRAGModel:
    """The model that a user names in any of the ways a retriever accepts.

    Args:
        model: A model; folder or hub name of a Q-RAG model, or of an embedder to use untrained;
            ``None``: multihop-en, which comes with the package.

    Raises:
        InvalidInputError: If it is something else.
        ModelFormatError: If it cannot be loaded.
    """
    if isinstance(model, QRAGModel):
        return model
    if model is None:
        model = model_files.default_model()
    if not isinstance(model, (str, Path)):
        raise InvalidInputError(
            f"A model is a QRAGModel, a folder or a hub name, not {type(model).__name__}; for an "
            "embedder of a framework give the folder or name it was loaded from."
        )
    trained = model_files.is_qrag_model(model)
    return (QRAGModel.from_pretrained if trained else QRAGModel.from_encoder)(model)
