from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrag_retriever.state import StateLayout, in_state_order, shorten_evenly

if TYPE_CHECKING:
    from qrag_retriever.model import QRAGModel

CLS, SEP = 101, 102
# every token says which part it is of and where in it
PART = st.integers(0, 30)


def tokens(part: int, length: int) -> list[int]:
    return [1000 * (part + 1) + place for place in range(length)]


def split(ids: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == SEP:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@given(
    query=st.integers(1, 40),
    chunks=st.lists(PART, max_size=12),
    window=st.integers(8, 60),
    query_limit=st.none() | st.integers(4, 40),
    chunk_limit=st.none() | st.integers(4, 40),
)
def test_layout(
    query: int,
    chunks: list[int],
    window: int,
    query_limit: int | None,
    chunk_limit: int | None,
) -> None:
    layout = StateLayout((CLS,), (SEP,), SEP, window, query_limit, chunk_limit)
    given_parts = [tokens(part, length) for part, length in enumerate([query, *chunks])]
    ids, shortened = layout.build(given_parts[0], given_parts[1:])

    assert len(ids) <= window
    assert ids[0] == CLS
    assert ids[-1] == SEP
    parts = split(ids[1:-1])
    assert len(parts[0]) >= 1, "the query is never dropped"
    kept = [given_parts[0], *given_parts[len(given_parts) - len(parts) + 1 :]]
    limits = [query_limit, *[chunk_limit] * len(parts)]
    full = [
        part if limit is None else part[: limit - 2]
        for part, limit in zip(kept, limits, strict=False)
    ]
    assert all(part == whole[: len(part)] for part, whole in zip(parts, full, strict=True))
    whole_length = 2 + sum(map(len, full)) + len(full) - 1
    dropped = len(given_parts) - len(parts)
    assert shortened == (bool(dropped) or whole_length > window)
    if not shortened:
        assert parts == full
    elif not dropped:
        assert len(ids) == window, "no more is cut than must be"
    else:
        # with one chunk more, a token for every part would not fit
        assert 2 + (2 * len(parts) - 1) + 2 > window


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_shorten_evenly(lengths: list[int], spare: int) -> None:
    budget = len(lengths) + spare
    result = shorten_evenly(lengths, budget)
    assert sum(result) == min(sum(lengths), budget)
    pairs = list(zip(result, lengths, strict=True))
    cut = [new for new, old in pairs if new < old]
    assert all(new <= old for new, old in pairs)
    # cut parts end up as long as each other or one more, and no other is longer
    assert not cut or max(result) <= min(cut) + 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 30))
def test_shorten_evenly_leaves_the_shortest_part_longest(lengths: list[int], spare: int) -> None:
    """Against the obvious way: take tokens off the longest part, one at a time."""
    budget = len(lengths) + spare
    slow = list(lengths)
    while sum(slow) > budget:
        slow[slow.index(max(slow))] -= 1
    assert sorted(shorten_evenly(lengths, budget)) == sorted(slow)


def test_of_equally_long_parts_the_first_keeps_one_more() -> None:
    assert shorten_evenly([5, 5, 5], 13) == [5, 4, 4]
    assert shorten_evenly([1, 6, 9, 6], 14) == [1, 4, 5, 4]


def test_without_special_tokens() -> None:
    layout = StateLayout((), (7,), separator=8, window=10)
    assert layout.build([1, 2], [[3], [4, 5]]) == ([1, 2, 8, 3, 8, 4, 5, 7], False)
    assert layout.build([1, 2], []) == ([1, 2, 7], False)


def test_empty_chunks_keep_their_place() -> None:
    layout = StateLayout((CLS,), (SEP,), SEP, window=20)
    ids, _ = layout.build([1], [[], [2], []])
    assert ids == [CLS, 1, SEP, SEP, 2, SEP, SEP]


@pytest.mark.parametrize("text", ["[SEP]", "Mary [SEP] John", "[CLS] Mary [PAD] [SEP]"])
def test_special_text_opens_no_part(tiny_model: QRAGModel, text: str) -> None:
    ids = tiny_model.state_ids([("Who? " + text, [text, text])])[0]
    specials = tiny_model.state_encoder.transformer.tokenizer.all_special_ids
    unknown = tiny_model.state_encoder.transformer.tokenizer.unk_token_id
    found = [token for token in ids if token in specials and token != unknown]
    assert found == [2, 3, 3, 3]  # [CLS], two between three parts, one at the end


def test_order_of_the_state() -> None:
    assert in_state_order([5, 2, 9], "document") == [2, 5, 9]
    assert in_state_order([5, 2, 9], "retrieval") == [5, 2, 9]
    assert in_state_order([5, 2, 9], "document", place=lambda chunk: -chunk) == [9, 5, 2]
