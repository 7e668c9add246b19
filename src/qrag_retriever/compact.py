"""A model folder in a quarter of the space: 8-bit weights, shared ones once, checked files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qrag_retriever.errors import ModelFormatError
from qrag_retriever.files import check_sha256, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"
_CARD = "README.md"

_PLAIN = "model.safetensors"  # the weights of one encoder
_SCALE = ".scale"
# Smaller matrices are kept as they are: they take no space worth the rounding.
_LARGE = 1 << 9


def is_compact(folder: Path) -> bool:
    """Whether a folder holds a model in this form."""
    return (folder / WEIGHTS).is_file()


def pack(source: Path, target: Path) -> None:
    """Write the compact form of a model folder.

    Each row of a matrix becomes 8-bit integers and one factor, which moves a weight by at most
    1/254 of the largest in its row; vectors become float16. A matrix that both encoders have, such
    as frozen word embeddings, is kept once, and so is a file that both have, such as a tokenizer.

    Args:
        source: Folder that `QRAGModel.save_pretrained` wrote.
        target: An empty folder.
    """
    places: dict[str, str] = {}  # of each tensor, the name it is kept under
    kept: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # of each content, the same
    _copy(source, target, except_for=(_PLAIN,))
    for file in sorted(source.rglob(_PLAIN)):
        name = file.relative_to(source).as_posix()
        for key, tensor in load_file(file).items():
            own = f"{name}:{key}"
            places[own] = names.setdefault(_digest(tensor), own)
            if places[own] == own:
                kept |= _packed(own, tensor)
    save_file(kept, target / WEIGHTS, metadata={"places": json.dumps(places)})
    digests = {f.relative_to(target).as_posix(): sha256_of(f) for f in _files(target)}
    for name in digests.keys() - set(_firsts(digests).values()):
        (target / name).unlink()
    (target / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def unpack(source: Path, target: Path) -> None:
    """Write the plain form of a compact folder, float32.

    Args:
        source: Folder that `pack` wrote.
        target: An empty folder.

    Raises:
        ModelFormatError: If a file is not what the manifest names, or the weights are damaged.
    """
    digests = check_manifest(source)
    firsts = _firsts(digests)
    for name in digests.keys() - {WEIGHTS}:
        _copy_file(source / firsts[digests[name]], target / name)
    for name, tensors in _encoders(source / WEIGHTS).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / name, metadata={"format": "pt"})


def renew_manifest(folder: Path, names: Iterable[str]) -> None:
    """Put the SHA-256 of files that were changed on purpose into the manifest.

    Args:
        folder: Folder that `pack` wrote.
        names: The files, none of which was equal to another.
    """
    file = folder / MANIFEST
    digests = json.loads(file.read_text(encoding="utf-8"))
    digests |= {name: sha256_of(folder / name) for name in names}
    file.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> dict[str, str]:
    """Compare every file with the manifest.

    Returns:
        The SHA-256 of each file of the model by its name. Of equal files the first alone has to be
        in the folder.

    Raises:
        ModelFormatError: If there is no manifest, a file is missing, or it differs.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ModelFormatError(f"{folder} has no {MANIFEST}; copy or install the model again.")
    try:
        digests: dict[str, str] = dict(json.loads(file.read_text(encoding="utf-8")).items())
        if odd := [name for name in digests if PurePosixPath(name).as_posix() != name]:
            raise ValueError(f"{odd[0]!r} is no name of a file")
        stored = {folder / name for name in _firsts(digests).values()}
        repeated = {folder / name for name in digests if (folder / name).exists()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelFormatError(f"{file} is damaged: {error}. Copy the model again.") from error
    if outside := [name for name in digests if not _is_inside(name)]:
        raise ModelFormatError(f"{file} names {min(outside)}, outside the model; do not use it.")
    for path in sorted((stored | repeated) - {folder / _CARD}):  # anyone may edit the card
        check_sha256(path, digests[path.relative_to(folder).as_posix()])
    return digests


def _encoders(file: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of each encoder, float32, by the name of their file.

    Raises:
        ModelFormatError: If the file is damaged, or names a file that is none of an encoder.
    """
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as stored:
            places: dict[str, str] = json.loads(stored.metadata()["places"])
        kept = load_file(file)
        for own, place in places.items():
            name, _, key = own.partition(":")
            found.setdefault(name, {})[key] = _unpacked(kept, place)
    except (ValueError, AttributeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelFormatError(f"{file} is damaged: {error}. Copy the model again.") from error
    if foreign := [n for n in found if not _is_inside(n) or PurePath(n).name != _PLAIN]:
        raise ModelFormatError(f"{file} names {min(foreign)}, no file of weights; do not use it.")
    return found


def _is_inside(name: str) -> bool:
    """Whether a name stays in the folder it is relative to, on any system."""
    return not any(
        path.is_absolute() or path.drive or path.root or ".." in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _firsts(digests: dict[str, str]) -> dict[str, str]:
    """Of the files of each content the first, which is the one that is stored."""
    return {digests[name]: name for name in sorted(digests, reverse=True)}


def _packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not tensor.is_floating_point():
        return {name: tensor}
    if tensor.ndim != 2 or tensor.numel() < _LARGE:
        return {name: tensor.half()}
    scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (tensor / scale).round().to(torch.int8), name + _SCALE: scale}


def _unpacked(kept: dict[str, Tensor], name: str) -> Tensor:
    tensor = kept[name]
    if name + _SCALE in kept:
        return tensor.float() * kept[name + _SCALE]
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


def _copy(source: Path, target: Path, except_for: tuple[str, ...]) -> None:
    for file in _files(source):
        if file.name not in except_for:
            _copy_file(file, target / file.relative_to(source))


def _copy_file(file: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1)
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()
