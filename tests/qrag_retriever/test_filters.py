"""Oracle for MetadataFilters: LlamaIndex's own in-memory store; for mappings: a table by hand."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
)
from llama_index.core.vector_stores.types import VectorStoreQuery

from qrag_retriever.chunk import Chunk
from qrag_retriever.errors import InvalidInputError
from qrag_retriever.filters import CompiledFilter, compile_filter

numbers = st.integers(0, 3) | st.sampled_from([0.5, 1.0, 2.5])
words = st.text("aAb", max_size=2)
# LlamaIndex's filters hold lists of one type
number_lists = st.lists(st.integers(0, 3), max_size=3)
word_lists = st.lists(words, max_size=3)

OPERATORS: dict[str, dict[FilterOperator, st.SearchStrategy[Any]]] = {
    "year": {
        **dict.fromkeys((FilterOperator.EQ, FilterOperator.NE), numbers),
        **dict.fromkeys(
            (FilterOperator.GT, FilterOperator.GTE, FilterOperator.LT, FilterOperator.LTE), numbers
        ),
        **dict.fromkeys((FilterOperator.IN, FilterOperator.NIN), number_lists),
        FilterOperator.IS_EMPTY: st.none(),
    },
    "name": {
        **dict.fromkeys(
            (
                FilterOperator.EQ,
                FilterOperator.NE,
                FilterOperator.GT,
                FilterOperator.LTE,
                FilterOperator.CONTAINS,
                FilterOperator.TEXT_MATCH,
            ),
            words,
        ),
        **dict.fromkeys((FilterOperator.IN, FilterOperator.NIN), word_lists),
        FilterOperator.IS_EMPTY: st.none(),
    },
    "tags": {
        **dict.fromkeys((FilterOperator.EQ, FilterOperator.NE), word_lists),
        FilterOperator.CONTAINS: words,
        **dict.fromkeys((FilterOperator.ANY, FilterOperator.ALL), word_lists),
        FilterOperator.IS_EMPTY: st.none(),
    },
}


@st.composite
def single_filters(draw: st.DrawFn, keys: tuple[str, ...] = tuple(OPERATORS)) -> MetadataFilter:
    key = draw(st.sampled_from(keys))
    sign = draw(st.sampled_from(list(OPERATORS[key])))
    return MetadataFilter(key=key, operator=sign, value=draw(OPERATORS[key][sign]))


def groups(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[MetadataFilters]:
    return st.builds(
        MetadataFilters,
        filters=st.lists(parts, min_size=1, max_size=3),
        condition=st.sampled_from([*FilterCondition, None]),
    )


# Releases of LlamaIndex differ where a value is None; the tables below say what it means here.
metadata_lists = st.lists(
    st.fixed_dictionaries({"year": numbers, "name": words, "tags": word_lists}),
    min_size=1,
    max_size=6,
)


def llama_index_rows(metadatas: list[dict[str, Any]], filters: MetadataFilters) -> set[int]:
    """Rows that SimpleVectorStore returns; nested groups, which it refuses, are joined here."""
    parts = []
    for part in filters.filters:
        if isinstance(part, MetadataFilters):
            parts.append(llama_index_rows(metadatas, part))
            continue
        store = SimpleVectorStore()
        store.add(
            [
                TextNode(id_=str(row), text="t", metadata=metadata, embedding=[1.0])
                for row, metadata in enumerate(metadatas)
            ]
        )
        query = VectorStoreQuery(
            query_embedding=[1.0],
            similarity_top_k=len(metadatas),
            filters=MetadataFilters(filters=[part]),
        )
        parts.append({int(id_) for id_ in store.query(query).ids or []})
    if filters.condition in (FilterCondition.AND, None):
        return set.intersection(*parts)
    if filters.condition == FilterCondition.OR:
        return set.union(*parts)
    return set(range(len(metadatas))) - set.union(*parts)


def rows(metadatas: list[dict[str, Any]], filter_: object) -> set[int]:
    passes = compile_filter(filter_)
    return {
        row for row, metadata in enumerate(metadatas) if passes(Chunk(str(row), "text", metadata))
    }


@given(metadata_lists, groups(single_filters()))
def test_metadata_filters_select_what_llama_index_selects(
    metadatas: list[dict[str, Any]], filters: MetadataFilters
) -> None:
    assert rows(metadatas, filters) == llama_index_rows(metadatas, filters)


@given(metadata_lists, groups(single_filters() | groups(single_filters())))
def test_nested_metadata_filters_are_joined_as_their_conditions_say(
    metadatas: list[dict[str, Any]], filters: MetadataFilters
) -> None:
    assert rows(metadatas, filters) == llama_index_rows(metadatas, filters)


@given(groups(single_filters(keys=("year",)) | groups(single_filters(keys=("year",)))))
def test_a_chunk_without_the_key_is_matched_by_is_empty_alone(filters: MetadataFilters) -> None:
    def leaves(group: MetadataFilters) -> list[MetadataFilter]:
        return [
            leaf
            for part in group.filters
            for leaf in (leaves(part) if isinstance(part, MetadataFilters) else [part])
        ]

    assume(all(leaf.operator != FilterOperator.IS_EMPTY for leaf in leaves(filters)))
    assert rows([{}, {"name": "a"}], filters) == set()


def llama(**fields: Any) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(**{"key": "k", **fields})])


@pytest.mark.parametrize(
    ("sign", "value", "expected"),
    [
        (FilterOperator.IS_EMPTY, None, {0, 1, 2, 3}),
        (FilterOperator.EQ, "x", {5}),
        (FilterOperator.NE, "x", {1, 2, 3, 4, 6}),
        (FilterOperator.IN, ["x"], {5}),
        (FilterOperator.NIN, ["x"], {1, 2, 3, 4, 6}),
    ],
)
def test_none_is_a_value_and_a_missing_key_is_not(
    sign: FilterOperator, value: Any, expected: set[int]
) -> None:
    metadatas: list[dict[str, Any]] = [
        {},
        *({"k": found} for found in (None, "", [], 0, "x", ["x"])),
    ]
    if sign == FilterOperator.IS_EMPTY:
        metadatas.append({"k": np.zeros(3)})  # nor is an array
    assert rows(metadatas, llama(value=value, operator=sign)) == expected


@pytest.mark.parametrize(
    ("sign", "expected"),
    [
        (FilterOperator.TEXT_MATCH, {2}),
        (FilterOperator.TEXT_MATCH_INSENSITIVE, {2, 3}),
        (FilterOperator.GT, {2, 4}),
        (FilterOperator.CONTAINS, {2}),
    ],
)
def test_text_and_order_do_not_hold_for_none(sign: FilterOperator, expected: set[int]) -> None:
    metadatas: list[dict[str, Any]] = [{}, *({"k": found} for found in (None, "a Bc", "A bC", "b"))]
    assert rows(metadatas, llama(value="a B", operator=sign)) == expected


CORPUS: list[dict[str, Any]] = [
    {"tenant": "a", "year": 1999, "tags": ["x", "y"]},
    {"tenant": "b", "year": 2000, "tags": []},
    {"tenant": "a", "year": 2024, "tags": ["y"], "author": {"name": "N"}},
    {"year": 2024},
    {"tenant": None},
    {},
]


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        ({"tenant": "a"}, {0, 2}),
        ({"tenant": "a", "year": 2024}, {2}),
        ({"tenant": None}, {4}),
        ({"tags": ["y"]}, {2}),
        ({"tenant": {"$eq": "a"}}, {0, 2}),
        ({"author": {"$eq": {"name": "N"}}}, {2}),
        ({"tenant": {"$ne": "a"}}, {1, 4}),
        ({"year": {"$gt": 1999}}, {1, 2, 3}),
        ({"year": {"$gte": 2000}}, {1, 2, 3}),
        ({"year": {"$lt": 2000}}, {0}),
        ({"year": {"$lte": 2000.0}}, {0, 1}),
        ({"year": {"$gt": 1999, "$lt": 2024}}, {1}),
        ({"tenant": {"$in": ["a", "c"]}}, {0, 2}),
        ({"tenant": {"$in": {"a", None}}}, {0, 2, 4}),
        ({"tenant": {"$in": []}}, set()),
        ({"tenant": {"$nin": ("a",)}}, {1, 4}),
        ({"tenant": {"$nin": []}}, {0, 1, 2, 4}),
        ({"tags": {"$contains": "y"}}, {0, 2}),
        ({"tenant": {"$contains": "a"}}, {0, 2}),
        ({"$and": [{"tenant": "a"}, {"year": {"$lt": 2000}}]}, {0}),
        ({"$or": [{"tenant": "b"}, {"year": 2024}]}, {1, 2, 3}),
        ({"$not": {"tenant": "a"}}, {1, 4}),
        # one part that certainly fails settles it, whatever a missing key might have been
        ({"$not": {"tenant": "a", "year": 1999}}, {1, 2, 3, 4}),
        ({"year": {"$not": {"$gt": 2000}}}, {0, 1}),
        ({"tenant": {"$not": {"$gt": "a"}}}, {0, 2, 4}),  # no order holds for None
        ({"tenant": "a", "$or": [{"year": 1999}, {"tags": {"$contains": "z"}}]}, {0}),
        ({"$not": {"$or": [{"tenant": "b"}, {"year": 1999}]}}, {2}),
        (lambda chunk: chunk.metadata.get("year", 0) > 2000, {2, 3}),
    ],
)
def test_mappings_and_functions(filter_: object, expected: set[int]) -> None:
    assert rows(CORPUS, filter_) == expected


def test_values_that_are_not_json_can_be_compared_in_memory() -> None:
    day = dt.date(2024, 5, 1)
    metadatas = [{"day": day}, {"day": day + dt.timedelta(1)}]
    assert rows(metadatas, {"day": {"$gt": day}}) == {1}


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        ("tenant", "type str.*function on Chunk.*mapping.*MetadataFilters"),
        (["tenant"], "type list"),
        (None, "NoneType"),
        ({}, "empty"),
        ({"k": {}}, "empty"),
        (MetadataFilters(filters=[]), "no filter"),
        ({1: "a"}, "keys must be strings"),
        ({"k": {"$regex": "a"}}, r"unknown operator '\$regex'; known: \$eq.*\$not"),
        ({"k": {"gte": 1}}, "unknown operator 'gte'"),
        ({"k": {"$gt": 1, "lt": 3}}, "unknown operator 'lt'"),
        ({"$nor": [{"k": 1}]}, r"'\$nor' cannot stand"),
        ({"$and": []}, "at least one"),
        ({"$or": {"k": 1}}, "list of at least one"),
        ({"$or": [{}]}, "empty"),
        ({"$or": ["k"]}, "takes mappings"),
        ({"$not": [{"k": 1}]}, "takes mappings"),
        ({"k": {"$not": 1}}, "takes mappings"),
        ({"k": {"$in": "abc"}}, "takes a list; got str"),
        ({"k": {"$nin": 3}}, "takes a list; got int"),
        ({"k": {"$gt": None}}, "takes a number or a string; got NoneType"),
        ({"k": {"$lte": [1]}}, "takes a number or a string; got list"),
        (llama(value="abc", operator=FilterOperator.IN), "takes a list; got str"),
        (llama(value="abc", operator=FilterOperator.ANY), "takes a list; got str"),
        (llama(value=3, operator=FilterOperator.TEXT_MATCH), "takes a string; got int"),
    ],
)
def test_what_cannot_be_understood_is_refused(filter_: object, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        compile_filter(filter_)


@pytest.mark.parametrize(
    ("filter_", "found"),
    [
        ({"k": {"$gt": 3}}, "three"),
        ({"k": {"$lte": "three"}}, 3),
        ({"k": {"$contains": "x"}}, 3),
        ({"k": {"$contains": 3}}, "three"),
        (llama(value="x", operator=FilterOperator.TEXT_MATCH), ["x"]),
        (llama(value="x", operator=FilterOperator.TEXT_MATCH_INSENSITIVE), 3),
        (llama(value=["x"], operator=FilterOperator.ALL), 3),
    ],
)
def test_what_cannot_be_compared_is_an_error_that_does_not_show_the_text(
    filter_: object, found: object
) -> None:
    with pytest.raises(InvalidInputError, match=f"on 'k'.*{type(found).__name__}") as caught:
        compile_filter(filter_)(Chunk("id", "text", {"k": found}))
    assert "three" not in str(caught.value)


def test_another_tenants_values_are_not_even_compared() -> None:
    passes = compile_filter({"tenant": "a", "year": {"$gt": 2000}})
    assert not passes(Chunk("id", "text", {"tenant": "b", "year": "n/a"}))


def compiled(filter_: object) -> CompiledFilter:
    result = compile_filter(filter_)
    assert isinstance(result, CompiledFilter)
    return result


def test_equal_filters_have_equal_keys_and_others_do_not() -> None:
    same = {"a": {"$in": ["x", ["y"]]}, "b": {"$eq": {"c": [1]}}}
    assert compiled(same).key == compiled({**same}).key
    filters: list[object] = [
        same,
        {"a": 1},
        {"a": True},
        {"a": 1.0},
        {"a": "1"},
        {"b": 1},
        {"a": {"$ne": 1}},
        {"$not": {"a": 1}},
        {"a": [1]},
        {"a": 1, "b": 1},
        {"$or": [{"a": 1}, {"b": 1}]},
        {"a": {"$in": [1]}},
        {"a": {"$in": {1}}},
    ]
    assert len({compiled(filter_).key for filter_ in filters}) == len(filters)
    assert compiled({"a": bytearray(b"x")}).key is None
    assert compiled(llama(value=1)).key == compiled({"k": 1}).key


@pytest.mark.parametrize("in_a_mapping", [False, True])
@pytest.mark.parametrize("found", [("x", "y"), ["x", "y"]])
@pytest.mark.parametrize("wanted", [("x", "y"), ["x", "y"]])
def test_tuples_are_lists_as_in_a_saved_index(found, wanted, in_a_mapping):
    if in_a_mapping:
        found, wanted = {"q": found}, {"q": wanted}
    metadata = {"p": found}
    for filter_, passes in (
        ({"p": {"$eq": wanted}}, True),
        ({"p": {"$ne": wanted}}, False),
        ({"p": {"$in": [wanted, "z"]}}, True),
        ({"p": {"$nin": [wanted]}}, False),
    ):
        assert compile_filter(filter_).matches(metadata) is passes
