from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from transformers import BertConfig, BertModel

from qrag_retriever import ChunkIndex, QRAGRetriever, model_names, offline
from qrag_retriever.config import QRAGConfig
from qrag_retriever.errors import (
    ConfigError,
    FingerprintMismatchError,
    InvalidInputError,
    ModelFormatError,
    TruncationWarning,
)
from qrag_retriever.model import QRAGModel
from qrag_retriever.model_choice import resolve_model

QUERY = "Where is the milk?"
CHUNKS = ["Mary took the milk.", "John went to the garden.", "", "Mary moved to the office."]
STATES = [(QUERY, []), (QUERY, CHUNKS[:1]), ("Who?", CHUNKS[1:])]


def fresh(folder: Path, **options: Any) -> QRAGModel:
    return QRAGModel.from_encoder(folder, device="cpu", **options)


def shift_weights(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.01)


# --- making a model


def test_from_a_transformers_folder(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, positions="relative", max_steps=6)
    assert model.config == QRAGConfig(
        positions="relative",
        scale=0.1,
        state_order="document",
        max_chunk_tokens=64,
        max_state_tokens=64,
        max_steps=6,
    )
    assert model.dimension == 32
    assert not model.training
    assert fresh(tiny_encoder).config.state_order == "retrieval"
    single = model.state_encoder.encode(model.action_ids(CHUNKS)).numpy()
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), single)


def test_from_a_sentence_transformers_folder(tiny_sentence_encoder: Path) -> None:
    model = fresh(tiny_sentence_encoder)
    assert model.config.scale == 1
    assert model.config.query_prompt == "query: "
    assert model.config.chunk_prompt == "passage: "
    assert (model.config.max_chunk_tokens, model.config.max_state_tokens) == (32, 64)
    peer = SentenceTransformer(str(tiny_sentence_encoder), device="cpu")
    expected = peer.encode(["passage: " + text for text in CHUNKS])
    np.testing.assert_allclose(model.encode_actions(CHUNKS), expected, atol=1e-6)
    queries = model.encode_states([(QUERY, [])])
    np.testing.assert_allclose(queries, peer.encode(["query: " + QUERY]), atol=1e-6)


def test_prompts(tiny_sentence_encoder: Path, tiny_encoder: Path) -> None:
    model = fresh(tiny_sentence_encoder)
    plain = fresh(tiny_encoder)
    assert model.state_ids([("Who?", ["a cat"])]) == plain.state_ids([("query: Who?", ["a cat"])])
    assert model.action_ids(["a cat"]) == plain.action_ids(["passage: a cat"])
    assert fresh(tiny_sentence_encoder, chunk_prompt="").action_ids(["a cat"]) == plain.action_ids(
        ["a cat"]
    )


def test_pooling_and_normalisation(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, pooling="cls", normalize=True)
    assert model.config.scale == 1
    lengths = np.linalg.norm(model.encode_actions(CHUNKS), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    scaled = fresh(tiny_encoder, pooling="cls", normalize=True, scale=3.0)
    np.testing.assert_allclose(scaled.encode_actions(CHUNKS), 3 * model.encode_actions(CHUNKS))


def test_the_encoders_are_two_copies(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder)
    states, actions = model.encode_states(STATES), model.encode_actions(CHUNKS)
    shift_weights(model.state_encoder)
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), actions)
    assert not np.allclose(model.encode_states(STATES), states)


def test_settings_that_do_not_fit(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_chunk_tokens=65 exceeds the 64 tokens"):
        fresh(tiny_encoder, max_chunk_tokens=65)
    with pytest.raises(ConfigError, match="max_state_tokens=512 exceeds the 64 tokens"):
        fresh(tiny_encoder, max_state_tokens=512)
    with pytest.raises(ConfigError, match="Unknown setting 'steps'"):
        fresh(tiny_encoder, steps=3)
    with pytest.raises(ConfigError, match="dtype='int8' is not known"):
        fresh(tiny_encoder, dtype="int8")
    for file in tiny_encoder.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    small = BertConfig(vocab_size=200, hidden_size=30, num_attention_heads=3, num_hidden_layers=1)
    BertModel(small).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"30 dimensions cannot be rotated.*positions='none'"):
        fresh(tmp_path, positions="relative")
    other = fresh(tmp_path)
    with pytest.raises(ConfigError, match="gives 32 dimensions and the action encoder 30"):
        QRAGModel(fresh(tiny_encoder).state_encoder, other.action_encoder, QRAGConfig())


