"""Settings, copies and dumps of the LangChain retriever."""

from __future__ import annotations

import copy
import pickle

import pytest
from corpus import QUERY, TEXTS, make_index, make_model
from langchain_core.load import dumpd, dumps
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_helpers import INDEX, MODEL, contents, make

from qrag_retriever.errors import FingerprintMismatchError, InvalidInputError
from qrag_retriever.langchain import QRAGRetriever


def test_settings_come_from_the_model_unless_given():
    index = make_index(make_model(max_steps=5, q_threshold=0.25))
    retriever = QRAGRetriever(index=index)
    assert (retriever.k, retriever.q_threshold) == (5, 0.25)
    assert retriever.model is index.model
    retriever = QRAGRetriever(index=index, k=2, q_threshold=None)
    assert (retriever.k, retriever.q_threshold) == (2, None)


def test_the_other_names_of_settings():
    filters = {"tenant": "a"}
    retriever = make(similarity_top_k=4, filters=filters, embed_model=MODEL)
    assert (retriever.k, retriever.filter) == (4, filters)
    assert (retriever.similarity_top_k, retriever.filters) == (4, filters)
    retriever.similarity_top_k, retriever.filters = 2, None
    assert (retriever.k, retriever.filter) == (2, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kk": 3}, "kk.*Known settings: .*k, q_threshold"),
        ({"k": 0}, "k=0"),
        ({"k": "many"}, "k: .*'many'"),
        ({"beams": 2, "temperature": 1.0}, "exclude each other"),
        ({"k": 2, "similarity_top_k": 3}, "one setting under two"),
        ({"model": 3}, "model"),
        ({"index": TEXTS}, "index"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=f"(?s){message}"):
        QRAGRetriever(**{"index": INDEX, **settings})


def test_an_index_is_needed():
    with pytest.raises(InvalidInputError, match="index"):
        QRAGRetriever(k=3)


def test_an_index_of_another_model_is_refused():
    with pytest.raises(FingerprintMismatchError):
        make(model=make_model(scale=0.25))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("k", 0, InvalidInputError),
        ("k", "many", InvalidInputError),
        ("similarity_top_k", 0, InvalidInputError),
        ("temperature", -1.0, InvalidInputError),
        ("tags", 3, InvalidInputError),
        ("model", make_model(scale=0.25), FingerprintMismatchError),
        ("index", make_index(make_model(scale=0.25)), FingerprintMismatchError),
        ("unknown", 1, InvalidInputError),
    ],
)
def test_an_assignment_that_does_not_fit_changes_nothing(name, value, error):
    retriever = make(tags=["own"])
    before = dict(retriever.__dict__)
    with pytest.raises(error):
        setattr(retriever, name, value)
    assert retriever.__dict__ == before
    assert len(retriever.invoke(QUERY)) == 3


def test_an_assignment_that_fits():
    retriever = make()
    retriever.k = 5
    assert len(retriever.invoke(QUERY)) == 5


def test_a_retriever_equals_itself_alone():
    retriever = make()
    assert retriever == retriever
    assert retriever != make()
    assert len({retriever, retriever, make()}) == 2


def test_a_bound_retriever_passes_calls_on():
    bound = make().with_config(tags=["bound"])
    assert contents(bound.invoke(QUERY)) == contents(make().invoke(QUERY))
    assert len(bound.invoke(QUERY, k=2)) == 2
    assert bound.search(QUERY) == make().search(QUERY)
    assert [step.step for step in bound.stream_search(QUERY)] == [1, 2, 3]
    assert len(make().bind(k=2).invoke(QUERY)) == 2


async def test_configurable_fields(monkeypatch):
    model = make_model()
    retriever = QRAGRetriever(index=make_index(model), score_key="q", tags=["own"])
    monkeypatch.setattr(model, "encode_actions", None)  # nothing is embedded again
    configurable = retriever.configurable_fields(
        k=ConfigurableField(id="k"), filter=ConfigurableField(id="filter")
    )
    config = {"configurable": {"k": 2, "filter": {"tenant": "a"}}}
    expected = contents(retriever.invoke(QUERY, k=2, filter={"tenant": "a"}))
    assert contents(configurable.invoke(QUERY, config)) == expected
    assert contents(await configurable.ainvoke(QUERY, config)) == expected
    assert contents(configurable.with_config(config).invoke(QUERY)) == expected
    assert len(configurable.invoke(QUERY)) == 3


def test_copies_share_the_corpus():
    retriever = make(tags=["own"], metadata={"a": {"b": 1}}, k=2)
    shallow, deep = copy.copy(retriever), copy.deepcopy(retriever)
    for twin in (shallow, deep, retriever.model_copy(update={"k": 4})):
        assert type(twin) is QRAGRetriever
        assert twin is not retriever
        assert (twin.index, twin.model) == (retriever.index, retriever.model)
        twin.k = 5
        assert len(twin.invoke(QUERY)) == 5
    deep.metadata["a"]["b"] = 2
    deep.tags.append("more")
    assert (retriever.k, retriever.tags, retriever.metadata) == (2, ["own"], {"a": {"b": 1}})
    assert copy.deepcopy([retriever])[0].index is INDEX


def test_pickling(tmp_path):
    retriever = make(k=4, filter={"tenant": "a"}, score_key="q", tags=["own"])
    twin = pickle.loads(pickle.dumps(retriever))
    assert contents(twin.invoke(QUERY)) == contents(retriever.invoke(QUERY))
    assert (twin.k, twin.filter, twin.tags) == (4, {"tenant": "a"}, ["own"])
    twin.add_texts(["One more."])
    assert len(twin.index) == len(INDEX) + 1


def test_the_pickle_of_a_saved_retriever_leaves_the_corpus_where_it_is(tmp_path):
    retriever = QRAGRetriever(index=make_index(MODEL))
    retriever.save_local(tmp_path / "saved")
    pickled = pickle.dumps(retriever)
    assert TEXTS[0].encode() not in pickled
    assert contents(pickle.loads(pickled).invoke(QUERY)) == contents(retriever.invoke(QUERY))


def test_nothing_that_is_printed_or_dumped_holds_the_corpus():
    retriever = make(tags=["own"])
    bound = retriever.with_config(tags=["bound"])
    for shown in (
        repr(retriever),
        str(retriever),
        str(retriever.model_dump()),
        retriever.model_dump_json(),
        str(dumpd(retriever)),
        dumps(retriever | RunnableLambda(len)),
        repr(bound),
        dumps(bound),
        repr(retriever.get_graph().to_json()),
    ):
        assert not any(text in shown for text in TEXTS)
        assert "ChunkIndex" not in shown
    assert retriever.model_dump()["k"] == 3


def test_the_schemas_that_servers_ask_for():
    retriever = make()
    assert retriever.get_input_jsonschema()["type"] == "string"
    assert retriever.get_output_jsonschema()["type"] == "array"
    assert retriever.get_prompts() == []
