"""What both retrievers share: settings, search, constructors, storage."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Self, TypedDict, Unpack

from qrag_retriever.config import CONFIG_FILE
from qrag_retriever.constructors import ALIASES, Constructors, resolve_aliases
from qrag_retriever.corpus import AllOf, Corpus
from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.errors import (
    FingerprintMismatchError,
    IndexFormatError,
    InvalidInputError,
    QRAGError,
)
from qrag_retriever.files import whole_file
from qrag_retriever.index import ChunkIndex
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import resolve_model
from qrag_retriever.search import SearchOptions
from qrag_retriever.second_stage import SecondStage
from qrag_retriever.state import check_query

if TYPE_CHECKING:
    from qrag_retriever.trajectory import Step, Trajectory

# settings of a retriever that are handed to `SearchOptions`, and of what they choose from
SEARCH_SETTINGS = ("k", "q_threshold", "beams", "temperature", "seed", "chunks_per_step")
_SELECTION = ("filter", "exclude_ids", "keep_q_values")
_SETTINGS_FILE = "retriever.json"
# further ones that some classes have and a saved retriever keeps
_EXTRA_SETTINGS = ("score_key", "verbose")
# Entry of that file on the model in the folder: `save_local` wrote it, found it there, or has none.
_MODEL_ENTRY = "model"
_WRITTEN, _FOUND = "written", "found"


class SearchOverrides(TypedDict, total=False):
    """Settings of a retriever that a single call may change."""

    k: int
    similarity_top_k: int
    q_threshold: float | None
    beams: int
    temperature: float | None
    seed: int | None
    chunks_per_step: int
    runners_up: int
    filter: Any
    filters: Any
    exclude_ids: Collection[str]
    keep_q_values: bool


_PER_CALL = tuple(name for name in SearchOverrides.__annotations__ if name not in ALIASES)


NEEDS = (
    "index must be a ChunkIndex and model a QRAGModel; from_texts, from_documents and the other "
    "constructors make them for you."
)


def fill_in(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under our names, with what follows from the index and the model filled in.

    Raises:
        InvalidInputError: If a setting is given under two names with different values.
    """
    result = resolve_aliases(settings)
    index = result.get("index")
    if isinstance(index, Corpus) and result.get("model") is None:
        result["model"] = index.model
    model = result.get("model")
    if isinstance(model, (str, Path)):
        result["model"] = model = resolve_model(model)
    if isinstance(model, QRAGModel):
        if result.get("k") is None:
            result["k"] = model.config.max_steps
        result.setdefault("q_threshold", model.config.q_threshold)
    return result


