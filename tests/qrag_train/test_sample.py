from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from qrag_retriever.errors import DatasetError
from qrag_train.data import FixedSamples, Mixture, SampleList, SampleSource, SupportSample


def make(name: str = "q", support: tuple[int, ...] = (1,), n_chunks: int = 3) -> SupportSample:
    return SupportSample(name, f"Question {name}?", tuple(map(str, range(n_chunks))), support)


class Counting:
    """An endless source whose samples are named after what the generator drew."""

    def sample(self, rng: np.random.Generator) -> SupportSample:
        return make(str(rng.integers(2**40)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": ()}, "'chunks' must be"),
        ({"chunks": ["a", "b"]}, "'chunks' must be a tuple"),
        ({"question": "  "}, "'question' must be"),
        ({"support": ()}, "'support' must be"),
        ({"support": [0]}, "'support' must be a tuple"),
        ({"support": (0, 2)}, "holds 2, but indices go from 0 to 1"),
        ({"support": (-1,)}, "holds -1"),
        ({"support": (1, 0, 1)}, "repeats an index"),
    ],
)
def test_sample_refuses_what_cannot_be_trained_on(changes, message):
    good = {"id": "x7", "question": "Why?", "chunks": ("a", "b"), "support": (0, 1)}
    with pytest.raises(DatasetError, match=message) as error:
        SupportSample(**{**good, **changes})
    assert "x7" in str(error.value)


def test_sample_list_is_a_sequence_and_a_source():
    samples = SampleList([make("a"), make("b"), make("c")])
    assert isinstance(samples, SampleSource)
    assert [sample.id for sample in samples] == ["a", "b", "c"]
    assert [sample.id for sample in samples[1:]] == ["b", "c"]
    assert samples[-1] in samples
    rng = np.random.default_rng(0)
    drawn = [samples.sample(rng).id for _ in range(3000)]
    assert all(900 < drawn.count(name) < 1100 for name in "abc")


def test_sample_list_refuses_to_be_empty():
    with pytest.raises(DatasetError, match="at least one question"):
        SampleList([])


def test_fixed_samples_are_the_same_at_every_access_and_differ_from_each_other():
    fixed = FixedSamples(Counting(), count=20, seed=3)
    names = [sample.id for sample in fixed]
    assert len(fixed) == len(names) == len(set(names)) == 20
    assert fixed[7].id == names[7]
    assert fixed[-1].id == names[-1]
    assert [sample.id for sample in fixed[3:6]] == names[3:6]
    assert [sample.id for sample in FixedSamples(Counting(), 20, seed=4)] != names
    with pytest.raises(IndexError):
        fixed[20]
    with pytest.raises(DatasetError, match="at least 1"):
        FixedSamples(Counting(), count=0, seed=0)
    with pytest.raises(DatasetError, match="at least 0"):
        FixedSamples(Counting(), count=1, seed=-1)


def test_mixture_draws_by_weight():
    a, b = SampleList([make("a")]), SampleList([make("b")])
    rng = np.random.default_rng(1)
    drawn = [Mixture([a, b], [1, 3]).sample(rng).id for _ in range(4000)]
    assert 2900 < drawn.count("b") < 3100
    assert {Mixture([a, b], [0, 2]).sample(rng).id for _ in range(50)} == {"b"}


def test_mixture_weighs_finite_sources_by_their_size():
    a, b = SampleList([make("a")]), SampleList([make("b")] * 9)
    rng = np.random.default_rng(2)
    drawn = [Mixture([a, b]).sample(rng).id for _ in range(4000)]
    assert 3500 < drawn.count("b") < 3700
    with pytest.raises(DatasetError, match=r"Counting without end .* a weight"):
        Mixture([a, Counting()])


def test_mixture_is_reproducible():
    mixture = Mixture([Counting(), Counting()], [1, 1])
    first, second = np.random.default_rng(5), np.random.default_rng(5)
    assert [mixture.sample(first) for _ in range(20)] == [mixture.sample(second) for _ in range(20)]


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1]])
def test_mixture_refuses_weights_that_do_not_fit(weights):
    with pytest.raises(DatasetError, match="give"):
        Mixture([Counting(), Counting()], weights)


def test_mixture_needs_a_source():
    with pytest.raises(DatasetError, match="0 sources"):
        Mixture([], [])


def test_data_rewards_returns_and_metrics_need_no_framework():
    code = (
        "import sys, qrag_train.data, qrag_train.metrics\n"
        "assert 'torch' not in sys.modules\n"
        "import qrag_train.returns, qrag_train.rewards\n"
        "heavy = {'langchain_core', 'llama_index', 'faiss', 'lightning', 'sentence_transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
