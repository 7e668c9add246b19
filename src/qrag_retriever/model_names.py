"""Where a model that is named lies: in this package, in a folder, or on the hub."""

from __future__ import annotations

import difflib
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from qrag_retriever import offline
from qrag_retriever.config import CONFIG_FILE
from qrag_retriever.errors import ModelFormatError

# The model that a retriever takes if none is named: one of those that come with the package.
DEFAULT_MODEL = "multihop-en"
# Those models, in compact form.
_PACKAGED = Path(__file__).with_name("models")


def find(
    path: str | Path, revision: str | None, token: str | None, *, local_files_only: bool
) -> Path:
    """The local folder of a Q-RAG model, downloaded if need be (never code or pickles).

    Raises:
        ModelFormatError: If there is neither such a folder nor such a repository, or it holds no
            Q-RAG model.
    """
    folder = packaged(path) or Path(path).expanduser()
    if not folder.is_dir():
        try:
            downloaded = snapshot_download(
                str(path),
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "*.md"],
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            cut_short = sorted(folder.parent.glob(f".{folder.name}.old-*"))
            hint = f" A save of it was cut short: rename {cut_short[-1]}." if cut_short else ""
            raise ModelFormatError(
                f"No Q-RAG model at {str(path)!r}: there is no such folder, and the hub gave none "
                f"({error}).{hint or ' ' + without_hub(str(path))}"
            ) from error
        folder = Path(downloaded)
    if not (folder / CONFIG_FILE).is_file():
        raise ModelFormatError(
            f"{folder} has no {CONFIG_FILE}, so it is no Q-RAG model. For a plain embedder use "
            "QRAGModel.from_encoder; for a checkpoint of the paper's authors "
            "qrag_retriever.reference.load_reference_checkpoint."
        )
    return folder


def without_hub(name: str) -> str:
    """What can be named without a hub, and which of it may have been meant."""
    known = [*sorted(folder.name for folder in _PACKAGED.iterdir() if folder.is_dir())]
    known.append(offline.DEFAULT_ENCODER)
    short = {one.rpartition("/")[2].lower(): one for one in known}
    near = difflib.get_close_matches(Path(name).name.lower(), short, 1)
    meant = f" Did you mean {short[near[0]]!r}?" if near else ""
    return (
        f"Without a hub there are {', '.join(known)} (the last with 'qrag-retriever[offline]')."
        f"{meant}"
    )


def packaged(name: str | Path) -> Path | None:
    """The folder of a model that comes with the package; a folder of that name here comes first."""
    folder = _PACKAGED / name
    here = Path(name).expanduser().is_dir()
    return folder if len(Path(name).parts) == 1 and folder.is_dir() and not here else None


def default_model() -> Path:
    """The folder of the model that a retriever takes if none is named."""
    return _PACKAGED / DEFAULT_MODEL


def is_qrag_model(path: str | Path) -> bool:
    """Whether a folder, or else a repository on the hub, holds a Q-RAG model."""
    folder = packaged(path) or Path(path).expanduser()
    if folder.is_dir():
        return (folder / CONFIG_FILE).is_file()
    if str(path) == offline.DEFAULT_ENCODER:
        return False  # a plain embedder, whether there is a hub to ask or not
    try:
        hf_hub_download(str(path), CONFIG_FILE)
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError):
        return False  # what is wrong with the name, loading it will tell
    return True
