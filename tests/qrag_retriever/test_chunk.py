from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import (
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)

from qrag_retriever.chunk import Chunk, to_chunks
from qrag_retriever.documents import document_from_chunk
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.nodes import node_from_chunk, node_from_record, node_to_record


class AnnotatedDocument(Document):
    note: str = ""


class AnnotatedNode(TextNode):
    note: str = ""


NODES = [
    TextNode(text="plain"),
    TextNode(text=""),
    TextNode(
        id_="node-1",
        text="all of it",
        metadata={"title": "T", "secret": 1, "nested": {"a": [1, None, 2.5]}},
        excluded_embed_metadata_keys=["secret"],
        excluded_llm_metadata_keys=["title"],
        metadata_template="{key}={value}",
        text_template="<{metadata_str}> {content}",
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc", metadata={"x": 1}),
            NodeRelationship.CHILD: [RelatedNodeInfo(node_id="c1"), RelatedNodeInfo(node_id="c2")],
        },
        start_char_idx=3,
        end_char_idx=12,
    ),
    IndexNode(text="points nowhere", index_id="i"),
    IndexNode(
        text="outer",
        index_id="i",
        obj=IndexNode(text="inner", index_id="j", obj=AnnotatedNode(text="core", note="deep")),
    ),
    ImageNode(text="caption", image="aGVsbG8=", image_mimetype="image/png"),
    ImageDocument(text="caption", image=b"bytes of an image"),
    LlamaDocument(text="a document", metadata={"page": 2}),
    Node(
        text_resource=MediaResource(text="two kinds"),
        image_resource=MediaResource(url="http://example.org/a.png", data=b"more bytes"),
    ),
    AnnotatedNode(text="of a subclass", note="kept"),
]


@given(st.lists(st.sampled_from(["a", "b", "", "\ud800 lone"]), max_size=8))
def test_texts_without_ids_are_all_kept_under_stable_ids(texts: list[str]) -> None:
    chunks = to_chunks(texts)
    assert [chunk.text for chunk in chunks] == texts
    assert len({chunk.id for chunk in chunks}) == len(texts)
    assert to_chunks(texts) == chunks
    longer = to_chunks([*texts, "c"])
    assert longer[:-1] == chunks


def test_a_generated_id_avoids_given_and_taken_ones() -> None:
    first, second, third = (chunk.id for chunk in to_chunks(["same"] * 3))
    assert [c.id for c in to_chunks([Chunk(first, "other"), "same"])] == [first, second]
    assert [c.id for c in to_chunks(["same", Chunk(first, "other")])] == [second, first]
    assert [c.id for c in to_chunks(["same"], taken={first, second}.__contains__)] == [third]


def test_ids_and_metadatas_go_to_their_items() -> None:
    chunks = to_chunks(
        (text for text in ("x", "y")), metadatas=[{"page": 1}, None], ids=[None, "given"]
    )
    assert chunks[0] == Chunk(to_chunks(["x"])[0].id, "x", {"page": 1})
    assert chunks[1] == Chunk("given", "y", {})
    items = [Document("d", id="1"), TextNode(text="n", id_="2"), Chunk("3", "c")]
    assert [chunk.id for chunk in to_chunks(items)] == ["1", "2", "3"]
    assert [chunk.id for chunk in to_chunks(items, ids=["a", None, "b"])] == ["a", "2", "b"]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ("one string", {}, "list of texts"),
        (Chunk("a", "b"), {}, "list of texts"),
        (7, {}, "one int"),
        (["a", 7], {}, "Item 1 is of type int.*str.*Chunk.*Document.*node"),
        ([None], {}, "NoneType"),
        ([{"text": "a"}], {}, "dict"),
        (["a", "b"], {"ids": ["x", "x"]}, "'x' is given twice"),
        ([Document("a", id="x"), TextNode(text="b", id_="x")], {}, "'x' is given twice"),
        (["a"], {"ids": ["x", "y"]}, "1 here; got 2"),
        (["a"], {"ids": "x"}, "list with one entry per item"),
        (["a"], {"ids": [7]}, "non-empty strings"),
        (["a"], {"ids": [""]}, "non-empty strings"),
        (["a"], {"metadatas": [{}, {}]}, "1 here; got 2"),
        (["a"], {"metadatas": [3]}, "metadatas holds 3"),
        (["a"], {"metadatas": 3}, "list with one entry per item"),
        (["a"], {"metadatas": {"page": 1}}, "list with one entry per item"),
        ([Document("a")], {"metadatas": [{"page": 1}]}, "brings its own metadata"),
    ],
)
def test_what_cannot_become_chunks_is_refused(items: object, options: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        to_chunks(items, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "", "text": "t"},
        {"id": 1, "text": "t"},
        {"id": "a", "text": None},
        {"id": "a", "text": "t", "metadata": [1]},
        {"id": "a", "text": "t", "embed_text": 3},
    ],
)
def test_a_chunk_checks_its_fields(fields: dict) -> None:
    with pytest.raises(InvalidInputError):
        Chunk(**fields)


