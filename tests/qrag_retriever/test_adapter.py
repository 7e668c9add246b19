"""What all retrievers share: constructors, search, changes of the corpus, storage."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from corpus import (
    IDS,
    METADATAS,
    QUERIES,
    QUERY,
    TEXTS,
    encoder_folder,
    make_index,
    make_model,
    model_copy_in,
    shared_model,
)
from langchain_core.documents import Document
from sentence_transformers import SentenceTransformer

from qrag_retriever import (
    ChunkIndex,
    QRAGEmbedding,
    QRAGEmbeddings,
    QRAGModel,
    QRAGRetriever,
    langchain,
    llama_index,
    model_files,
)
from qrag_retriever import index as index_module
from qrag_retriever.adapter import resolve_aliases
from qrag_retriever.errors import (
    FingerprintMismatchError,
    IndexFormatError,
    InvalidInputError,
    QRAGError,
)

MODEL = shared_model("relative")
KINDS = [langchain.QRAGRetriever, llama_index.QRAGRetriever]
SETTINGS = {
    "k": 4,
    "q_threshold": 0.5,
    "beams": 2,
    "temperature": None,
    "seed": 7,
    "chunks_per_step": 2,
}

either = pytest.mark.parametrize("kind", KINDS, ids=["langchain", "llama_index"])


def make(kind=langchain.QRAGRetriever, **settings):
    return kind(index=make_index(MODEL), **settings)


# constructors


@either
def test_from_texts(kind):
    retriever = kind.from_texts(TEXTS, METADATAS, IDS, model=MODEL, k=4)
    assert retriever.search(QUERY) == make(kind, k=4).search(QUERY)
    assert retriever.model is MODEL


@either
def test_from_texts_with_a_folder_as_the_model(kind, tmp_path):
    for settings in (
        {"model": model_copy_in(tmp_path, "relative")},
        {"model": tmp_path / "model"},
        {"embed_model": str(tmp_path / "model")},
    ):
        found = kind.from_texts(iter(TEXTS), iter(METADATAS), iter(IDS), **settings).search(QUERY)
        assert found.chunk_ids == make(kind).search(QUERY).chunk_ids


@either
def test_from_texts_with_an_untrained_embedder(kind):
    retriever = kind.from_texts(TEXTS, model=encoder_folder())
    assert retriever.model.config.positions == "none"
    assert len(retriever.search(QUERY)) == retriever.model.config.max_steps


@either
def test_from_documents_takes_any_mix(kind):
    items = [TEXTS[0], Document(TEXTS[1], id="own", metadata={"tenant": "b"})]
    retriever = kind.from_documents(items, model=MODEL, similarity_top_k=2)
    assert [chunk.text for chunk in retriever.index.snapshot().chunks] == TEXTS[:2]
    assert retriever.search(QUERY, filter={"tenant": "b"}).chunk_ids == ["own"]


@either
@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ((TEXTS, METADATAS[:2]), {}),
        ((TEXTS, None, ["same"] * len(TEXTS)), {}),
        ((TEXTS[0],), {}),
        (([],), {}),
        ((TEXTS,), {"k": 0}),
        ((TEXTS,), {"k": 1, "similarity_top_k": 2}),
        ((TEXTS,), {"embed_model": "other"}),
        ((TEXTS,), {"unknown": 1}),
        ((TEXTS,), {"embedding": "other"}),
    ],
)
def test_from_texts_refuses_what_does_not_fit(kind, arguments, settings):
    with pytest.raises(InvalidInputError):
        kind.from_texts(*arguments, model=MODEL, **settings)


@either
@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"top_k": 4},
        {"q_threshold": float("nan")},
        {"k": True},
        {"k": "3"},
        {"q_threshold": "0.3"},
        {"ann": "annoy"},
        {"filter": 3},
        {"filter": {"a": {"$foo": 1}}},
    ],
)
def test_wrong_settings_are_refused_before_anything_is_embedded(kind, settings, monkeypatch):
    monkeypatch.setattr(QRAGModel, "encode_actions", None)
    with pytest.raises(QRAGError):
        kind.from_texts(TEXTS, model=MODEL, **settings)
    with pytest.raises(QRAGError):
        kind.from_documents(TEXTS, model=MODEL, **settings)


@either
def test_ann_of_the_index(kind):
    model = shared_model("none")
    retriever = kind.from_texts(TEXTS, model=model, ann="flat", k=3)
    assert retriever.index.ann == "flat"
    exact = kind.from_texts(TEXTS, model=model, k=3)
    assert retriever.search(QUERY).chunk_ids == exact.search(QUERY).chunk_ids


@either
def test_embedders_of_other_kinds_as_the_model(kind):
    embedder = SentenceTransformer(str(encoder_folder()), device="cpu")
    texts = kind.from_texts(TEXTS, model=embedder, k=2).search(QUERY).chunk_ids
    assert texts == kind.from_texts(TEXTS, model=encoder_folder(), k=2).search(QUERY).chunk_ids
    for embeddings in (QRAGEmbeddings(MODEL), QRAGEmbedding(MODEL)):
        assert kind.from_texts(TEXTS, model=embeddings).model is MODEL


@either
def test_a_constructor_takes_a_model_by_name_and_no_texts(kind, tmp_path):
    folder = MODEL.save_pretrained(tmp_path / "model")
    index = ChunkIndex.from_texts(TEXTS, model=MODEL)
    assert kind(index=index, model=str(folder)).search(QUERY).chunk_ids
    for settings in ({"index": TEXTS}, {"index": TEXTS, "model": MODEL}, {"model": MODEL}):
        if "index" not in settings and kind is llama_index.QRAGRetriever:
            continue  # Python itself refuses
        with pytest.raises(InvalidInputError, match="from_texts, from_documents"):
            kind(**settings)
    with pytest.raises(InvalidInputError, match=r"Give a list of .*; got one Document"):
        kind.from_documents(Document("a text"), model=MODEL)


def test_a_model_that_is_none_is_named():
    with pytest.raises(InvalidInputError, match="not int"):
        langchain.QRAGRetriever.from_texts(TEXTS, model=3)


def test_names_of_both_frameworks_are_one_setting():
    assert resolve_aliases({"similarity_top_k": 3, "filters": None}) == {"k": 3}
    assert resolve_aliases({"similarity_top_k": 3, "k": 3}) == {"k": 3}
    assert resolve_aliases({"similarity_top_k": 3, "k": None}) == {"k": 3}
    assert resolve_aliases({"embed_model": "a", "model": None}) == {"model": "a"}
    for pair in (
        {"similarity_top_k": 3, "k": 4},
        {"filters": {"a": 1}, "filter": {"a": 2}},
        {"embed_model": "a", "model": "b"},
    ):
        with pytest.raises(InvalidInputError, match="one setting under two names"):
            resolve_aliases(pair)


# search


@either
def test_search_keeps_q_values_unless_told_otherwise(kind):
    retriever = make(kind)
    assert len(retriever.search(QUERY).q_values) == 3
    assert retriever.search(QUERY, keep_q_values=False).q_values == ()
    assert retriever.search_batch([QUERY])[0].q_values == ()


@either
def test_settings_of_a_call_go_before_those_of_the_retriever(kind):
    retriever = make(kind, k=2, filter={"tenant": "a"})
    found = retriever.search(QUERY, similarity_top_k=9, filters={"tenant": "b"})
    assert sorted(found.chunk_ids) == IDS[1::2]
    assert len(retriever.search(QUERY, k=9, filter=None)) == 9
    assert sorted(retriever.search(QUERY, k=9).chunk_ids) == IDS[0::2]


@either
def test_unknown_settings_of_a_search_are_refused(kind):
    retriever = make(kind)
    for ask in (retriever.search, retriever.stream_search):
        with pytest.raises(InvalidInputError, match=r"'kk'.*may change k, q_threshold"):
            ask(QUERY, kk=3)
    with pytest.raises(InvalidInputError, match="'kk'"):
        retriever.search_batch([QUERY], kk=3)


@either
def test_search_batch_and_streams(kind):
    retriever, told = make(kind), []
    batch = retriever.search_batch(
        QUERIES, k=2, on_step=lambda number, step: told.append((number, step))
    )
    assert told == list(retriever.stream_search_batch(QUERIES, k=2))
    for number, query in enumerate(QUERIES):
        assert batch[number].chunk_ids == retriever.search(query, k=2).chunk_ids
        assert [step.chunk_id for step in retriever.stream_search(query, k=2)] == [
            step.chunk_id for other, step in told if other == number
        ]


# changes


@either
def test_adding_and_deleting(kind, monkeypatch):
    model = make_model("relative")
    retriever = kind.from_texts(TEXTS[:4], METADATAS[:4], IDS[:4], model=model, k=9)
    assert retriever.add_texts(TEXTS[4:6], METADATAS[4:6], IDS[4:6]) == IDS[4:6]
    documents = [
        Document(text, metadata=metadata, id=id_)
        for text, metadata, id_ in list(zip(TEXTS, METADATAS, IDS, strict=True))[6:]
    ]
    assert retriever.add_documents(documents) == IDS[6:]
    whole = make(kind, k=9).search(QUERY)
    assert retriever.search(QUERY).chunk_ids == whole.chunk_ids
    monkeypatch.setattr(model, "encode_actions", None)  # what is there is not embedded again
    assert retriever.add_texts(TEXTS[:4], METADATAS[:4], IDS[:4]) == IDS[:4]
    assert retriever.delete(IDS[2:]) is True
    assert sorted(retriever.search(QUERY).chunk_ids) == IDS[:2]
    with pytest.raises(InvalidInputError, match="nowhere"):
        retriever.delete(["fact-0", "nowhere"])
    assert len(retriever.index) == 2


@either
def test_a_retriever_that_is_emptied_says_so_and_can_be_filled(kind):
    retriever = make(kind)
    retriever.delete(IDS)
    with pytest.raises(InvalidInputError, match="no chunks"):
        retriever.search(QUERY)
    [id_] = retriever.add_texts(["Mary is here."])
    assert retriever.search(QUERY).chunk_ids == [id_]


# storage


@either
def test_a_saved_retriever_comes_back(kind, tmp_path, monkeypatch):
    retriever = make(kind, **SETTINGS)
    retriever.save_local(str(tmp_path / "new" / "folder"))
    for other in KINDS:
        loaded = other.load_local(tmp_path / "new" / "folder")
        monkeypatch.setattr(loaded.model, "encode_actions", None)
        assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
        assert loaded.model.fingerprint == MODEL.fingerprint
        assert loaded.search(QUERY).chunk_ids == retriever.search(QUERY).chunk_ids
        assert [s.metadata for s in loaded.search(QUERY)] == [
            s.metadata for s in retriever.search(QUERY)
        ]


@either
def test_settings_may_change_on_loading(kind, tmp_path):
    make(kind, **SETTINGS).save_local(tmp_path)
    loaded = kind.load_local(
        tmp_path, similarity_top_k=2, q_threshold=None, filters={"tenant": "a"}
    )
    assert (loaded.k, loaded.q_threshold, loaded.beams) == (2, None, 2)
    assert loaded.filter == {"tenant": "a"}
    with pytest.raises(InvalidInputError):
        kind.load_local(tmp_path, k=0)
    with pytest.raises(InvalidInputError, match=r"'?kk'?"):
        kind.load_local(tmp_path, kk=1)


@either
def test_saving_without_the_model(kind, tmp_path):
    make(kind).save_local(tmp_path, include_model=False)
    assert not (tmp_path / "model").exists()
    with pytest.raises(IndexFormatError, match="give model="):
        kind.load_local(tmp_path)
    path = model_copy_in(tmp_path.with_suffix(".elsewhere"), "relative")
    for model in ({"model": MODEL}, {"model": path}, {"embed_model": path}):
        assert kind.load_local(tmp_path, **model).search(QUERY).chunk_ids == (
            make(kind).search(QUERY).chunk_ids
        )
    with pytest.raises(FingerprintMismatchError):
        kind.load_local(tmp_path, model=make_model(scale=0.25))


def test_saving_without_the_model_leaves_no_other_one(tmp_path):
    make().save_local(tmp_path)
    make().save_local(tmp_path, include_model=False)
    assert langchain.QRAGRetriever.load_local(tmp_path).search(QUERY) == make().search(QUERY)
    other = copy.deepcopy(MODEL)
    with torch.no_grad():
        for weight in other.state_encoder.parameters():
            weight.mul_(1.5)
    langchain.QRAGRetriever(index=make_index(other)).save_local(tmp_path, include_model=False)
    with pytest.raises(IndexFormatError, match="give model="):
        langchain.QRAGRetriever.load_local(tmp_path)


@either
def test_a_model_folder_of_someone_else_stays(kind, tmp_path):
    for content in (b"thesis", None):  # a file, or a model that save_local did not write
        folder = tmp_path / f"{content}"
        if content is None:
            make_model(scale=0.25).save_pretrained(folder / "model")
        else:
            (folder / "model").mkdir(parents=True)
            (folder / "model" / "mine.txt").write_bytes(content)
        before = {f: f.read_bytes() for f in (folder / "model").rglob("*") if f.is_file()}
        make(kind).save_local(folder, include_model=False)
        assert {f: f.read_bytes() for f in (folder / "model").rglob("*") if f.is_file()} == before
        with pytest.raises(IndexFormatError, match="give model="):
            kind.load_local(folder)
        assert kind.load_local(folder, model=MODEL).search(QUERY) == make(kind).search(QUERY)
        with pytest.raises(InvalidInputError, match="left as it"):
            make(kind).save_local(folder)
        assert {f: f.read_bytes() for f in (folder / "model").rglob("*") if f.is_file()} == before


def test_a_model_that_was_found_is_used_and_never_removed(tmp_path):
    model_copy_in(tmp_path, "relative")
    make().save_local(tmp_path)
    assert langchain.QRAGRetriever.load_local(tmp_path).search(QUERY) == make().search(QUERY)
    other = langchain.QRAGRetriever(index=make_index(make_model(scale=0.25)))
    other.save_local(tmp_path, include_model=False)
    assert QRAGModel.from_pretrained(tmp_path / "model").fingerprint == MODEL.fingerprint
    with pytest.raises(IndexFormatError, match="give model="):
        langchain.QRAGRetriever.load_local(tmp_path)


@either
def test_a_save_that_fails_changes_nothing(kind, tmp_path, monkeypatch):
    make(kind).save_local(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    other = kind(index=make_index(make_model(scale=0.25)))

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((model_files, "_write"), (index_module, "write_index")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, disk_full)
            with pytest.raises(OSError, match="No space"):
                other.save_local(tmp_path)
        assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert kind.load_local(tmp_path).search(QUERY) == make(kind).search(QUERY)
    other.save_local(tmp_path)
    assert kind.load_local(tmp_path).search(QUERY) == other.search(QUERY)


def test_a_foreign_model_folder_is_refused_before_the_index_is_written(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match="left as it is"):
        make().save_local(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@either
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_saved_and_loaded(kind, dtype, tmp_path):
    rounded = model_in(dtype, model_copy_in(tmp_path / "full", "relative"))
    retriever = kind(index=make_index(rounded))
    for _ in range(2):
        retriever.save_local(tmp_path / "rounded")
        loaded = kind.load_local(tmp_path / "rounded")
        assert loaded.search(QUERY).chunk_ids == retriever.search(QUERY).chunk_ids
        assert loaded.model.fingerprint == rounded.fingerprint == MODEL.fingerprint
    # full weights that are there stay, and serve both precisions
    make(kind).save_local(tmp_path / "own")
    weights = {f: f.read_bytes() for f in (tmp_path / "own" / "model").rglob("*.safetensors")}
    model = model_in(dtype, tmp_path / "own" / "model")
    retriever = kind.load_local(tmp_path / "own", model=model)
    retriever.add_texts(["Sandra took the milk."])
    for include_model in (True, False):
        retriever.save_local(tmp_path / "own", include_model=include_model)
        assert {file: file.read_bytes() for file in weights} == weights
        assert len(kind.load_local(tmp_path / "own").index) == len(IDS) + 1


def model_in(dtype, folder):
    return QRAGModel.from_pretrained(folder, dtype=dtype, device="cpu")


def test_what_one_framework_alone_knows_is_saved_too(tmp_path):
    both = QRAGRetriever(index=make_index(), score_key="q", verbose=True, k=np.int64(2))
    both.save_local(tmp_path)
    loaded = QRAGRetriever.load_local(tmp_path)
    assert (loaded.score_key, loaded.verbose, loaded.k) == ("q", True, 2)
    assert langchain.QRAGRetriever.load_local(tmp_path).score_key == "q"
    assert llama_index.QRAGRetriever.load_local(tmp_path).k == 2
    numbers = {"similarity_top_k": np.int64(2), "q_threshold": np.float32(0.5)}
    llama_index.QRAGRetriever(index=make_index(), **numbers).persist(tmp_path)
    assert llama_index.QRAGRetriever.from_persist_dir(tmp_path).q_threshold == 0.5


@pytest.mark.parametrize("ids", ["one", 3, [3], [[]]])
def test_ids_to_leave_out_are_texts(ids):
    with pytest.raises(InvalidInputError, match="exclude_ids="):
        make().search(QUERY, exclude_ids=ids)


def test_no_ids_to_leave_out():
    assert make().search(QUERY, exclude_ids=None) == make().search(QUERY)


@either
def test_no_filter_under_either_name_takes_the_place_of_the_retrievers_own(kind):
    retriever = make(kind, filter={"tenant": "a"}, k=9)
    everything = make(kind, k=9).search(QUERY).chunk_ids
    assert len(retriever.search(QUERY)) < len(everything)
    for name in ("filter", "filters"):
        assert retriever.search(QUERY, **{name: None}).chunk_ids == everything


def test_an_index_takes_the_name_of_a_model(tmp_path, monkeypatch):
    folder = model_copy_in(tmp_path, "relative")
    index = ChunkIndex.from_texts(TEXTS, METADATAS, IDS, model=folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    index.save("~/saved")
    assert (tmp_path / "saved").is_dir()
    loaded = ChunkIndex.load("~/saved", model=folder)
    assert langchain.QRAGRetriever(index=loaded).search(QUERY) == make().search(QUERY)
    with pytest.raises(InvalidInputError, match="not int"):
        ChunkIndex(model=3)


def test_one_query_is_no_batch():
    for call in (make().batch, make().search_batch):
        with pytest.raises(InvalidInputError, match="list of queries"):
            call(QUERY)


@either
def test_saving_again_replaces_what_was_there(kind, tmp_path):
    make(kind).save_local(tmp_path)
    retriever = kind.load_local(tmp_path)
    retriever.add_texts(["Sandra took the milk."], ids=["new"])
    retriever.delete(["fact-0"])
    retriever.k = 9
    retriever.save_local(tmp_path)
    loaded = kind.load_local(tmp_path)
    assert loaded.k == 9
    assert sorted(loaded.search(QUERY).chunk_ids) == [*IDS[1:], "new"]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@either
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_settings_that_are_missing_or_damaged(kind, content, tmp_path):
    make(kind).save_local(tmp_path)
    file = tmp_path / "retriever.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(IndexFormatError, match=r"retriever\.json is missing or damaged"):
        kind.load_local(tmp_path)


def test_settings_of_another_version(tmp_path):
    make(k=4).save_local(tmp_path)
    file = tmp_path / "retriever.json"
    saved = json.loads(file.read_text())
    assert saved.keys() == {*SETTINGS, "score_key", "model"}
    file.write_text(json.dumps({"k": 4}))
    assert langchain.QRAGRetriever.load_local(tmp_path).k == 4
    file.write_text(json.dumps({**saved, "from_the_future": 1}))
    with pytest.raises(QRAGError, match="from_the_future"):
        langchain.QRAGRetriever.load_local(tmp_path)


@either
def test_a_folder_that_holds_no_retriever(kind, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
        with pytest.raises(IndexFormatError, match="save_local wrote"):
            kind.load_local(folder)


@either
def test_a_damaged_part_is_named(kind, tmp_path):
    make(kind).save_local(tmp_path)
    for file in (tmp_path / "index").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(IndexFormatError, match="index"):
        kind.load_local(tmp_path)
    make(kind).save_local(tmp_path / "again")
    (tmp_path / "again" / "model" / model_files.CONFIG_FILE).write_text("{")
    with pytest.raises(QRAGError, match="model"):
        kind.load_local(tmp_path / "again")


def test_what_is_saved_under_a_file_or_a_foreign_folder(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInputError):
        make().save_local(tmp_path)
    assert [file.name for file in (tmp_path / "index").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "retriever.json").exists()
    mine = tmp_path / "mine" / "retriever.json"
    mine.parent.mkdir()
    mine.write_text('{"breed": "labrador"}')
    with pytest.raises(InvalidInputError, match=r"retriever\.json was not written by save_local"):
        make().save_local(mine.parent)
    with pytest.raises(InvalidInputError, match="is a file; name a folder"):
        make().save_local(mine)
    assert [file.name for file in mine.parent.iterdir()] == [mine.name]
    assert mine.read_text() == '{"breed": "labrador"}'
