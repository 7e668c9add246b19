"""What the tests of the LangChain retriever share: a retriever, every way to ask it, a recorder."""

from __future__ import annotations

import asyncio

from corpus import QUERY, make_index, shared_model
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler

from qrag_retriever.langchain import QRAGRetriever

MODEL = shared_model("relative")
INDEX = make_index(MODEL)


def make(**settings) -> QRAGRetriever:
    return QRAGRetriever(index=INDEX, **settings)


def contents(documents):
    return [(document.id, document.page_content, document.metadata) for document in documents]


def joined(parts):
    return [document for part in parts for document in part]


async def collected(parts):
    return [part async for part in parts]


async def in_every_way(retriever, query=QUERY, config=None, **settings):
    """What each of LangChain's methods returns for one query."""
    return {
        "invoke": retriever.invoke(query, config, **settings),
        "ainvoke": await retriever.ainvoke(query, config, **settings),
        "batch": retriever.batch([query], config, **settings)[0],
        "abatch": (await retriever.abatch([query], config, **settings))[0],
        "stream": joined(retriever.stream(query, config, **settings)),
        "astream": joined(await collected(retriever.astream(query, config, **settings))),
        "transform": joined(retriever.transform(iter([query]), config, **settings)),
    }


class Recorder(BaseCallbackHandler):
    """Writes down what it is told, in order."""

    raise_error = True

    def __init__(self):
        self.events = []

    def write(self, kind, run_id, data, loop=None):
        self.events.append((kind, run_id, data, loop))

    def of(self, *kinds):
        return [data for kind, _, data, _ in self.events if kind in kinds]

    def on_retriever_start(self, serialized, query, *, run_id, **kwargs):
        self.write("start", run_id, {"query": query, **kwargs})

    def on_retriever_end(self, documents, *, run_id, **kwargs):
        self.write("end", run_id, documents)

    def on_retriever_error(self, error, *, run_id, **kwargs):
        self.write("error", run_id, error)

    def on_custom_event(self, name, data, *, run_id, **kwargs):
        self.write("step", run_id, {"name": name, **data})


class AsyncRecorder(AsyncCallbackHandler, Recorder):
    async def on_retriever_start(self, serialized, query, *, run_id, **kwargs):
        self.write("start", run_id, {"query": query, **kwargs}, asyncio.get_running_loop())

    async def on_retriever_end(self, documents, *, run_id, **kwargs):
        self.write("end", run_id, documents, asyncio.get_running_loop())

    async def on_retriever_error(self, error, *, run_id, **kwargs):
        self.write("error", run_id, error, asyncio.get_running_loop())

    async def on_custom_event(self, name, data, *, run_id, **kwargs):
        self.write("step", run_id, {"name": name, **data}, asyncio.get_running_loop())


def steps_of(trajectory):
    return [
        {
            "name": "qrag_step",
            "step": step.step,
            "chunk_id": step.chunk_id,
            "index": step.index,
            "q_value": step.q_value,
            "position": step.position,
        }
        for step in trajectory
    ]
