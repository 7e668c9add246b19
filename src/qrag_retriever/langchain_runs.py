"""What a LangChain run hears of a retrieval: its steps, and who else is asked on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
    adispatch_custom_event,
    dispatch_custom_event,
)
from langchain_core.runnables.config import set_config_context

from qrag_retriever.adapter import step_data
from qrag_retriever.collector import in_thread
from qrag_retriever.trajectory import Step

STEP_EVENT = "qrag_step"

_T = TypeVar("_T")


def report(run: CallbackManagerForRetrieverRun, step: Step) -> None:
    """Tell the callbacks of a step."""
    dispatch_custom_event(STEP_EVENT, step_data(step), config={"callbacks": run.get_child()})


async def areport(run: AsyncCallbackManagerForRetrieverRun, step: Step) -> None:
    """As `report`."""
    await adispatch_custom_event(STEP_EVENT, step_data(step), config={"callbacks": run.get_child()})


def inside(run: CallbackManagerForRetrieverRun, items: Iterator[_T]) -> Iterator[_T]:
    """Items; a LangChain retriever that is asked while they are made is a child of the run."""
    with set_config_context({"callbacks": run.get_child()}) as context:
        while (item := context.run(next, items, None)) is not None:
            yield item


async def in_threads(items: Iterator[_T]) -> AsyncIterator[_T]:
    """Items that each take a while to make; meanwhile the event loop goes on."""
    while (item := await in_thread(next, items, None)) is not None:
        yield item