class RetrieverAdapter(Constructors):
    """Everything a retriever does that is no framework's business.

    A class that inherits from it has the attributes ``index``, ``model``, ``filter`` and
    `SEARCH_SETTINGS`.
    """

    if TYPE_CHECKING:
        index: Corpus
        model: QRAGModel
        k: int
        filter: Any

    @property
    def similarity_top_k(self) -> int:
        """The same as ``k``, under LlamaIndex's name."""
        return self.k

    @similarity_top_k.setter
    def similarity_top_k(self, value: int) -> None:
        self.k = value

    @property
    def filters(self) -> Any:
        """The same as ``filter``, under LlamaIndex's name."""
        return self.filter

    @filters.setter
    def filters(self, value: Any) -> None:
        self.filter = value

    def search(self, query: str, **overrides: Unpack[SearchOverrides]) -> Trajectory:
        """Retrieve in several steps and tell why each chunk was chosen.

        Args:
            query: The question.
            **overrides: Settings for this call: ``k``, ``q_threshold``, ``beams``, ``temperature``,
                ``seed``, ``chunks_per_step``, ``runners_up`` (how many next best chunks of each
                step to tell), ``filter``, ``exclude_ids``; and ``keep_q_values`` (on), which
                `Trajectory.plot` needs.

        Returns:
            The trajectory.

        Raises:
            InvalidInputError: If the query is empty, the index holds no chunks, or a setting is
                unknown or out of range.
        """
        options, selection = self._call_settings({"keep_q_values": True, **overrides})
        return self._engine.search(query, options, **selection)

    def search_batch(
        self,
        queries: Sequence[str],
        *,
        on_step: Callable[[int, Step], None] | None = None,
        **overrides: Unpack[SearchOverrides],
    ) -> list[Trajectory]:
        """Search for several queries with one encoder pass a step for all of them.

        Args:
            queries: The questions.
            on_step: Called with the number of the query and each step, when `stream_search` would
                give it.
            **overrides: As `search`; ``keep_q_values`` is off.

        Returns:
            One trajectory a query.
        """
        options, selection = self._call_settings(overrides)
        return self._engine.search_batch(queries, options, on_step=on_step, **selection)

    def stream_search(self, query: str, **overrides: Unpack[SearchOverrides]) -> Iterator[Step]:
        """The steps of `search`, each as soon as it is taken; with several beams at the end."""
        return (step for _, step in self.stream_search_batch([query], **overrides))

    def stream_search_batch(
        self, queries: Sequence[str], **overrides: Unpack[SearchOverrides]
    ) -> Iterator[tuple[int, Step]]:
        """The steps of `search_batch`, as `stream_search`, each with the number of its query."""
        options, selection = self._call_settings(overrides)
        return self._engine.stream_batch(queries, options, **selection)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: Iterable[Mapping[str, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
    ) -> list[str]:
        """Add chunks behind those that are there and return their ids.

        An id that is there already is updated in its place; unchanged text is not embedded again.
        """
        return self.index.add(texts, metadatas=metadatas, ids=ids)

    def add_documents(self, documents: Iterable[Any]) -> list[str]:
        """Add LangChain Documents, LlamaIndex nodes, texts or chunks; as `add_texts`."""
        return self.index.add(documents)

    def delete(self, ids: Sequence[str]) -> bool:
        """Delete chunks.

        Raises:
            InvalidInputError: If an id is unknown; then nothing is deleted.
        """
        self.index.delete(ids)
        return True

    def save_local(self, folder_path: str | Path, *, include_model: bool = True) -> None:
        """Write index, settings and model to a folder.

        A filter is not written, nor what belongs to a framework alone (``tags``, ``metadata``,
        callbacks): give it again when loading. Index and model change one right after the other;
        who loads just between them, or after a power failure there, is told that they do not fit.

        Args:
            folder_path: The folder; what `save_local` wrote there before is replaced.
            include_model: Write the model too, so that `load_local` needs nothing else; otherwise
                another one that `save_local` wrote there before goes. Where this model is there
                already, it stays.

        Raises:
            InvalidInputError: If the folder holds something else under the names of index, model or
                settings, or the index cannot be saved. Nothing has changed then.
            FingerprintMismatchError: If the model has changed since the index was made. Likewise.
            OSError: If the folder cannot be written to, or the disk is full. Likewise.
        """
        folder = Path(folder_path).expanduser()
        target, settings = folder / "model", folder / _SETTINGS_FILE
        if folder.exists() and not folder.is_dir():
            raise InvalidInputError(f"{folder} is a file; name a folder.")
        if settings.exists() and not _is_ours(settings):
            raise InvalidInputError(
                f"{settings} was not written by save_local, and is left as it is; give another "
                "folder."
            )
        there, ours = _is_model(target, self.model), _wrote_model(settings)
        if include_model and not there and not ours and (target / CONFIG_FILE).is_file():
            raise InvalidInputError(
                f"{target} holds another model, which save_local did not write, and is left as it "
                "is; give another folder, or include_model=False."
            )
        if include_model and self.model.fingerprint != self.index.fingerprint:
            raise FingerprintMismatchError(
                "The model has changed since the index was made, and the two would not fit when "
                "they are loaded. Make the index again, or save with include_model=False."
            )
        entry = (_WRITTEN if ours or not there else _FOUND) if include_model or there else None
        saved = {**self._search_settings(), **self._extra_settings(), _MODEL_ENTRY: entry}
        text = json.dumps(saved, indent=2, default=np.generic.item)
        # a corpus that cannot be saved says so before anything is written
        write_model = include_model and not there and isinstance(self.index, ChunkIndex)
        with self.model.saving(target) if write_model else contextlib.nullcontext():
            self.index.save(folder / "index")
        with whole_file(settings) as new:
            new.write_text(text, encoding="utf-8")
        if ours and entry is None:
            target.unlink() if target.is_symlink() else shutil.rmtree(target, ignore_errors=True)

    @classmethod
    def load_local(
        cls,
        folder_path: str | Path,
        model: QRAGModel | str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Load what `save_local` wrote; embeddings are mapped, not read.

        Args:
            folder_path: The folder.
            model: The model; ``None``: the one in the folder.
            **settings: Settings that differ from those saved.

        Raises:
            IndexFormatError: If the folder holds no retriever, or its files are damaged.
            FingerprintMismatchError: If the index was made by another model.
        """
        folder = Path(folder_path).expanduser()
        saved = _read_settings(folder / _SETTINGS_FILE)
        has_model = saved.pop(_MODEL_ENTRY, _FOUND) and (folder / "model").is_dir()
        for name in set(_EXTRA_SETTINGS) - set(cls._extra_names()):
            saved.pop(name, None)  # of the other framework
        settings = resolve_aliases({"model": model, **settings})
        given = settings.pop("model")
        if given is None and not has_model:
            raise IndexFormatError(
                f"There is no model in {folder}; give model=, the one the index was made with."
            )
        loaded = resolve_model(folder / "model" if given is None else given)
        index = ChunkIndex.load(folder / "index", model=loaded)
        return cls(index=index, **{**saved, **settings})  # type: ignore[call-arg]

    async def _prepared(self, queries: Sequence[str]) -> Self:
        """This retriever; where another one has to be asked first, a copy that has the answers."""
        if not isinstance(self.index, SecondStage):
            return self
        self._check_call(queries, {})
        return self._over(await self.index.fetched(queries))

    def _over(self, index: Corpus) -> Self:
        """A copy of this retriever over another corpus."""
        twin = copy.copy(self)
        twin.__dict__["index"] = index
        return twin

    def _check_call(self, queries: Iterable[str], overrides: Mapping[str, Any]) -> None:
        """Refuse what a search would refuse, before another retriever is asked."""
        options, selection = self._call_settings(overrides)
        self.index.check(options, selection["filter"])
        for query in queries:
            check_query(query)

    @property
    def _engine(self) -> MultiStepRetriever:
        return MultiStepRetriever(self.model, self.index)

    def _check_settings(self) -> None:
        """Refuse settings that no call could use, and an index of another model."""
        self.index.check(SearchOptions(**self._search_settings()), self.filter)
        self._engine  # noqa: B018 (checks that model and index belong together)

    def _search_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SEARCH_SETTINGS}

    @classmethod
    def _extra_names(cls) -> list[str]:
        """Which of `_EXTRA_SETTINGS` the class has."""
        return [name for name in _EXTRA_SETTINGS if name in getattr(cls, "model_fields", ())]

    def _extra_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._extra_names()}

    def _call_settings(self, overrides: Mapping[str, Any]) -> tuple[SearchOptions, dict[str, Any]]:
        given = resolve_aliases(overrides)
        if "filters" in overrides:  # None, too, takes the place of the retriever's own
            given.setdefault("filter", overrides["filters"])
        unknown = sorted(set(given) - set(_PER_CALL))
        if unknown:
            raise InvalidInputError(
                f"Unknown setting {', '.join(map(repr, unknown))}; a call may change "
                f"{', '.join(_PER_CALL)}."
            )
        selection = {name: given.pop(name) for name in _SELECTION if name in given}
        selection.setdefault("filter", self.filter)
        own, asked = self.filter, selection["filter"]
        if self.index.adds_filters and own is not None and asked is not own:
            selection["filter"] = own if asked is None else AllOf(own, asked)
        return SearchOptions(**{**self._search_settings(), **given}), selection


def _is_ours(settings: Path) -> bool:
    """Whether a settings file was written by `save_local`, or is damaged."""
    try:
        return _MODEL_ENTRY in json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return True


def _wrote_model(settings: Path) -> bool:
    """Whether the model beside the settings was written by `save_local`."""
    try:
        return bool(_read_settings(settings).get(_MODEL_ENTRY) == _WRITTEN)
    except IndexFormatError:
        return False


def _is_model(folder: Path, model: QRAGModel) -> bool:
    """Whether a folder holds this very model, or the full weights that it was rounded from."""
    try:
        there = QRAGModel.from_pretrained(folder, device="cpu") if folder.is_dir() else None
    except QRAGError:
        return False
    if there is None or there.config != model.config or there.fingerprint != model.fingerprint:
        return False
    there.to(next(model.parameters()).dtype)
    return all(
        one.digest() == other.digest()
        for one, other in (
            (there.state_encoder, model.state_encoder),
            (there.action_encoder, model.action_encoder),
        )
    )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise TypeError("it holds no settings")
    except (OSError, TypeError, ValueError) as error:
        raise IndexFormatError(
            f"{file} is missing or damaged ({error}); give a folder that save_local wrote, or save "
            "the retriever again."
        ) from error
    return saved


def step_data(step: Step) -> dict[str, Any]:
    """A step as the frameworks' events carry it."""
    data = step.to_dict()
    return {name: data[name] for name in ("step", "chunk_id", "index", "q_value", "position")}