def test_settings_that_are_assigned_take_effect(tiny_encoder: Path, tmp_path: Path) -> None:
    texts, states = ["a red cup"], [("a cup", ["a hat"])]
    model = fresh(tiny_encoder, max_chunk_tokens=32)
    changes = {"scale": 3.0, "chunk_prompt": "red ", "max_chunk_tokens": 16, "query_prompt": "cup "}
    model.config = model.config.replace(**changes)
    made = fresh(tiny_encoder, **{"max_chunk_tokens": 32, **changes})
    np.testing.assert_array_equal(model.encode_actions(texts), made.encode_actions(texts))
    np.testing.assert_array_equal(model.encode_states(states), made.encode_states(states))
    loaded = QRAGModel.from_pretrained(model.save_pretrained(tmp_path / "m"), device="cpu")
    np.testing.assert_array_equal(model.encode_actions(texts), loaded.encode_actions(texts))
    assert model.fingerprint == made.fingerprint == loaded.fingerprint
    before = model.config
    for wrong in (before.replace(max_state_tokens=10_000), {"scale": 1.0}):
        with pytest.raises(ConfigError):
            model.config = wrong  # type: ignore[assignment]
        assert model.config is before


def test_a_rounded_model_with_other_settings_is_another(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, dtype="bfloat16")
    full = model.fingerprint
    model.config = model.config.replace(alpha=0.3, query_prompt="x")
    assert model.fingerprint == full == fresh(tiny_encoder).fingerprint
    model.config = model.config.replace(chunk_prompt="red ")
    assert model.fingerprint != full


def with_modules(folder: Path, *modules: torch.nn.Module, **options: Any) -> SentenceTransformer:
    """An embedder with modules of one's choice behind its transformer."""
    return SentenceTransformer(
        modules=[Transformer(str(folder)), *modules], device="cpu", **options
    )


def test_a_tokenizer_that_is_missing_is_told(
    tiny_encoder: Path, tmp_path: Path, tiny_model: QRAGModel
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_encoder, bare)
    saved = tiny_model.save_pretrained(tmp_path / "saved")
    for file in [*bare.glob("*token*"), *bare.glob("vocab*"), *saved.glob("query_0_*/*token*")]:
        file.unlink()
    with pytest.raises(ModelFormatError, match="knows no word"):
        fresh(bare)
    with pytest.raises(ModelFormatError, match="knows no word"):
        QRAGModel.from_pretrained(saved, device="cpu")


def test_an_activation_tells_models_apart(tiny_encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = Dense(32, 16).state_dict()

    def model(activation: torch.nn.Module) -> QRAGModel:
        dense = Dense(32, 16, activation_function=activation)
        dense.load_state_dict(weights)
        return QRAGModel.from_encoder(with_modules(tiny_encoder, Pooling(32), dense))

    made = {act: model(act) for act in (torch.nn.Tanh(), torch.nn.Identity(), torch.nn.ELU(3.0))}
    assert len({one.fingerprint for one in made.values()}) == 3
    for activation, one in made.items():
        if isinstance(activation, torch.nn.ELU):  # its folder would say no more than ELU
            with pytest.raises(ConfigError, match=r"ELU\(alpha=3.0\) of a Dense"):
                one.save_pretrained(tmp_path / "elu")
            assert not (tmp_path / "elu").exists()
        else:
            again = QRAGModel.from_pretrained(one.save_pretrained(tmp_path / repr(activation)))
            np.testing.assert_array_equal(again.encode_actions(CHUNKS), one.encode_actions(CHUNKS))
            assert again.fingerprint == one.fingerprint


def test_what_an_encoder_would_do_otherwise_is_refused(tiny_encoder: Path) -> None:
    left_out = Pooling(32, include_prompt=False)
    prompts = {"query": "query: ", "document": "passage: "}
    with pytest.raises(ConfigError, match="include_prompt=False"):
        QRAGModel.from_encoder(with_modules(tiny_encoder, left_out, prompts=prompts))
    QRAGModel.from_encoder(with_modules(tiny_encoder, left_out))
    with pytest.raises(ConfigError, match="truncate_dim=16 is not supported"):
        QRAGModel.from_encoder(with_modules(tiny_encoder, Pooling(32), truncate_dim=16))
    with pytest.raises(ConfigError, match="no pooling; give pooling='mean'"):
        QRAGModel.from_encoder(with_modules(tiny_encoder))
    model = QRAGModel.from_encoder(with_modules(tiny_encoder), pooling="cls")
    pooled = with_modules(tiny_encoder, Pooling(32, pooling_mode="cls"))
    expected = QRAGModel.from_encoder(pooled).encode_actions(CHUNKS)
    np.testing.assert_array_equal(model.encode_actions(CHUNKS), expected)


def test_chunks_of_a_state_may_come_from_a_generator(tiny_model: QRAGModel) -> None:
    expected = tiny_model.encode_states([(QUERY, CHUNKS)])
    found = tiny_model.encode_states((QUERY, iter(CHUNKS)) for _ in range(1))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["", " "])
