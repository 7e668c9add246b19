from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from qrag_retriever.encoder import Encoder, is_normalized, with_pooling
from qrag_retriever.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["mary went there", "a", "", "john took the milk and moved to the office, then left it."]


def encoder_of(folder: Path, pooling: str = "mean", scale: float = 1.0) -> Encoder:
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32})
    return Encoder([transformer, Pooling(32, pooling_mode=pooling)], scale).eval()


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return encoder_of(tiny_encoder, scale=0.1)


def whole(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [[*encoder.prefix, *ids, *encoder.suffix] for ids in encoder.tokenize(texts)]


@pytest.mark.parametrize("fixture", ["tiny_encoder", "tiny_xlm_roberta", "tiny_qwen3"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_against_transformers(fixture: str, pooling: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    encoder = encoder_of(folder, pooling, scale=0.25)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt"))[0][0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
        expected.append(pooled.numpy() / 4)
    assert whole(encoder, TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
    np.testing.assert_allclose(encoder.encode(whole(encoder, TEXTS)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fixture", "prefix", "suffix", "separator", "window"),
    [
        ("tiny_encoder", (2,), (3,), 3, 64),
        ("tiny_xlm_roberta", (0,), (2,), 2, 64),
        ("tiny_qwen3", (), (256,), 257, 512),
    ],
)
def test_what_the_tokenizer_and_the_weights_tell(
    fixture: str,
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
    separator: int,
    window: int,
    request: pytest.FixtureRequest,
) -> None:
    encoder = encoder_of(request.getfixturevalue(fixture))
    assert (encoder.prefix, encoder.suffix) == (prefix, suffix)
    assert encoder.separator == separator
    assert encoder.window == window
    assert encoder.dimension == 32
    full = [5] * window
    assert torch.isfinite(encoder.encode([full])).all()
    if fixture != "tiny_qwen3":
        with pytest.raises((IndexError, RuntimeError)):
            encoder.encode([[*full, 5]])


INPUTS = st.lists(st.lists(st.integers(5, 60), max_size=12), min_size=1, max_size=6)


@settings(deadline=None, max_examples=15)
@given(inputs=INPUTS, budget=st.integers(1, 60), data=st.data())
def test_batches_and_order_do_not_matter(
    encoder: Encoder, inputs: list[list[int]], budget: int, data: st.DataObject
) -> None:
    one_by_one = torch.cat([encoder.encode([ids]) for ids in inputs])
    together = encoder.encode(inputs, batch_tokens=budget)
    torch.testing.assert_close(together, one_by_one, atol=1e-6, rtol=0)
    order = data.draw(st.permutations(range(len(inputs))))
    shuffled = encoder.encode([inputs[row] for row in order])
    torch.testing.assert_close(shuffled, one_by_one[order], atol=1e-6, rtol=0)


def test_equal_inputs_are_embedded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    forward = Encoder.forward

    def spy(self: Encoder, inputs: Any) -> Any:
        seen.extend(map(tuple, inputs))
        return forward(self, inputs)

    monkeypatch.setattr(Encoder, "forward", spy)
    result = encoder.encode([[5, 6], [7], [5, 6], [8, 9], [7]])
    assert sorted(seen) == [(5, 6), (7,), (8, 9)]
    assert torch.equal(result[0], result[2])
    assert torch.equal(result[1], result[4])
    assert not torch.equal(result[0], result[3])


def test_batches_hold_no_more_than_the_budget(encoder: Encoder) -> None:
    inputs = [[5] * length for length in (3, 12, 1, 7, 7, 30, 2)]
    batches = list(encoder.batches(inputs, batch_tokens=24))
    lengths = [[len(inputs[row]) for row in batch] for batch in batches]
    assert lengths == [[30], [12, 7], [7, 3, 2], [1]]


def test_nothing_to_encode(encoder: Encoder) -> None:
    assert encoder.tokenize([]) == []
    assert encoder.encode([]).shape == (0, 32)


def test_dropout_acts_in_training_only(encoder: Encoder) -> None:
    other = copy.deepcopy(encoder).train()
    inputs = whole(other, TEXTS)
    assert torch.equal(other.encode(inputs), encoder.encode(inputs))
    assert other.training
    assert not torch.allclose(other(inputs), other(inputs))
    assert other(inputs).requires_grad
    assert not other.encode(inputs).requires_grad


def test_tokenizing_from_many_threads(encoder: Encoder) -> None:
    """Each thread gets its own reading of special tokens, which is a flag of the tokenizer."""
    texts = [f"mary [SEP] john {number}" for number in range(40)]
    expected = {flag: encoder.tokenize(texts, allow_special=flag) for flag in (False, True)}
    assert expected[False] != expected[True]

    def read(job: int) -> bool:
        flag = job % 2 == 0
        return encoder.tokenize(texts, allow_special=flag) == expected[flag]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or the threads would seldom meet
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(160)))
    finally:
        sys.setswitchinterval(before)


def test_any_weight_that_changes_is_another_version(encoder: Encoder) -> None:
    versions = [encoder.version]
    for weight in (*list(encoder.parameters())[:1], *list(encoder.parameters())[-1:]):
        with torch.no_grad():
            weight.add_(0.0)
        versions.append(encoder.version)
    assert versions[0] < versions[1] < versions[2]


def test_copies_are_independent(encoder: Encoder) -> None:
    other = copy.deepcopy(encoder)
    inputs = whole(encoder, TEXTS)
    before = encoder.encode(inputs)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1)
    assert torch.equal(encoder.encode(inputs), before)
    assert not torch.allclose(other.encode(inputs), before)
    assert other.tokenize(TEXTS) == encoder.tokenize(TEXTS)


def bare(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    """Modules around a tokenizer that puts nothing around a text."""
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32})
    transformer.processor = tokenizer
    return [transformer, Pooling(32, pooling_mode="mean")]


def plain_tokenizer(**specials: str) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def test_tokenizer_without_separator(tiny_encoder: Path) -> None:
    encoder = Encoder(bare(tiny_encoder, plain_tokenizer()))
    assert (encoder.prefix, encoder.suffix) == ((), ())
    with pytest.raises(ConfigError, match="neither a sep nor an eos token"):
        _ = encoder.separator
    assert Encoder(bare(tiny_encoder, plain_tokenizer(eos_token="<eos>"))).separator == 1


def test_empty_text_without_special_tokens(tiny_encoder: Path) -> None:
    """No token at all must not make NaN, nor change its neighbours."""
    encoder = Encoder(bare(tiny_encoder, plain_tokenizer(eos_token="<eos>"))).eval()
    texts = encoder.tokenize(["a b", "", "b"])
    assert texts[1] == []
    result = encoder.encode(texts)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result[:1], encoder.encode(texts[:1]), atol=1e-5, rtol=0)
    assert torch.isfinite(encoder.encode([[]])).all()


def test_pooling_and_normalisation(tiny_sentence_encoder: Path, encoder: Encoder) -> None:
    modules = list(encoder.layers)
    assert not is_normalized(modules)
    normal = with_pooling(modules, "cls", normalize=True)
    assert is_normalized(normal)
    assert normal[1].pooling_mode == "cls"
    assert modules[1].pooling_mode == "mean", "the given modules stay as they are"
    lengths = Encoder(normal).eval().encode(whole(encoder, TEXTS)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(len(TEXTS)))
    assert sum(isinstance(m, Normalize) for m in with_pooling(normal, None, normalize=True)) == 1
    assert not is_normalized(with_pooling(normal, None, normalize=False))
    assert with_pooling(normal, None, normalize=None) == normal
    with pytest.raises(ConfigError, match=r"pooling='middle' is not known; choose one of .*'mean'"):
        with_pooling(modules, "middle", normalize=None)


def test_modules_that_are_no_encoder(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="not with Pooling"):
        Encoder([Pooling(32)])
    with pytest.raises(ConfigError, match="not with nothing"):
        Encoder([])
