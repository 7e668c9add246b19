"""What a model may not bring unless whoever made it is trusted: code, pickles, own classes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qrag_retriever.errors import ModelFormatError, UnsafeModelError

if TYPE_CHECKING:
    from pathlib import Path

_CODE = {".py", ".pyc", ".so", ".dll"}
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


def refuse_code(folder: Path) -> None:
    """Refuse a model folder that holds code or pickles, or asks for classes of its own.

    Raises:
        UnsafeModelError: If it does.
        ModelFormatError: If a file that would tell is damaged.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in _CODE | _PICKLES:
            kind = "code" if file.suffix.lower() in _CODE else "a pickle"
            raise UnsafeModelError(
                f"{folder} holds {kind} ({file.relative_to(folder)}) and is not loaded. Remove "
                "the file, or pass trust_remote_code=True if you trust whoever made the model."
            )
    refuse_custom_classes(folder)


def refuse_custom_classes(folder: Path) -> None:
    """Refuse a folder whose settings ask for classes that are not Sentence-Transformers' own.

    Raises:
        UnsafeModelError: If they do.
        ModelFormatError: If one of them is damaged.
    """
    for file in sorted(folder.rglob("*.json")):
        if file.name in ("config.json", "modules.json", "router_config.json"):
            for name in _custom_classes(file):
                raise UnsafeModelError(
                    f"{file.relative_to(folder)} in {folder} asks for the class {name!r}, code "
                    "that comes with the model. Pass trust_remote_code=True if you trust whoever "
                    "made it."
                )


def _custom_classes(file: Path) -> list[str]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, list):
            own, types = [], [module["type"] for module in content]
        else:
            own = list((content.get("auto_map") or {}).values())
            types = list((content.get("types") or {}).values())
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelFormatError(f"{file} is damaged: {error}. Copy or download it again.") from error
    own += [name for name in types if not str(name).startswith("sentence_transformers.")]
    return list(map(str, own))
