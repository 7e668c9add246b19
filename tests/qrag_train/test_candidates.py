from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import KilledError, assert_same_run, interrupt_at
from tiny import COLOURS, THINGS, fit_options, tiny_model

from qrag_retriever.errors import DatasetError
from qrag_train.cli import main
from qrag_train.data.candidates import CandidateSets
from qrag_train.data.datamodule import SupportDataModule
from qrag_train.data.sample import SupportSample
from qrag_train.evaluation import hard_negatives

CORPUS = tuple(f"the {colour} {thing} fell" for thing in THINGS for colour in COLOURS)


def question(number: int, support: tuple[int, ...]) -> SupportSample:
    return SupportSample(str(number), f"where is the {THINGS[number % 6]}", CORPUS, support)


@given(st.data())
def test_candidates_are_support_hard_negatives_and_random_chunks(data: st.DataObject) -> None:
    chunk = st.integers(0, len(CORPUS) - 1)
    support = tuple(data.draw(st.lists(chunk, min_size=1, max_size=4, unique=True)))
    negatives = data.draw(st.lists(chunk.filter(lambda i: i not in support), unique=True))
    size = data.draw(st.integers(len(support) + 1, len(CORPUS) + 5))
    hard = data.draw(st.integers(0, 10))
    sets = CandidateSets([question(0, support)], size, hard)
    sets.hard_negatives = [negatives]
    sample = sets.sample(np.random.default_rng(data.draw(st.integers(0, 99))))

    found = [CORPUS.index(text) for text in sample.chunks]
    assert found == sorted(set(found))
    assert len(found) == min(size, len(CORPUS))
    assert [found[i] for i in sample.support] == list(support)
    room = min(size, len(CORPUS)) - len(support)
    assert set(negatives[:hard][:room]) <= set(found)


@given(st.data())
def test_copies_of_support_are_no_candidates(data: st.DataObject) -> None:
    corpus = tuple(data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=30)))
    chunk = st.integers(0, len(corpus) - 1)
    support = tuple(data.draw(st.lists(chunk, min_size=1, max_size=3, unique=True)))
    negatives = data.draw(st.lists(chunk.filter(lambda i: i not in support), unique=True))
    size = data.draw(st.integers(len(support) + 1, 12))
    sets = CandidateSets([SupportSample("1", "?", corpus, support)], size, hard=4)
    sets.hard_negatives = [negatives]
    sample = sets.sample(np.random.default_rng(data.draw(st.integers(0, 99))))
    texts = [corpus[i] for i in support]
    wrong = [text for i, text in enumerate(sample.chunks) if i not in sample.support]
    assert not set(wrong) & set(texts)
    assert [sample.chunks[i] for i in sample.support] == texts
    others = [text for text in corpus if text not in texts]
    assert len(wrong) == min(size - len(support), len(others))


def test_the_others_are_drawn_evenly() -> None:
    sets = CandidateSets([question(0, (3,))], size=11, hard=2)
    sets.hard_negatives = [[4, 5, 6]]
    rng = np.random.default_rng(0)
    counts = np.zeros(len(CORPUS))
    draws = 3000
    for _ in range(draws):
        counts[[CORPUS.index(text) for text in sets.sample(rng).chunks]] += 1
    assert set(np.flatnonzero(counts == draws)) == {3, 4, 5}
    others = np.delete(counts, [3, 4, 5]) / draws
    assert others == pytest.approx(8 / 27, abs=0.05)


def test_hard_negatives_are_what_the_model_would_rather_retrieve(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "none")
    questions = [question(number, (number, 29 - number)) for number in range(4)]
    for sample, negatives in zip(
        questions, hard_negatives(model, questions, steps=2, count=5), strict=True
    ):
        ranks, taken = [], []
        for _ in range(2):
            state = (sample.question, [CORPUS[i] for i in taken])
            q = model.encode_actions(CORPUS) @ model.encode_states([state])[0]
            order = [int(i) for i in np.argsort(-q) if i not in taken]
            taken.append(order[0])
            ranks.append(order[1:6])
        expected = [*taken, *(i for pair in zip(*ranks, strict=True) for i in pair)]
        wrong = list(dict.fromkeys(i for i in expected if i not in sample.support))
        assert negatives == wrong[:5]


def test_copies_of_support_are_no_hard_negatives(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "none")
    corpus = (*CORPUS[:6], *CORPUS[:3])
    sample = SupportSample("1", "where is the cup", corpus, (1, 8))
    (negatives,) = hard_negatives(model, [sample], steps=9, count=9)
    assert sorted(negatives) == [0, 3, 4, 5, 6]


@pytest.mark.parametrize(("size", "hard"), [(2, 0), (0, 0), (5, -1)])
def test_numbers_of_candidates_are_checked(size: int, hard: int) -> None:
    with pytest.raises(DatasetError, match="give at least"):
        CandidateSets([question(0, (1, 2))], size, hard)


def corpus_options(folder: Path, **options: object) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    corpus, questions = folder / "corpus.jsonl", folder / "questions.jsonl"
    lines = [{"id": f"c{i}", "text": text} for i, text in enumerate(CORPUS)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [
        {"id": str(i), "question": f"the {t}", "support": [f"c{i}"]} for i, t in enumerate(THINGS)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"data.corpus": corpus, "data.candidates": 8, "data.hard_negatives": 4}
    files = {"data.train_file": questions, "data.val_file": questions}
    return fit_options(folder, **given, **files, **{"data.refresh_negatives": 2}, **options)


@pytest.mark.filterwarnings("ignore:.*both training and validation data")
def test_a_run_on_a_corpus_is_resumed_with_its_negatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    find = SupportDataModule.find_negatives

    def noted(data: SupportDataModule, model: object, steps: int, update: int) -> None:
        before = [sets.hard_negatives for sets in data.candidate_sets().values()]
        find(data, model, steps, update)
        after = [sets.hard_negatives for sets in data.candidate_sets().values()]
        if after[0] is not before[0]:
            searches.append(update)

    monkeypatch.setattr(SupportDataModule, "find_negatives", noted)
    # one step of the two that an episode takes: some are under way when the run is killed
    steps = {"model.pqn.rollout_steps": 1, "checkpoint_minutes": 0}
    assert main(corpus_options(tmp_path / "whole", **steps)) == 0
    assert searches == [0, 2, 4]
    arguments = corpus_options(tmp_path / "killed", **steps)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, None)
        with pytest.raises(KilledError):
            main(arguments)
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")
    saved = torch.load(tmp_path / "killed/run/checkpoints/last.ckpt", weights_only=False)
    negatives = saved["SupportDataModule"]["0"]
    assert all(len(found) == 4 and i not in found for i, found in enumerate(negatives))
