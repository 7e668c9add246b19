"""Any sequence of operations on an index, against a plain list of chunks."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, vectors_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.index import ChunkIndex, Snapshot

TEXTS = st.sampled_from(["", "a", "b", "c d", "é\n\u2028", "\0", "😀"])
METADATA = st.dictionaries(
    st.sampled_from(["x", "y"]), st.none() | st.integers(0, 2) | st.text("é", max_size=1)
)


class IndexMachine(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = FakeModel()
        self.index = ChunkIndex(self.model)
        self.expected: list[Chunk] = []
        self.seen: list[tuple[Snapshot, list[Chunk]]] = []

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def check_embedded(self, texts: list[str], had: set[str]) -> None:
        assert sorted(self.model.encoded) == sorted(set(texts) - had)
        self.model.encoded.clear()

    @rule(target=ids, items=st.lists(st.tuples(TEXTS, METADATA), max_size=4))
    def add_new(self, items: list[tuple[str, dict[str, Any]]]) -> Any:
        texts = [text for text, _ in items]
        had = {chunk.text for chunk in self.expected}
        ids = self.index.add(texts, metadatas=[metadata for _, metadata in items])
        assert not set(ids) & {chunk.id for chunk in self.expected}
        self.expected += [
            Chunk(id_, text, metadata) for id_, (text, metadata) in zip(ids, items, strict=True)
        ]
        self.check_embedded(texts, had)
        return multiple(*ids)

    @rule(
        changes=st.lists(
            st.tuples(ids, TEXTS, METADATA), max_size=3, unique_by=lambda change: change[0]
        )
    )
    def add_known(self, changes: list[tuple[str, str, dict[str, Any]]]) -> None:
        items = [Chunk(*change) for change in changes]
        had = {chunk.text for chunk in self.expected}
        version, before = self.index.snapshot().version, list(self.expected)
        assert self.index.add(items) == [chunk.id for chunk in items]
        place = {chunk.id: row for row, chunk in enumerate(self.expected)}
        for chunk in items:
            if chunk.id in place:
                self.expected[place[chunk.id]] = chunk
            else:
                self.expected.append(chunk)
        assert (self.index.snapshot().version != version) == (self.expected != before)
        self.check_embedded([chunk.text for chunk in items], had)

    @rule(ids=st.lists(consumes(ids), max_size=2, unique=True))
    def delete(self, ids: list[str]) -> None:
        there = {chunk.id for chunk in self.expected}
        if set(ids) <= there:
            self.index.delete(ids)
            self.expected = [chunk for chunk in self.expected if chunk.id not in ids]
        else:
            with pytest.raises(InvalidInputError):
                self.index.delete(ids)

    @rule(verify=st.booleans())
    def save_and_load(self, verify: bool) -> None:
        self.index.save(self.folder / "index")
        self.index = ChunkIndex.load(self.folder / "index", model=self.model, verify=verify)

    @rule()
    def save(self) -> None:
        self.index.save(self.folder / "index")

    @rule()
    def unpickle(self) -> None:
        self.index = pickle.loads(pickle.dumps(self.index))
        self.model = self.index.model

    @rule()
    def remember(self) -> None:
        self.seen.append((self.index.snapshot(), list(self.expected)))

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        for snapshot, expected in [*self.seen, (self.index.snapshot(), self.expected)]:
            assert list(snapshot.chunks) == expected
            assert len(snapshot) == len(expected)
            vectors = vectors_of([chunk.embed_text for chunk in expected])
            assert np.array_equal(snapshot.embeddings, vectors)
            assert [snapshot.row_of(chunk.id) for chunk in expected] == [*range(len(expected))]
            matching = [row for row, chunk in enumerate(expected) if chunk.metadata.get("x") == 1]
            for filter_ in ({"x": 1}, lambda chunk: chunk.metadata.get("x") == 1):
                assert snapshot.select(filter_).tolist() == matching


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
TestAnySequenceOfOperations = IndexMachine.TestCase
