"""A pretrained embedder, to use untrained or to start a training from."""

from __future__ import annotations

import copy
from pathlib import Path
from pickle import UnpicklingError

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from qrag_retriever import offline
from qrag_retriever.config import CONFIG_FILE
from qrag_retriever.errors import ConfigError, ModelFormatError, UnsafeModelError
from qrag_retriever.model_names import without_hub
from qrag_retriever.model_trust import refuse_custom_classes


def load_embedder(
    encoder: str | Path | SentenceTransformer | None, *, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A pretrained embedder on the CPU, in float32.

    Args:
        encoder: Folder or hub name, or an embedder to copy; ``None``: all-MiniLM-L6-v2.
        trust_remote_code: Let the embedder's own code run.

    Raises:
        ModelFormatError: If there is no such embedder, or its files are unusable.
        UnsafeModelError: If its folder asks for code to be run and that is not allowed.
    """
    if isinstance(encoder, SentenceTransformer):
        own: SentenceTransformer = copy.deepcopy(encoder).to("cpu", torch.float32)
        return own
    if encoder is None:
        encoder = offline.DEFAULT_ENCODER
    if not str(encoder).strip():
        raise ModelFormatError("The embedder's name is empty; give a folder or a hub name.")
    name = str(Path(encoder).expanduser())
    if name == offline.DEFAULT_ENCODER and offline.is_installed():
        name = str(offline.minilm_folder())
    if Path(name, CONFIG_FILE).is_file():
        raise ModelFormatError(f"{name} is a Q-RAG model; load it with QRAGModel.from_pretrained.")
    if Path(name).is_dir() and not trust_remote_code:
        refuse_custom_classes(Path(name))
    try:
        return SentenceTransformer(
            name,
            device="cpu",
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32},
        )
    except UnpicklingError as error:
        raise UnsafeModelError(
            f"The weights of {name!r} are a pickle that holds more than weights and are not "
            "loaded; get them as model.safetensors."
        ) from error
    except Exception as error:
        hint = "" if Path(name).is_dir() else f" There is no such folder. {without_hub(name)}"
        raise ModelFormatError(f"The embedder {name!r} cannot be loaded: {error}.{hint}") from error


def require_usable(embedder: SentenceTransformer) -> None:
    """Refuse what an embedder does that an encoder does not.

    Raises:
        ConfigError: If there is such a thing.
    """
    prompted = any((embedder.prompts or {}).values())
    for module in embedder.modules():
        if isinstance(module, Pooling) and not module.include_prompt and prompted:
            raise ConfigError(
                "The embedder leaves its prompts out of the mean (include_prompt=False), which is "
                "not supported; choose another embedder."
            )
    if embedder.truncate_dim is not None:
        raise ConfigError(
            f"truncate_dim={embedder.truncate_dim} is not supported; leave it out, or put a Dense "
            "module of that size behind the pooling."
        )
