"""Import of the checkpoints that the paper's authors publish, with their training config.

    python -m qrag_retriever.reference FOLDER NEW_FOLDER

Q-values are the released code's. The states differ where it misreads them: text that happens to
read ``[SEP]`` opens no part of its own here, and with a byte-level tokenizer (Qwen3) a chunk in a
state keeps its first token and gets no blanks around it.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn

from qrag_retriever.config import QRAGConfig
from qrag_retriever.encoder import Encoder
from qrag_retriever.errors import ConfigError, ModelFormatError, QRAGError, UnsafeModelError
from qrag_retriever.model import DType, QRAGModel
from qrag_retriever.pretrained import load_embedder
from qrag_retriever.reference_config import CONFIG_FILE, ReferenceConfig

CheckpointName = Literal["best", "last"]


def load_reference_checkpoint(
    folder: str | Path,
    encoder: str | Path | None = None,
    *,
    checkpoint: CheckpointName | None = None,
    device: str | None = None,
    dtype: DType = "float32",
    trust_remote_code: bool = False,
) -> QRAGModel:
    """Load a checkpoint of the code released with the paper.

    Args:
        folder: Holds ``config.yaml`` and ``model_best.pt`` or ``model_last.pt``.
        encoder: Folder or hub name of the embedder that was trained, for its architecture and
            tokenizer; ``None``: what ``config.yaml`` names.
        checkpoint: ``"best"`` or ``"last"``; ``None``: the best if there is one, else the last.
        device: Where to compute; ``None``: a GPU if there is one.
        dtype: Precision of the weights.
        trust_remote_code: Let the embedder's own code run (GTE needs it).

    Returns:
        The model, with the positions, limits and budget it was trained with; ``config.training``
        says where it came from.

    Raises:
        ModelFormatError: If a file is missing or damaged, a setting is missing, or the weights do
            not fit the embedder.
        UnsafeModelError: If the checkpoint asks for code to be run, or the embedder does and
            ``trust_remote_code`` is off.
        ConfigError: If the model was trained in a way that this package cannot reproduce.
    """
    folder = Path(folder).expanduser()
    reference = ReferenceConfig(folder / CONFIG_FILE)
    file = _find_checkpoint(folder, checkpoint)
    settings = reference.settings()
    modules, name = _build_modules(reference, folder, encoder, trust_remote_code)
    weights = _read_weights(file)
    states = _fill(copy.deepcopy(modules), weights, "state_embed.model.", file)
    actions = _fill(modules, weights, "action_embed.model.model.", file)
    settings["max_chunk_tokens"] = min(settings["max_chunk_tokens"], actions.window)
    settings["training"] = {
        "source": folder.resolve().name,
        "checkpoint": file.name,
        "encoder": name,
        "settings": reference.record(),
    }
    return QRAGModel(states, actions, QRAGConfig.from_dict(settings)).place(device, dtype)


def _find_checkpoint(folder: Path, checkpoint: str | None) -> Path:
    if checkpoint not in (None, "best", "last"):
        raise ConfigError(f"checkpoint={checkpoint!r} is not known; give 'best', 'last' or None.")
    names = [f"model_{kind}.pt" for kind in ([checkpoint] if checkpoint else ["best", "last"])]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ModelFormatError(f"{folder} holds no {' or '.join(names)}; download the checkpoint.")


def _build_modules(
    reference: ReferenceConfig, folder: Path, encoder: str | Path | None, trust_remote_code: bool
) -> tuple[list[nn.Module], str]:
    """The embedder as the released code uses it, and the name it had there."""
    original = str(reference.get("algo.model.model_name"))
    name = encoder or (folder / original if (folder / original).is_dir() else original)
    try:
        transformer = load_embedder(name, trust_remote_code=trust_remote_code)[0]
    except UnsafeModelError:
        raise
    except ModelFormatError as error:
        raise ModelFormatError(
            f"{error} The checkpoint was trained from {original!r}; pass a folder or hub name of "
            "that embedder as encoder."
        ) from error
    if not isinstance(transformer, Transformer):
        raise ConfigError(f"{name} is no transformer; pass {original!r} or a copy as encoder.")
    size = transformer.get_embedding_dimension()
    if reference.is_bert:
        layers = ("algo.pqn.state_embed.num_hidden_layers", "algo.model.predictor.num_layers")
        _keep_layers(transformer.model, reference.integer(*layers))
        return [transformer, Pooling(size, pooling_mode="mean")], original
    last = Pooling(size, pooling_mode="lasttoken")
    if reference.get("algo.pqn.state_embed.normalize_embeds", default=True):
        return [transformer, last, Normalize()], original
    return [transformer, last], original


def _keep_layers(model: Any, count: int) -> None:
    layers = getattr(getattr(model, "encoder", None), "layer", ())
    if len(layers) < count:
        raise ModelFormatError(
            f"The checkpoint has {count} layers and the embedder, a {type(model).__name__}, "
            f"{len(layers)}; pass the embedder it was trained from as encoder."
        )
    model.encoder.layer = layers[:count]
    model.config.num_hidden_layers = count


class _Ignored:
    """Stands for an object of the training config, and keeps nothing of it."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


