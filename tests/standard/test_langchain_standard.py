"""LangChain's standard tests for retrievers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import qrag_retriever
import qrag_retriever.langchain

sys.path.append(str(Path(__file__).parents[1] / "qrag_retriever"))  # where the corpus is

integration_tests = pytest.importorskip("langchain_tests.integration_tests")


class Standard(integration_tests.RetrieversIntegrationTests):
    @property
    def retriever_constructor_params(self):
        from corpus import make_index, shared_model

        return {"index": make_index(shared_model("relative"))}

    @property
    def retriever_query_example(self):
        return "Where is the football?"


class TestBothFrameworks(Standard):
    @property
    def retriever_constructor(self):
        return qrag_retriever.QRAGRetriever


class TestLangChainAlone(Standard):
    @property
    def retriever_constructor(self):
        return qrag_retriever.langchain.QRAGRetriever