def test_no_model_is_called_nothing(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"is empty; name a model, or leave it out"):
        resolve_model(name)
    with pytest.raises(ModelFormatError, match="name is empty"):
        QRAGModel.from_encoder(name)


def test_resolve_model(tiny_model: QRAGModel, tiny_encoder: Path, tmp_path: Path) -> None:
    assert resolve_model(tiny_model) is tiny_model
    assert resolve_model(str(tiny_encoder)).fingerprint == fresh(tiny_encoder).fingerprint
    folder = tiny_model.save_pretrained(tmp_path / "m")
    assert resolve_model(folder).config == tiny_model.config
    with pytest.raises(InvalidInputError, match="not int"):
        resolve_model(3)  # type: ignore[arg-type]
    with pytest.raises(ModelFormatError, match=r"load it with QRAGModel\.from_pretrained"):
        fresh(folder)


def test_resolve_model_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(model_names, "hf_hub_download", unreachable)
    assert not model_names.is_qrag_model("someone/some-model")
    # the embedder of the extra `offline` is known to be one: nothing is asked
    monkeypatch.setattr(model_names, "hf_hub_download", pytest.fail)
    assert resolve_model(offline.DEFAULT_ENCODER).dimension == 384


# --- inputs


def test_nothing_to_embed(tiny_model: QRAGModel) -> None:
    assert tiny_model.encode_states([]).shape == (0, 32)
    assert tiny_model.encode_actions([]).shape == (0, 32)
    assert tiny_model.encode_actions([]).dtype == np.float32


def test_generators_are_read_whole(tiny_model: QRAGModel) -> None:
    texts, states = ["a cup", "a hat"], [("a cup", ["a hat"]), ("a hat", [])]
    for encode, items in ((tiny_model.encode_actions, texts), (tiny_model.encode_states, states)):
        found = encode(item for item in items)  # type: ignore[operator]
        np.testing.assert_array_equal(found, encode(items))  # type: ignore[operator]


@pytest.mark.parametrize("query", ["", "  \n", None, 3])
def test_queries_that_are_none(tiny_model: QRAGModel, query: Any) -> None:
    with pytest.raises(InvalidInputError, match="query"):
        tiny_model.encode_states([(query, [])])


def test_chunks_that_are_no_texts(tiny_model: QRAGModel) -> None:
    with pytest.raises(InvalidInputError, match="not NoneType"):
        tiny_model.encode_actions(["a", None])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="not int"):
        tiny_model.encode_states([("Who?", ["a", 3])])  # type: ignore[list-item]
    with pytest.raises(InvalidInputError, match="not a single str"):
        tiny_model.encode_states([("Who?", "one chunk")])


def test_state_limits(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, max_query_tokens=5, max_chunk_tokens_in_state=4)
    ids = model.state_ids([("the dog and the cat", ["mary went back", "john"])])[0]
    words = model.state_encoder.transformer.tokenizer.convert_ids_to_tokens(ids)
    assert words == [
        "[CLS]",
        "the",
        "dog",
        "and",
        "[SEP]",
        "mary",
        "went",
        "[SEP]",
        "john",
        "[SEP]",
    ]