def test_chunks_hash_although_metadata_does_not() -> None:
    assert len({Chunk("a", "t", {"x": [1]}), Chunk("a", "t", {"x": [1]}), Chunk("b", "t")}) == 2


@pytest.mark.parametrize(
    "item", [Document("d", metadata={"tags": ["x"]}), TextNode(text="d", metadata={"tags": ["x"]})]
)
def test_later_writes_into_an_item_do_not_reach_its_chunk(item: Document | TextNode) -> None:
    chunk = to_chunks([item])[0]
    item.metadata["tags"].append("y")
    item.metadata["new"] = 1
    assert chunk.metadata == {"tags": ["x"]}
    assert node_from_chunk(chunk).metadata == {"tags": ["x"]}
    assert document_from_chunk(chunk).metadata == {"tags": ["x"]}


def test_a_documents_metadata_may_have_other_names_than_a_nodes() -> None:
    [chunk] = to_chunks([Document("text", metadata={1: "x", "2": "y"})])
    assert node_from_chunk(chunk).metadata == {"1": "x", "2": "y"}
    assert document_from_chunk(chunk).metadata == {1: "x", "2": "y"}


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.class_name())
def test_a_node_comes_back_whole_and_new(node: Node | TextNode) -> None:
    node.embedding = [1.0, 2.0]
    chunk = to_chunks([node])[0]
    assert chunk.text == node.get_content(metadata_mode=MetadataMode.NONE)
    assert chunk.embed_text == node.get_content(metadata_mode=MetadataMode.EMBED)
    first, second = node_from_chunk(chunk), node_from_chunk(chunk)
    expected = node.model_copy(update={"embedding": None})
    assert type(first) is type(node)
    assert first == expected
    first.metadata["written"] = True
    first.relationships.clear()
    first.excluded_embed_metadata_keys.append("written")
    first.set_content("written")
    assert second == expected
    assert node_from_chunk(chunk) == expected


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.class_name())
def test_a_node_comes_back_from_its_record(node: Node | TextNode) -> None:
    back = node_from_record(node_to_record(node), node.node_id, node.metadata)
    assert type(back) is type(node)
    assert back == node.model_copy(update={"embedding": None})
    inner, expected = getattr(back, "obj", None), getattr(node, "obj", None)
    assert (type(inner), inner) == (type(expected), expected)


def test_the_object_of_an_index_node_is_passed_on() -> None:
    engine = object()
    chunk = to_chunks([IndexNode(text="t", index_id="i", obj=engine)])[0]
    assert node_from_chunk(chunk).obj is engine
    with pytest.raises(InvalidInputError, match="object_map"):
        node_to_record(chunk.source)


def test_a_document_comes_back_new_and_of_its_class() -> None:
    plain = Document("text", metadata={"tags": ["x"]}, id="1")
    special = AnnotatedDocument("text", metadata={}, id="2", note="kept")
    for document, chunk in zip([plain, special], to_chunks([plain, special]), strict=True):
        back = document_from_chunk(chunk)
        assert type(back) is type(document)
        assert back == document
        back.metadata["written"] = True
        back.page_content = "written"
        assert document_from_chunk(chunk) == document


def test_a_document_without_id_gets_that_of_its_text() -> None:
    assert document_from_chunk(to_chunks([Document("t")])[0]).id == to_chunks(["t"])[0].id


def test_chunks_cross_frameworks() -> None:
    node = TextNode(id_="n", text="text", metadata={"a": 1})
    assert document_from_chunk(to_chunks([node])[0]) == Document("text", id="n", metadata={"a": 1})
    document = Document("text", id="d", metadata={"a": 1})
    assert node_from_chunk(to_chunks([document])[0]) == TextNode(
        id_="d", text="text", metadata={"a": 1}
    )


def test_an_id_given_for_a_node_is_the_id_of_its_copies() -> None:
    chunk = to_chunks([TextNode(id_="own", text="t")], ids=["given"])[0]
    assert node_from_chunk(chunk).node_id == "given"


def test_neither_framework_is_imported_unless_in_use() -> None:
    code = (
        "import sys, qrag_retriever.index as i, qrag_retriever.chunk as c; c.to_chunks(['a']);"
        "print({'langchain_core', 'llama_index', 'faiss', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "set()"
