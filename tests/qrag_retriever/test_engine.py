"""The engine against the slow search of `slow_search`."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from corpus import IDS, METADATAS, QUERIES, QUERY, TEXTS, make_index, make_model, shared_model
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_search import slow_q, slow_search

from qrag_retriever.engine import MultiStepRetriever
from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.index import ChunkIndex
from qrag_retriever.search import SearchOptions

SCHEMES = {
    "none": {"positions": "none"},
    "absolute": {"positions": "absolute"},
    "continuous": {"positions": "relative"},
    "endpoint": {"positions": "relative", "position_endpoint": True},
    "truncated": {"positions": "relative", "truncate_positions": True},
    "released": {
        "positions": "relative",
        "position_step": 20.0,
        "position_span": 18.0,
        "position_endpoint": True,
        "truncate_positions": True,
    },
}
MODELS = {
    (name, order): make_model(**scheme, state_order=order)
    for name, scheme in SCHEMES.items()
    for order in ("document", "retrieval")
}
CASES = [pytest.param(model, id="-".join(name)) for name, model in MODELS.items()]
RELATIVE = MODELS["continuous", "document"]


def search(index, query=QUERY, model=None, *, k=4, **settings):
    names = ("filter", "exclude_ids", "keep_q_values", "on_step")
    selection = {name: settings.pop(name) for name in names if name in settings}
    engine = MultiStepRetriever(model or index.model, index)
    return engine.search(query, SearchOptions(k=k, **settings), **selection)


def check(trajectory, expected, rows=None):
    rows = range(len(TEXTS)) if rows is None else rows
    assert [step.index for step in trajectory] == [rows[number] for number, _, _ in expected]
    q_values, positions = ([step[column] for step in expected] for column in (1, 2))
    np.testing.assert_allclose([s.q_value for s in trajectory], q_values, rtol=0, atol=1e-5)
    np.testing.assert_allclose([s.position for s in trajectory], positions, rtol=0, atol=1e-9)


def check_same(trajectory, other):
    """Equal but for the rounding of another batch."""
    for one, two in zip(trajectory, other, strict=True):
        assert (one.step, one.chunk, one.index) == (two.step, two.chunk, two.index)
        assert (one.q_value, one.position) == pytest.approx((two.q_value, two.position), abs=1e-5)
        assert [r.chunk_id for r in one.runners_up] == [r.chunk_id for r in two.runners_up]
    assert (trajectory.query, trajectory.stopped) == (other.query, other.stopped)


@pytest.mark.parametrize("model", CASES)
def test_greedy_search(model):
    index = make_index(model)
    for query in QUERIES:
        check(search(index, query, k=5), slow_search(model, TEXTS, query, 5))


@pytest.mark.parametrize("model", CASES)
def test_search_under_a_filter_sees_the_passing_chunks_alone(model):
    rows = [row for row, metadata in enumerate(METADATAS) if metadata["tenant"] == "a"]
    expected = slow_search(model, [TEXTS[row] for row in rows], QUERY, 4)
    check(search(make_index(model), filter={"tenant": "a"}), expected, rows)


@pytest.mark.parametrize("model", CASES)
def test_excluded_chunks_keep_their_place(model):
    free = search(make_index(model), k=2).chunk_ids
    excluded = [IDS.index(chunk_id) for chunk_id in free]
    expected = slow_search(model, TEXTS, QUERY, 4, excluded=excluded)
    check(search(make_index(model), exclude_ids=free), expected)


@pytest.mark.parametrize("model", CASES)
def test_several_chunks_a_step(model):
    trajectory = search(make_index(model), k=5, chunks_per_step=2)
    check(trajectory, slow_search(model, TEXTS, QUERY, 5, chunks_per_step=2))
    assert [step.step for step in trajectory] == [1, 1, 2, 2, 3]


@given(
    data=st.data(),
    name=st.sampled_from(sorted(MODELS)),
    rows=st.sets(st.integers(0, 8), min_size=1),
    k=st.integers(1, 10),
    chunks_per_step=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_everything_at_once(data, name, rows, k, chunks_per_step):
    model, rows = MODELS[name], sorted(rows)
    excluded = data.draw(st.sets(st.sampled_from(rows), max_size=2))
    trajectory = search(
        make_index(model),
        k=k,
        chunks_per_step=chunks_per_step,
        filter=lambda chunk: chunk.metadata["number"] in rows,
        exclude_ids=[IDS[row] for row in excluded],
    )
    expected = slow_search(
        model,
        [TEXTS[row] for row in rows],
        QUERY,
        k,
        excluded=[rows.index(row) for row in excluded],
        chunks_per_step=chunks_per_step,
    )
    check(trajectory, expected, rows)
    assert trajectory.n_candidates == len(rows)


def most_probable_pair(model, texts) -> tuple[int, int]:
    q_of = {b: slow_q(model, texts, QUERY, b)[0] for b in [(), *((i,) for i in range(len(texts)))]}

    def log_policy(before: tuple[int, ...], action: int) -> float:
        free = [q / model.config.alpha for i, q in enumerate(q_of[before]) if i not in before]
        return q_of[before][action] / model.config.alpha - np.logaddexp.reduce(free)

    pairs = itertools.permutations(range(len(texts)), 2)
    return max(pairs, key=lambda pair: log_policy((), pair[0]) + log_policy(pair[:1], pair[1]))


@pytest.mark.parametrize("model", CASES)
def test_a_beam_as_wide_as_it_gets_finds_the_most_probable_trajectory(model):
    index = ChunkIndex.from_texts(TEXTS[:4], model=model)
    trajectory = search(index, k=2, beams=12)
    assert tuple(step.index for step in trajectory) == most_probable_pair(model, TEXTS[:4])


def test_the_models_temperature_decides_between_beams():
    found = set()
    for alpha in (0.001, 0.5):
        model = make_model(positions="relative", alpha=alpha)
        trajectory = search(ChunkIndex.from_texts(TEXTS[:5], model=model), k=2, beams=20)
        found.add(pair := tuple(step.index for step in trajectory))
        assert pair == most_probable_pair(model, TEXTS[:5])
    assert len(found) == 2


@pytest.mark.parametrize("model", CASES)
def test_a_document_behind_a_filter_is_that_document_alone(model):
    documents = [TEXTS[:4], TEXTS[4:]]
    index = ChunkIndex.from_texts(
        [text for document in documents for text in document],
        [{"source": number} for number, document in enumerate(documents) for _ in document],
        model=model,
    )
    for number, document in enumerate(documents):
        alone = search(ChunkIndex.from_texts(document, model=model), k=3)
        within = search(index, k=3, filter={"source": number})
        assert [step.text for step in within] == [step.text for step in alone]
        for one, two in zip(within, alone, strict=True):
            assert one.q_value == pytest.approx(two.q_value, abs=1e-6)
            assert one.position == two.position
            assert len(one.runners_up) == len(two.runners_up)


OPTIONS = {
    "greedy": {},
    "beams": {"beams": 3},
    "several": {"chunks_per_step": 2},
    "sampled": {"temperature": 0.3, "seed": 5},
    "threshold": {"q_threshold": 1.57},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batch_and_stream_and_callback_equal_single_searches(options):
    index = make_index(RELATIVE)
    engine, options = MultiStepRetriever(RELATIVE, index), SearchOptions(k=4, **options)
    selection = {"filter": {"number": {"$ne": 6}}, "exclude_ids": ["fact-1"]}
    told: dict[int, list] = {number: [] for number in range(len(QUERIES))}
    batch = engine.search_batch(
        QUERIES, options, on_step=lambda number, step: told[number].append(step), **selection
    )
    streamed: dict[int, list] = {number: [] for number in range(len(QUERIES))}
    for number, step in engine.stream_batch(QUERIES, options, **selection):
        streamed[number].append(step)
    for number, query in enumerate(QUERIES):
        single = engine.search(query, options, **selection)
        check_same(batch[number], single)
        assert list(engine.stream(query, options, **selection)) == list(single)
        assert told[number] == streamed[number] == list(batch[number])


def test_a_threshold_ends_some_searches_of_a_batch_before_others():
    engine = MultiStepRetriever(RELATIVE, make_index(RELATIVE))
    whole = engine.search_batch(QUERIES, SearchOptions(k=9))
    lowest = [min(step.q_value for step in trajectory) for trajectory in whole]
    threshold = max(lowest) - 1e-4  # one search reaches its end
    batch = engine.search_batch(QUERIES, SearchOptions(k=9, q_threshold=threshold))
    assert {trajectory.stopped for trajectory in batch} == {"budget", "threshold"}
    for trajectory, without in zip(batch, whole, strict=True):
        q_values = [step.q_value for step in without]
        above = next((t for t, q in enumerate(q_values) if q < threshold), len(q_values))
        assert trajectory.chunk_ids == without.chunk_ids[:above]


def test_steps_are_told_one_after_the_other_for_all_queries():
    engine, told = MultiStepRetriever(RELATIVE, make_index(RELATIVE)), []
    engine.search_batch(
        QUERIES,
        SearchOptions(k=3),
        on_step=lambda number, step: told.append((step.step, number)),
    )
    assert told == sorted(told)
    assert len(told) == 9


def test_a_step_is_streamed_before_the_next_state_is_encoded(monkeypatch):
    model = make_model("relative")
    index, encode, passes = make_index(model), model.encode_states, []
    monkeypatch.setattr(
        model, "encode_states", lambda states: passes.append(len(states)) or encode(states)
    )
    steps = MultiStepRetriever(model, index).stream(QUERY, SearchOptions(k=3))
    for number in (1, 2, 3):
        assert next(steps).step == number
        assert len(passes) == number
    assert next(steps, None) is None


def test_one_encoder_pass_a_step_for_all_queries_and_beams(monkeypatch):
    model = make_model()
    index, encode, passes = make_index(model), model.encode_states, []
    monkeypatch.setattr(
        model, "encode_states", lambda states: passes.append(len(states)) or encode(states)
    )
    MultiStepRetriever(model, index).search_batch(QUERIES, SearchOptions(k=3, beams=2))
    assert passes == [3, 6, 6]


def test_more_wanted_than_there_are():
    trajectory = search(make_index(RELATIVE), k=20)
    assert sorted(step.index for step in trajectory) == list(range(9))
    assert trajectory.stopped == "exhausted"
    assert trajectory.steps[-1].runners_up == ()


@pytest.mark.parametrize("model", CASES)
def test_a_single_chunk(model):
    index = ChunkIndex.from_texts([TEXTS[0]], model=model)
    check(search(index, k=1), slow_search(model, [TEXTS[0]], QUERY, 1))


@pytest.mark.parametrize("model", CASES)
def test_equal_chunks_are_retrieved_each_on_its_own(model):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    trajectory = search(ChunkIndex.from_texts(texts, model=model), k=4)
    assert sorted(step.index for step in trajectory) == [0, 1, 2, 3]
    assert len(set(trajectory.chunk_ids)) == 4
    if model.config.positions == "none":
        equal = [step.index for step in trajectory if step.text == TEXTS[0]]
        assert equal == [0, 2, 3]


def test_kept_q_values_are_those_of_every_candidate():
    rows = [row for row in range(9) if row != 3]
    texts = [TEXTS[row] for row in rows]
    trajectory = search(
        make_index(RELATIVE), k=3, filter={"number": {"$ne": 3}}, keep_q_values=True
    )
    taken: list[int] = []
    for step, kept in zip(trajectory, trajectory.q_values, strict=True):
        expected = slow_q(RELATIVE, texts, QUERY, taken)[0]
        expected[taken] = -np.inf
        np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-5)
        taken.append(rows.index(step.index))
    assert trajectory.candidates.tolist() == rows


def test_runners_up_are_the_next_best():
    [step] = search(make_index(RELATIVE), k=1, runners_up=8)
    q, _ = slow_q(RELATIVE, TEXTS, QUERY, ())
    ranked = np.argsort(-q)
    assert [other.index for other in step.runners_up] == ranked[1:].tolist()
    assert [other.chunk_id for other in step.runners_up] == [IDS[row] for row in ranked[1:]]
    np.testing.assert_allclose([r.q_value for r in step.runners_up], q[ranked[1:]], atol=1e-5)


def test_a_filter_that_passes_nothing_gives_an_empty_trajectory():
    for k in (1, 3):
        trajectory = search(make_index(RELATIVE), k=k, filter={"tenant": "nobody"})
        assert (len(trajectory), trajectory.stopped, trajectory.n_candidates) == (0, "exhausted", 0)


def test_everything_excluded_gives_an_empty_trajectory():
    trajectory = search(make_index(), exclude_ids=IDS)
    assert (len(trajectory), trajectory.stopped, trajectory.n_candidates) == (0, "exhausted", 9)


def test_an_excluded_chunk_may_be_filtered_out_as_well():
    plain = search(make_index(RELATIVE), filter={"tenant": "a"})
    check_same(search(make_index(RELATIVE), filter={"tenant": "a"}, exclude_ids=["fact-1"]), plain)


def test_an_empty_index_is_refused():
    with pytest.raises(InvalidInputError, match="no chunks"):
        search(ChunkIndex(shared_model()))


@pytest.mark.parametrize("query", ["", " \n", None, 3])
def test_a_query_without_text_is_refused(query):
    with pytest.raises(InvalidInputError, match="query"):
        search(make_index(), query)


@pytest.mark.parametrize("excluded", [["fact-0", "nowhere"], "fact-0"])
def test_excluded_ids_are_a_list_of_known_ids(excluded):
    with pytest.raises(InvalidInputError, match="id"):
        search(make_index(), exclude_ids=excluded)


def test_an_index_of_another_model_is_refused():
    other = make_model(scale=0.25)
    with pytest.raises(FingerprintMismatchError, match="model"):
        MultiStepRetriever(other, make_index())


def test_models_that_share_an_action_encoder_share_an_index():
    twin = make_model("relative")  # the positions are no part of an embedding
    index = make_index()
    check(search(index, model=twin), slow_search(twin, TEXTS, QUERY, 4))


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize(
    "selection",
    [
        {},
        {"filter": {"tenant": "a"}},
        {"exclude_ids": ["fact-6", "fact-4"]},
        {"filter": {"tenant": "b"}, "exclude_ids": ["fact-1", "fact-2"]},
        {"filter": {"tenant": "nobody"}},
    ],
    ids=["all", "filter", "exclude_ids", "both", "nothing"],
)
@pytest.mark.parametrize("name", sorted({*OPTIONS, "all of them"} - {"sampled"}))
def test_an_approximate_index_of_a_small_corpus_misses_nothing(kind, selection, name):
    options = OPTIONS.get(name, {"k": 30})
    exact, approximate = make_index(), make_index(ann=kind)
    for query in QUERIES:
        expected = search(exact, query, **selection, **options)
        check_same(search(approximate, query, **selection, **options), expected)


def test_a_change_of_the_index_does_not_disturb_a_search():
    undisturbed = search(make_index(RELATIVE))
    index = make_index(RELATIVE)

    def change(_, step):
        thread = threading.Thread(
            target=lambda: (index.delete([step.chunk_id]), index.add([f"New {step.step}."]))
        )
        thread.start()
        thread.join()

    check_same(search(index, on_step=change), undisturbed)
    assert not set(undisturbed.chunk_ids) & {chunk.id for chunk in index.snapshot().chunks}
    assert len(index) == 9


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_draw_may_take_any_chunk_of_an_approximate_index(kind):
    model = make_model()
    found = {
        kind: [
            search(make_index(model, ann=kind), k=1, temperature=1e3, seed=seed).chunk_ids
            for seed in range(30)
        ]
        for kind in (kind, "none")
    }
    assert found[kind] == found["none"]


def test_another_model_is_fingerprinted_again_only_when_it_changed(monkeypatch):
    index, model = make_index(make_model()), make_model()
    computed = []
    digest = type(model.action_encoder).digest

    def counted(encoder, **settings):
        computed.append(encoder)
        return digest(encoder, **settings)

    monkeypatch.setattr(type(model.action_encoder), "digest", counted)
    for _ in range(3):
        search(index, model=model)
    assert computed == [model.action_encoder]
    with torch.no_grad():
        next(model.action_encoder.parameters()).add_(1.0)
    with pytest.raises(FingerprintMismatchError):
        search(index, model=model)


def test_queries_may_come_one_by_one():
    engine = MultiStepRetriever(RELATIVE, make_index(RELATIVE))
    options = SearchOptions(k=2)
    expected = engine.search_batch(QUERIES, options)
    assert engine.search_batch(iter(QUERIES), options) == expected


def test_text_that_is_not_unicode_is_refused():
    index = make_index(RELATIVE)
    with pytest.raises(InvalidInputError, match=r"query is not valid Unicode.*\\udc80"):
        search(index, "Where is \udc80 Mary?")
    with pytest.raises(InvalidInputError, match="chunk is not valid Unicode"):
        index.add(["Mary \ud800 left."])
