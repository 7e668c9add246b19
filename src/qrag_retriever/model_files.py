"""Models on disk: checked, loaded, written whole or not at all; and uploaded."""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from qrag_retriever import compact
from qrag_retriever.config import CONFIG_FILE, QRAGConfig
from qrag_retriever.errors import (
    ConfigError,
    InvalidInputError,
    ModelFormatError,
)
from qrag_retriever.files import sync_file, sync_folder
from qrag_retriever.fingerprint import Names, write_names
from qrag_retriever.model_trust import refuse_code

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

# Names of what a model folder holds.
_OF_A_MODEL = re.compile(
    r"(query|document)_\d+_\w+|README\.md|weights\.safetensors"
    r"|(qrag_config|router_config|modules|config_sentence_transformers|fingerprint|manifest)\.json"
)

_CARD = """---
library_name: qrag-retriever
tags: [sentence-transformers, retrieval, multi-hop, q-rag]
---

# Q-RAG retriever

Two encoders for multi-step retrieval (Q-RAG, arXiv 2511.07328): ⟨E_s(question and chunks found so
far), E_a(chunk)⟩ is the value of fetching that chunk next.

```python
from qrag_retriever import QRAGModel, QRAGRetriever

retriever = QRAGRetriever.from_texts(chunks, model=QRAGModel.from_pretrained("{name}"))
print(retriever.search("a question whose evidence lies in several places"))
```

Plain Sentence-Transformers load it too, unless it is in compact form: `encode_query` is the state
encoder, `encode_document` the action encoder.

## Settings

```json
{settings}
```
"""


def load(
    folder: Path, *, trust_remote_code: bool = False
) -> tuple[QRAGConfig, list[nn.Module], list[nn.Module]]:
    """Read a model folder.

    Returns:
        The settings, the modules of the state encoder and those of the action encoder.

    Raises:
        ModelFormatError: If files are missing, truncated or of another kind.
        UnsafeModelError: If the folder holds code or pickles and that is not allowed.
        ConfigError: If a setting is unknown or out of range.
    """
    if compact.is_compact(folder):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as plain:
            compact.unpack(folder, Path(plain))
            return load(Path(plain), trust_remote_code=trust_remote_code)
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    config = QRAGConfig.from_json(text)
    if not trust_remote_code:
        refuse_code(folder)
    try:
        loaded = SentenceTransformer(
            str(folder),
            device="cpu",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
        routes = cast("Mapping[str, Sequence[nn.Module]]", loaded[0].sub_modules)
        _check_weights(folder, routes)
        return config, list(routes["query"]), list(routes["document"])
    except Exception as error:
        raise ModelFormatError(
            f"The model in {folder} is incomplete or damaged ({error}). Copy or download it again."
        ) from error


@contextmanager
def saving(
    model: SentenceTransformer,
    config: QRAGConfig,
    folder: Path,
    compactly: bool = False,
    names: Names | None = None,
) -> Iterator[Path]:
    """Write a model folder beside the target; the end of the block puts it in its place.

    So what belongs with the model can be written in the block: if that fails, all stays as it was.
    Other files that lie in the target are kept.

    Args:
        model: The encoders.
        config: Settings.
        folder: The target.
        compactly: Write the compact form.
        names: Of weights in half precision, see `Names`.

    Raises:
        InvalidInputError: If the target holds something other than a Q-RAG model.
        OSError: If the folder cannot be written to, or the disk is full.
    """
    folder = folder.expanduser()
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InvalidInputError(
            f"{folder} is where this process works, and would be replaced as a whole; give a "
            "folder inside it, or work elsewhere."
        )
    if folder.exists() and not (folder / CONFIG_FILE).is_file() and _in_use(folder):
        raise InvalidInputError(
            f"{folder} holds something other than a Q-RAG model and is left as it is; give an "
            "empty or new folder."
        )
    with replacing(folder) as new:
        try:
            if compactly:
                with tempfile.TemporaryDirectory() as plain:
                    _write(model, config, Path(plain), name=folder.name)
                    compact.pack(Path(plain), new)
            else:
                _write(model, config, new, name=folder.name, names=names)
        except SafetensorError as error:  # which is what a full disk is to it
            raise OSError(f"The model cannot be written to {folder} ({error}).") from error
        yield new


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside another, which takes its place at the end of the block, or never.

    What lies in the old folder and is no part of a model, such as ``.git``, is kept.

    Raises:
        InvalidInputError: If the folder is one that cannot be moved.
    """
    folder = folder.resolve()  # a link stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    new, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                sync_file(file)
        if folder.exists():
            new.chmod(stat.S_IMODE(folder.stat().st_mode))
            _move_away(folder, old)
        new.replace(folder)
        sync_folder(folder.parent)
        for entry in list(old.iterdir()) if old.exists() else ():
            if not _OF_A_MODEL.fullmatch(entry.name) and not (folder / entry.name).exists():
                entry.replace(folder / entry.name)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _move_away(folder: Path, old: Path) -> None:
    try:
        folder.replace(old)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InvalidInputError(
            f"{folder} is a mount point or otherwise in use and cannot be replaced as a whole; "
            "give a folder inside it."
        ) from error


def push(
    model: SentenceTransformer,
    config: QRAGConfig,
    repo_id: str,
    private: bool,
    token: str | None,
    names: Names | None = None,
) -> str:
    """Upload a model folder to the hub and return the commit's address."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        _write(model, config, Path(folder), name=repository.repo_id, names=names)
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, commit_message="Upload Q-RAG model"
        )
    return str(commit.commit_url)


