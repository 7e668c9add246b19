"""Embeds many chunks part by part: on several devices, and so that a killed build can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import pickle
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm
from typing_extensions import TypedDict, Unpack

from qrag_retriever.errors import IndexFormatError, InvalidInputError, QRAGError
from qrag_retriever.files import whole_file
from qrag_retriever.vectors import StoredVectors, checked_vectors

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from multiprocessing.queues import SimpleQueue

    from numpy.typing import NDArray

    from qrag_retriever.model import QRAGModel
    from qrag_retriever.vectors import StorageType

_PART = 8192  # texts embedded, and kept in a checkpoint, together


class Embedding(TypedDict, total=False):
    """How chunks are embedded.

    Attributes:
        show_progress: Show a progress bar.
        devices: Devices that share the work, such as ``["cuda:0", "cuda:1"]`` or ``["cpu"] * 4``,
            each with a process and a copy of the model of its own; by default the model embeds
            where it is. As with every use of processes, a script starts them under
            ``if __name__ == "__main__"``.
        checkpoint: A folder for what was embedded already: the same call after an interruption
            embeds the rest alone. It may be deleted once the index is saved.
    """

    show_progress: bool
    devices: Sequence[str] | None
    checkpoint: str | Path | None


def embed_new(
    texts: Sequence[str],
    rows: Sequence[int | None],
    stored: StoredVectors,
    model: QRAGModel,
    **embedding: Unpack[Embedding],
) -> StoredVectors:
    """Embeddings of texts, of which some are known; equal ones are embedded once.

    Args:
        texts: n texts.
        rows: For each text the row of ``stored`` that holds its embedding, or ``None``.
        stored: Embeddings of the same model.
        model: Embeds the others.
        **embedding: See `Embedding`.

    Returns:
        ``[n, d]``, stored as ``stored`` is. Errors as `embed`.
    """
    known = {place: row for place, row in enumerate(rows) if row is not None}
    there = stored.take(list(known.values()))
    if len(known) == len(texts):
        return there
    new: dict[str, int] = {}
    for place, text in enumerate(texts):
        if place not in known:
            new.setdefault(text, len(new))
    vectors = embed(list(new), model, stored.dtype, **embedding)
    if len(new) < len(texts):
        vectors = vectors.take([new.get(text, 0) for text in texts])
    return vectors.replaced(list(known), there) if known else vectors


def embed(
    texts: Sequence[str],
    model: QRAGModel,
    dtype: StorageType,
    *,
    show_progress: bool = False,
    devices: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
) -> StoredVectors:
    """Embeddings of texts, as they are to be stored.

    Args:
        texts: n different texts.
        model: Embeds them.
        dtype: How to store them.
        show_progress: See `Embedding`, and so the others.
        devices: See there.
        checkpoint: See there.

    Raises:
        InvalidInputError: If the model gives anything but finite vectors of its dimension.
        IndexFormatError: If the checkpoint is damaged.
        QRAGError: If a process ended unexpectedly.
    """
    if isinstance(devices, str):
        raise InvalidInputError(f"devices is a list of names; give [{devices!r}].")
    if devices is not None and not isinstance(devices, Sequence):
        raise InvalidInputError(f"devices={devices!r}; give a list of names, such as ['cpu'].")
    workers = len(devices or [None])
    size = _PART if checkpoint else min(_PART, -(-len(texts) // workers))
    parts = [texts[first : first + size] for first in range(0, len(texts), size)]
    if len(parts) == 1 and not devices and not checkpoint:  # the model's own bar is finer
        vectors = model.encode_actions(texts, show_progress=show_progress)
        return _stored(vectors, texts, model, dtype)
    files: list[Path | None] = [None] * len(parts)
    if checkpoint:
        folder = Path(checkpoint).expanduser()
        if folder.exists() and not folder.is_dir():
            raise InvalidInputError(f"checkpoint={str(checkpoint)!r} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = model.fingerprint
        files = [folder / _name(part, fingerprint, dtype) for part in parts]
    there = [file is not None and file.exists() for file in files]
    missing = [part for part, found in zip(parts, there, strict=True) if not found]

    def all_parts() -> Iterator[StoredVectors]:
        with (
            contextlib.closing(_encoded(missing, model, devices)) as encoded,
            tqdm(total=len(texts), unit="chunk", disable=not show_progress) as bar,
        ):
            for part, file, found in zip(parts, files, there, strict=True):
                if file is not None and found:
                    vectors = _read(file, dtype, (len(part), model.dimension))
                else:
                    vectors = _stored(next(encoded), part, model, dtype)
                    if file is not None:
                        _write(file, vectors)
                bar.update(len(part))
                yield vectors

    return StoredVectors.gathered(all_parts(), (len(texts), model.dimension), dtype)


def _stored(
    vectors: NDArray[np.float32], texts: Sequence[str], model: QRAGModel, dtype: StorageType
) -> StoredVectors:
    shape = (len(texts), model.dimension)
    return StoredVectors.of(checked_vectors(vectors, shape, "the model's embeddings"), dtype)


def _encoded(
    parts: Sequence[Sequence[str]], model: QRAGModel, devices: Sequence[str] | None
) -> Generator[NDArray[np.float32]]:
    """Embeddings of each part in order."""
    if not devices:
        for part in parts:
            yield model.encode_actions(part)
        return
    import torch

    try:
        for device in devices:
            torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"devices={list(devices)!r}: {device!r} cannot be used here ({error}); give names such "
            "as 'cuda:0' or 'cpu'."
        ) from error
    context = multiprocessing.get_context("spawn")  # a fork would share the GPU and the threads
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    threads = max(1, torch.get_num_threads() // len(devices))
    try:
        # in a file: what is sent to a process that ends at once would be waited for without end
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = Path(folder, "model")
            file.write_bytes(pickle.dumps(model))
            start = (file, free, threads)
            with ProcessPoolExecutor(len(devices), context, _start, start) as pool:
                yield from pool.map(_encode, parts)
    except BrokenProcessPool as error:
        raise QRAGError(
            "A process that embeds chunks has ended (out of memory, killed, or started by a script "
            "without `if __name__ == '__main__'`). With checkpoint= the same call goes on where "
            "this one stopped."
        ) from error


_worker: dict[str, Any] = {}  # in a process of its own: the model


def _start(file: Path, free: SimpleQueue[str], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    model = pickle.loads(file.read_bytes())  # noqa: S301 (our own parent's)
    _worker["model"] = model.to(free.get())


def _encode(texts: Sequence[str]) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = _worker["model"].encode_actions(texts)
    return vectors


def _name(texts: Sequence[str], fingerprint: str, dtype: StorageType) -> str:
    """A file name that says whose embeddings a part's file holds."""
    digest = hashlib.sha256(json.dumps([fingerprint, dtype, *texts]).encode())
    return f"{digest.hexdigest()[:32]}.npz"


def _write(file: Path, vectors: StoredVectors) -> None:
    """Keep a part, whole or not at all."""
    scales = {} if vectors.scales is None else {"scales": vectors.scales}
    with whole_file(file) as draft, draft.open("wb") as out:
        np.savez(out, allow_pickle=False, values=vectors.values, **scales)


# what reading a damaged archive raises
_DAMAGED = (
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
)


def _read(file: Path, dtype: StorageType, shape: tuple[int, int]) -> StoredVectors:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            vectors = StoredVectors(arrays["values"], dtype, arrays.get("scales"))
        if vectors.shape != shape:
            raise ValueError(f"{vectors.shape} instead of {shape}")
    except _DAMAGED as error:
        raise IndexFormatError(
            f"The checkpoint {file} is damaged ({error}); delete this file, and what it held is "
            "embedded again."
        ) from error
    return vectors