# Optimizers of PyTorch up to 2.9 keep their betas as the OmegaConf list they were given, so it lies
# in published checkpoints; nothing of it is needed, and OmegaConf neither.
_STAND_INS: list[Any] = [
    type(name, (_Ignored,), {"__module__": module})
    for module, names in {
        "omegaconf.base": ("ContainerMetadata", "Metadata"),
        "omegaconf.dictconfig": ("DictConfig",),
        "omegaconf.listconfig": ("ListConfig",),
        "omegaconf.nodes": ("AnyNode",),
        "builtins": ("dict", "int", "list"),
        "collections": ("defaultdict",),
        "typing": ("Any",),
    }.items()
    for name in names
]


def _read_weights(file: Path) -> Mapping[str, Any]:
    """Names and values of the critic's weights, mapped from the file, not read into memory."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise UnsafeModelError(
            f"{file} holds more than weights and is not loaded: {reason.splitlines()[0]}"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFormatError(
            f"{file} is damaged or no PyTorch checkpoint ({reason}). Download it again."
        ) from error
    critic = content.get("critic") if isinstance(content, Mapping) else None
    if not isinstance(critic, Mapping):
        raise ModelFormatError(
            f"{file} has no 'critic', so it is no Q-RAG checkpoint; give the folder of one."
        )
    return critic


def _fill(
    modules: Sequence[nn.Module], weights: Mapping[str, Any], prefix: str, file: Path
) -> Encoder:
    """An encoder of these modules with the weights below a prefix."""
    encoder = Encoder(modules)
    model = encoder.transformer.model
    stored = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    expected = model.state_dict()
    problems = {
        "lacks": expected.keys() - stored.keys(),
        "holds, unlike the embedder,": stored.keys() - expected.keys(),
        "holds in other shapes": {
            name
            for name in expected.keys() & stored.keys()
            if expected[name].shape != stored[name].shape
        },
    }
    for problem, all_names in problems.items():
        # a transformer's own pooler is not used
        names = sorted(name for name in all_names if not name.startswith("pooler."))
        if names:
            raise ModelFormatError(
                f"{file} does not fit the embedder, a {type(model).__name__}: below {prefix} it "
                f"{problem} {len(names)} weights ({', '.join(names[:3])} …). Pass the embedder "
                "it was trained from as encoder."
            )
    model.load_state_dict(stored, strict=False)
    return encoder


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert a published checkpoint to a model folder, from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qrag_retriever.reference",
        description="Convert a checkpoint published with the Q-RAG paper to a model folder.",
    )
    parser.add_argument("source", help="folder with config.yaml and model_best.pt or model_last.pt")
    parser.add_argument("target", help="folder to write the model to")
    parser.add_argument("--encoder", help="folder or hub name of the embedder that was trained")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best, else last")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the embedder's own code run"
    )
    options = parser.parse_args(arguments)
    try:
        model = load_reference_checkpoint(
            options.source,
            options.encoder,
            checkpoint=options.checkpoint,
            device="cpu",
            trust_remote_code=options.trust_remote_code,
        )
        folder = model.save_pretrained(options.target)
    except QRAGError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    config = model.config
    print(
        f"Wrote {folder}: {config.training['checkpoint']} of {config.training['source']}, "
        f"{model.dimension} dimensions, positions {config.positions}, {config.max_steps} steps.\n"
        f"Load it with QRAGModel.from_pretrained({str(folder)!r})."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