def _write(
    model: SentenceTransformer,
    config: QRAGConfig,
    folder: Path,
    name: str,
    names: Names | None = None,
) -> None:
    _require_restorable(model)
    model.save_pretrained(str(folder), create_model_card=False)
    _move_code_up(folder)
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    if names is not None:
        write_names(folder, names)
    (folder / "README.md").write_text(plain_card(name, config), encoding="utf-8")


def plain_card(name: str, config: QRAGConfig) -> str:
    """The model card of a saved model."""
    return _CARD.format(name=name, settings=config.to_json())


def _require_restorable(model: SentenceTransformer) -> None:
    """Refuse to save an activation that its name, which is all a folder holds, does not tell."""
    for module in model.modules():
        function = getattr(module, "activation_function", None)
        if isinstance(function, torch.nn.Module):
            kind = type(function)
            try:
                same = kind.__module__.startswith("torch.") and repr(kind()) == repr(function)
            except TypeError:  # it needs arguments
                same = False
            if not same:
                raise ConfigError(
                    f"The activation {function!r} of a {type(module).__name__} would be another "
                    "when the model is loaded again; use one of torch.nn with default settings."
                )


def _move_code_up(folder: Path) -> None:
    """Put an encoder's own code, which is saved with the encoder, where loading looks for it."""
    for file in sorted(folder.glob("*/*.py")):
        place = folder / file.name
        if place.exists() and place.read_bytes() != file.read_bytes():
            raise ConfigError(
                f"The two encoders bring different code under one name, {file.name}, and cannot be "
                "saved together; rename one of the files."
            )
        file.replace(place)


def _in_use(path: Path) -> bool:
    return path.is_file() or any(path.iterdir())


def _check_weights(folder: Path, routes: Mapping[str, Sequence[nn.Module]]) -> None:
    """Compare the stored weights with the modules': a missing one would stay random, unnoticed."""
    structure = json.loads((folder / "router_config.json").read_text(encoding="utf-8"))["structure"]
    for route, module_ids in structure.items():
        for module_id, module in zip(module_ids, routes[route], strict=True):
            file = folder / module_id / "model.safetensors"
            if isinstance(module, Transformer) and file.is_file():
                with safe_open(file, framework="pt") as stored:
                    missing = {name for name, _ in module.model.named_parameters()}
                    missing -= set(stored.keys())
                if missing:
                    raise KeyError(f"{file.name} of {module_id} lacks {sorted(missing)[:3]}")
