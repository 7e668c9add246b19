"""An index on disk: one folder that holds the old index or the new one, at every moment.

    manifest.json               format version, model fingerprint, and which files are the index
    chunks-<generation>.sqlite  the chunks
    embeddings-<generation>.npy their embeddings [N, d], as the manifest's dtype says
    scales-<generation>.npy     a factor for each row, float32 [N], of int8 embeddings
    ann-<generation>.faiss      the approximate index, if there is one

A save writes the files of a new generation, then replaces the manifest: that one rename is the
commit. Files that the manifest does not name are leftovers and are removed afterwards. A reader
keeps its files open, so it keeps what it loaded although a writer has since replaced it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import secrets
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from qrag_retriever.ann import AnnKind
from qrag_retriever.chunk_store import ChunkSequence, StoredChunks, damaged, write_chunks
from qrag_retriever.errors import IndexFormatError, InvalidInputError
from qrag_retriever.files import sync_file, sync_folder
from qrag_retriever.vectors import ARRAY_TYPES, StoredVectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

FORMAT = "qrag-index"
FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_OWN_FILE = re.compile(r"(chunks|embeddings|scales|ann)-[0-9a-f]{16}\.(sqlite|npy|faiss)")


@dataclasses.dataclass(frozen=True)
class IndexContent:
    """All that makes up a saved index.

    Attributes:
        chunks: The chunks in document order.
        vectors: Their action embeddings.
        fingerprint: Of the model that made them.
        ann_kind: Its kind of approximate index, or ``"none"``.
        ann: The approximate index as bytes, if it is worth keeping.
        generation: Name of this save among all; empty before it.
    """

    chunks: ChunkSequence
    vectors: StoredVectors
    fingerprint: str
    ann_kind: AnnKind
    ann: NDArray[np.uint8] | None
    generation: str = ""


def write_index(folder: Path, content: IndexContent, replaces: str | None = None) -> str:
    """Save an index in a folder, in place of the index that may be there.

    Args:
        folder: The folder.
        content: The index.
        replaces: The generation that is to be replaced; ``None``: whatever is there.

    Returns:
        The name of this save, its generation.

    Raises:
        InvalidInputError: If a chunk cannot be saved, or the folder holds something else, or
            another generation than it should. Nothing has been written then.
    """
    records = content.chunks.records()
    generation = secrets.token_hex(8)
    files: dict[str, tuple[str, Callable[[Path], object]]] = {
        "chunks": ("sqlite", lambda path: write_chunks(path, records)),
        "embeddings": ("npy", functools.partial(_save_array, content.vectors.values)),
    }
    if content.vectors.scales is not None:
        files["scales"] = ("npy", functools.partial(_save_array, content.vectors.scales))
    if content.ann is not None:
        files["ann"] = ("faiss", content.ann.tofile)
    _require_ours(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        if replaces is not None and generation_of(folder) not in (None, replaces):
            raise InvalidInputError(
                f"The index in {folder} has been saved by someone else since this one was loaded "
                "from it or saved there; load it again and repeat the change, or replace it by "
                "ChunkIndex.save(…, overwrite=True)."
            )
        try:
            written = {
                kind: _write(folder / f"{kind}-{generation}.{ending}", write)
                for kind, (ending, write) in files.items()
            }
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "package_version": importlib.metadata.version("qrag-retriever"),
                "generation": generation,
                "fingerprint": content.fingerprint,
                "dtype": content.vectors.dtype,
                "dimension": content.vectors.shape[1],
                "count": len(content.chunks),
                "ann": content.ann_kind,
                "files": written,
            }
            text = json.dumps(manifest, indent=2).encode()
            draft = folder / f"{_MANIFEST}.tmp"
            _write(draft, lambda path: path.write_bytes(text))
            sync_folder(folder)
            os.replace(draft, folder / _MANIFEST)  # noqa: PTH105 (tests make it fail)
            sync_folder(folder)
        finally:
            _remove_leftovers(folder)
    return generation


def generation_of(folder: Path) -> str | None:
    """The name of the save that a folder holds, ``None`` if it cannot be read."""
    try:
        return str(_read_manifest(folder)["generation"])
    except (IndexFormatError, OSError):
        return None


def read_index(folder: Path, *, verify: bool) -> IndexContent:
    """Open the index in a folder; nothing but headers is read.

    Args:
        folder: Where :func:`write_index` put it.
        verify: Read everything once and compare it with the checksums.

    Raises:
        IndexFormatError: If there is no index, or it is incomplete, corrupt or of another version.
    """
    manifest = _read_manifest(folder)
    try:
        return _open(folder, manifest, verify)
    except FileNotFoundError as error:
        if _read_manifest(folder)["generation"] == manifest["generation"]:
            raise damaged(folder, f"{Path(error.filename).name} is missing") from error
    return read_index(folder, verify=verify)  # a writer has replaced the index in between


def _open(folder: Path, manifest: dict[str, Any], verify: bool) -> IndexContent:
    files = manifest["files"]
    for entry in files.values():
        size = (folder / entry["name"]).stat().st_size
        if size != entry["size"]:
            raise damaged(folder, f"{entry['name']} has {size} bytes instead of {entry['size']}")
    paths = {kind: folder / entry["name"] for kind, entry in files.items()}
    if verify:
        for kind, entry in files.items():
            if _crc32(paths[kind]) != entry["crc32"]:
                raise damaged(folder, f"{entry['name']} does not match its checksum")
    count, dtype = manifest["count"], manifest.get("dtype", "float32")
    if dtype not in ARRAY_TYPES:
        raise IndexFormatError(
            f"The index in {folder} stores embeddings as {dtype!r}; this release reads "
            f"{', '.join(ARRAY_TYPES)}. Upgrade qrag-retriever or build the index again."
        )
    values = _open_array(paths["embeddings"], ARRAY_TYPES[dtype], (count, manifest["dimension"]))
    scales = _open_array(paths["scales"], np.float32, (count,)) if dtype == "int8" else None
    chunks = StoredChunks(paths["chunks"], count)
    ann = np.memmap(paths["ann"], np.uint8, mode="r").view(np.ndarray) if "ann" in paths else None
    vectors = StoredVectors(values, dtype, scales)
    names = manifest["fingerprint"], manifest["ann"]
    return IndexContent(chunks, vectors, *names, ann, manifest["generation"])


def _save_array(array: NDArray[Any], path: Path) -> None:
    np.save(path, array, allow_pickle=False)


def _open_array(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)
    except (ValueError, EOFError) as error:
        raise damaged(path.parent, f"{path.name} has no valid header") from error
    if array.dtype != kind or array.shape != shape:
        raise damaged(path.parent, f"{path.name} does not hold {kind.__name__} {shape}")
    return array


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexFormatError(
            f"There is no index in {folder} (no {_MANIFEST}); give the folder that "
            "ChunkIndex.save() wrote."
        ) from error
    except ValueError as error:
        raise damaged(folder, f"{_MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IndexFormatError(f"{folder / _MANIFEST} does not describe a {FORMAT}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise IndexFormatError(
            f"The index in {folder} has format version {manifest.get('format_version')}; this "
            f"release reads {FORMAT_VERSION}. Upgrade qrag-retriever or build the index again."
        )
    if not _is_complete(manifest):
        raise damaged(folder, f"{_MANIFEST} is incomplete")
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    texts, numbers = ("generation", "fingerprint"), ("dimension", "count")
    files = manifest.get("files")
    # an index of the first releases is float32 and does not say so
    dtype = manifest.get("dtype", "float32")
    needed = {"chunks", "embeddings", *(["scales"] if dtype == "int8" else [])}
    return (
        all(isinstance(manifest.get(name), str) for name in texts)
        and all(isinstance(manifest.get(name), int) for name in numbers)
        and manifest.get("ann") in get_args(AnnKind)
        and isinstance(dtype, str)
        and isinstance(files, dict)
        and needed <= files.keys()
        and all(
            isinstance(entry, dict)
            and _OWN_FILE.fullmatch(str(entry.get("name")))
            and {"size", "crc32"} <= entry.keys()
            for entry in files.values()
        )
    )


def _require_ours(folder: Path) -> None:
    """Refuse a folder with foreign content; leftovers of a save that was cut short are ours."""
    if not folder.exists():
        return
    ours = folder.is_dir()
    if ours:
        try:
            ours = json.loads((folder / _MANIFEST).read_bytes())["format"] == FORMAT
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or a damaged one
            others = {".lock", _MANIFEST, f"{_MANIFEST}.tmp"}
            names = {entry.name for entry in folder.iterdir()} - others
            ours = all(_OWN_FILE.fullmatch(name) for name in names)
            ours = ours and (bool(names) or not (folder / _MANIFEST).exists())
    if not ours:
        raise InvalidInputError(
            f"{folder} holds something that is not an index and is left as it is; give a new or "
            "empty folder, or one with an index to replace."
        )


def _write(path: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    """Have a file written, bring it safely to disk, and describe it."""
    write(path)
    sync_file(path)
    return {"name": path.name, "size": path.stat().st_size, "crc32": _crc32(path)}


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _remove_leftovers(folder: Path) -> None:
    """Remove files of generations that the manifest does not name; what fails is left for later."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: keep all
        keep: set[str] = set()
        with contextlib.suppress(FileNotFoundError):  # the first save did not get that far
            files = json.loads((folder / _MANIFEST).read_bytes())["files"]
            keep = {entry["name"] for entry in files.values()}
        for entry in list(folder.iterdir()):
            if _OWN_FILE.fullmatch(entry.name) and entry.name not in keep:
                entry.unlink()


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Let one writer at a time into a folder; the lock of a process that dies is released."""
    with (folder / ".lock").open("ab") as file:
        with contextlib.suppress(ImportError):  # Windows: writers are not kept apart
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