def test_truncation_is_told_once(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, max_chunk_tokens=8)
    long = "the dog and the cat and the man and the woman"
    with pytest.warns(TruncationWarning, match="1 of 2 chunks are longer than the 8 tokens"):
        embeddings = model.encode_actions([long, "a cat"])
    with pytest.warns(TruncationWarning, match="A state of 9 chunks is longer than the 64 tokens"):
        model.encode_states([("Who?", [long] * 9)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_actions([long, "a cat"])
        ids = model.state_ids([("Who?", [long] * 9)])[0]
    assert len(ids) == 64
    np.testing.assert_array_equal(embeddings[0], model.encode_actions([long[:25]])[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda model, texts: model.action_ids(texts),
        lambda model, texts: model.encode_actions(texts),
        lambda model, texts: ChunkIndex.from_texts(texts, model=model),
        lambda model, texts: QRAGRetriever.from_texts(texts, model=model),
    ],
)
def test_truncation_is_told_of_the_callers_line(call: Any, tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, max_chunk_tokens=8)
    with pytest.warns(TruncationWarning) as told:
        call(model, ["the dog and the cat and the man and the woman"])
    place = call.__code__
    assert (told[0].filename, told[0].lineno) == (place.co_filename, place.co_firstlineno)


def test_no_warning_without_truncation(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder, max_chunk_tokens=8, max_chunk_tokens_in_state=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_actions(["the dog and the cat a"])  # 6 + 2
        model.encode_states([("Who?", ["the dog and the cat"] * 9)])  # a limit that was asked for


# --- on disk


@pytest.mark.parametrize(
    ("fixture", "options"),
    [
        ("tiny_encoder", {"positions": "relative", "q_threshold": 0.2, "training": {"a": [1]}}),
        ("tiny_sentence_encoder", {"max_query_tokens": 16, "positions": "absolute"}),
        ("tiny_xlm_roberta", {}),
        ("tiny_qwen3", {"pooling": "lasttoken", "normalize": True}),
    ],
)
def test_saved_and_loaded(
    fixture: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = fresh(request.getfixturevalue(fixture), **options)
    shift_weights(model.state_encoder)
    folder = model.save_pretrained(tmp_path / "model")
    loaded = QRAGModel.from_pretrained(folder, device="cpu")
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint
    assert loaded.state_layout == model.state_layout
    np.testing.assert_array_equal(loaded.encode_states(STATES), model.encode_states(STATES))
    np.testing.assert_array_equal(loaded.encode_actions(CHUNKS), model.encode_actions(CHUNKS))

    plain = SentenceTransformer(str(folder), device="cpu")
    scale = model.config.scale
    queries = model.encode_states([(QUERY, []), ("Who?", [])])
    np.testing.assert_allclose(plain.encode_query([QUERY, "Who?"]) * scale, queries, atol=1e-6)
    actions = model.encode_actions(CHUNKS)
    np.testing.assert_allclose(plain.encode_document(CHUNKS) * scale, actions, atol=1e-6)


def test_saving_does_not_change_the_model(tiny_encoder: Path, tmp_path: Path) -> None:
    model = fresh(tiny_encoder, max_query_tokens=8, max_chunk_tokens=16)
    before = model.fingerprint, model.state_ids(STATES), model.action_ids(CHUNKS)
    model.save_pretrained(tmp_path / "m")
    assert (model.fingerprint, model.state_ids(STATES), model.action_ids(CHUNKS)) == before


# --- fingerprint and precision


def test_fingerprint_names_what_makes_action_embeddings(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder)
    name = model.fingerprint
    assert len(name) == 64
    shift_weights(model.state_encoder)
    assert model.fingerprint == name
    same = fresh(tiny_encoder, positions="relative", max_steps=9, query_prompt="q: ")
    assert same.fingerprint == name
    others = [
        fresh(tiny_encoder, **options).fingerprint
        for options in (
            {"scale": 1.0},
            {"chunk_prompt": "passage: "},
            {"max_chunk_tokens": 32},
            {"pooling": "cls"},
            {"normalize": True, "scale": 0.1},
        )
    ]
    assert len({name, *others}) == len(others) + 1
    shift_weights(model.action_encoder)
    assert model.fingerprint != name


@pytest.mark.parametrize("change", ["case", "vocabulary", "special tokens"])
def test_fingerprint_knows_the_tokenizer(change: str, tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_encoder, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    if change == "case":
        tokenizer["normalizer"]["lowercase"] = False
    elif change == "vocabulary":
        words = tokenizer["model"]["vocab"]
        words["a"], words["the"] = words["the"], words["a"]
        words["##a"], words["##e"] = words["##e"], words["##a"]
    else:
        tokenizer["post_processor"]["single"].pop()
    file.write_text(json.dumps(tokenizer))
    index = ChunkIndex.from_texts(["the cat"], model=fresh(tiny_encoder))
    index.save(tmp_path / "index")
    with pytest.raises(FingerprintMismatchError):
        ChunkIndex.load(tmp_path / "index", model=fresh(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(dtype: Any, tiny_encoder: Path, tmp_path: Path) -> None:
    full = fresh(tiny_encoder)
    model = fresh(tiny_encoder, dtype=dtype)
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert model.fingerprint == full.fingerprint
    embeddings = model.encode_actions(CHUNKS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, full.encode_actions(CHUNKS), atol=0.02)
    loaded = QRAGModel.from_pretrained(
        full.save_pretrained(tmp_path / "m"), device="cpu", dtype=dtype
    )
    assert loaded.fingerprint == full.fingerprint
    shift_weights(model.train())
    assert model.eval().fingerprint != full.fingerprint


def test_copies_for_target_networks(tiny_encoder: Path) -> None:
    model = fresh(tiny_encoder)
    target = copy.deepcopy(model)
    shift_weights(model)
    assert target.fingerprint == fresh(tiny_encoder).fingerprint != model.fingerprint
    assert target.encode_states(STATES).shape == (3, 32)
