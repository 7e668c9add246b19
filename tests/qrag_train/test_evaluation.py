from __future__ import annotations

import numpy as np
import pytest
from tiny import Colours, tiny_model

from qrag_retriever import ChunkIndex, MultiStepRetriever, QRAGModel, SearchOptions
from qrag_train import evaluation
from qrag_train.data.sample import SupportSample
from qrag_train.evaluation import evaluate, search_samples, steps_above
from qrag_train.metrics import fact_scores, stop_kind


@pytest.fixture(scope="module", params=["relative", "absolute", "none"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QRAGModel:
    folder = tmp_path_factory.mktemp("encoder")
    return tiny_model(folder, request.param, scale=0.2, alpha=0.002)


@pytest.fixture(scope="module")
def samples() -> list[SupportSample]:
    rng = np.random.default_rng(4)
    return [Colours(n=n, support=2).sample(rng) for n in (6, 9, 4, 6)]


OPTIONS = [
    SearchOptions(3),
    SearchOptions(9),
    SearchOptions(3, beams=3),
    SearchOptions(3, q_threshold=0.55),
    SearchOptions(4, chunks_per_step=2),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("group", [10**6, 10])
def test_search_equals_the_engines(
    model: QRAGModel,
    samples: list[SupportSample],
    options: SearchOptions,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "_MOST_CHUNKS", group)
    beams = search_samples(model, samples, options)
    for beam, sample in zip(beams, samples, strict=True):
        ids = [str(i) for i in range(len(sample.chunks))]
        index = ChunkIndex.from_texts(list(sample.chunks), ids=ids, model=model)
        trajectory = MultiStepRetriever(model, index).search(sample.question, options)
        assert beam.retrieved == tuple(int(step.chunk.id) for step in trajectory)
        expected = [step.q_value for step in trajectory]
        assert [pick.q_value for pick in beam.picks] == pytest.approx(expected, abs=1e-5)


def test_search_equals_the_obvious_loop(model: QRAGModel, samples: list[SupportSample]) -> None:
    for beam, sample in zip(search_samples(model, samples, SearchOptions(3)), samples, strict=True):
        taken: list[int] = []
        actions = model.encode_actions(sample.chunks)
        for _ in range(3):
            order = sorted(taken) if model.config.state_order == "document" else taken
            state = model.encode_states([(sample.question, [sample.chunks[i] for i in order])])[0]
            rho = model.config.position_scheme.positions(len(actions), taken)
            q = turned(actions, rho) @ state
            q[taken] = -np.inf
            taken.append(int(q.argmax()))
        assert list(beam.retrieved) == taken


def turned(vectors: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Every half of a vector rotated on its own, by pairs of neighbours (METHOD §3)."""
    half = vectors.shape[1] // 2
    result = np.empty(vectors.shape)
    for start in (0, half):
        for m in range(half // 2):
            angle = rho * 10000.0 ** (-2 * m / half)
            x, y = vectors[:, start + 2 * m], vectors[:, start + 2 * m + 1]
            result[:, start + 2 * m] = x * np.cos(angle) - y * np.sin(angle)
            result[:, start + 2 * m + 1] = x * np.sin(angle) + y * np.cos(angle)
    return result


def test_figures(model: QRAGModel, samples: list[SupportSample]) -> None:
    whole = search_samples(model, samples, SearchOptions(4))
    threshold = float(np.median([pick.q_value for beam in whole for pick in beam.picks]))
    options = SearchOptions(4, q_threshold=threshold)
    stopped = search_samples(model, samples, options)
    figures = evaluate(model, samples, options)
    pairs = [fact_scores(b.retrieved, s.support) for b, s in zip(stopped, samples, strict=True)]
    assert figures["fact_em"] == pytest.approx(np.mean([pair.em for pair in pairs]))
    assert figures["fact_f1"] == pytest.approx(np.mean([pair.f1 for pair in pairs]))
    assert figures["recall@4"] == pytest.approx(np.mean([pair.recall for pair in pairs]))
    assert figures["steps"] == pytest.approx(np.mean([len(beam.picks) for beam in stopped]))
    kinds = [
        stop_kind(len(beam.picks), path.retrieved, sample.support)
        for beam, path, sample in zip(stopped, whole, samples, strict=True)
    ]
    could = sum(kind != "missed" for kind in kinds)
    for kind in ("early", "perfect", "late"):
        assert figures[f"stop_{kind}"] == pytest.approx(kinds.count(kind) / max(could, 1))


def test_without_a_threshold_there_are_no_stop_rates(
    model: QRAGModel, samples: list[SupportSample]
) -> None:
    assert not any(name.startswith("stop") for name in evaluate(model, samples, SearchOptions(2)))


@pytest.mark.parametrize("threshold", [None, -100.0, 0.0, 0.5, 0.55, 9.0])
def test_a_threshold_cuts_the_same_trajectory_short(
    model: QRAGModel, samples: list[SupportSample], threshold: float | None
) -> None:
    whole = search_samples(model, samples, SearchOptions(4))
    stopped = search_samples(model, samples, SearchOptions(4, q_threshold=threshold))
    for long, short in zip(whole, stopped, strict=True):
        assert long.retrieved[: steps_above(long, threshold)] == short.retrieved


def record_embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks that are embedded from now on."""
    embedded: list[str] = []
    original = QRAGModel.encode_actions

    def encode(self: QRAGModel, chunks: list[str], **options: object) -> np.ndarray:
        embedded.extend(chunks)
        return original(self, chunks, **options)

    monkeypatch.setattr(QRAGModel, "encode_actions", encode)
    return embedded


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_known_embeddings_change_nothing_and_are_not_made_again(
    model: QRAGModel, samples: list[SupportSample], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search_samples(model, samples, SearchOptions(3))
    texts = sorted({chunk for sample in samples for chunk in sample.chunks})
    recurring = texts[: round(share * len(texts))]
    known = evaluation.EmbeddedTexts(model, recurring)
    embedded = record_embedded(monkeypatch)
    for due in (texts, texts[len(recurring) :]):
        embedded.clear()
        found = search_samples(model, samples, SearchOptions(3), known)
        assert [beam.retrieved for beam in found] == [beam.retrieved for beam in expected]
        assert sorted(embedded) == due


def test_what_the_next_group_has_too_is_not_embedded_again(
    model: QRAGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stories = [("a cup", "a hat"), ("a hat", "a key", "a cup"), ("a key",), ("a cup",)]
    samples = [SupportSample(str(i), "where", story, (0,)) for i, story in enumerate(stories)]
    expected = [search_samples(model, [sample], SearchOptions(2))[0] for sample in samples]
    monkeypatch.setattr(evaluation, "_MOST_SAMPLES", 1)
    embedded = record_embedded(monkeypatch)
    found = search_samples(model, samples, SearchOptions(2))
    assert [beam.retrieved for beam in found] == [beam.retrieved for beam in expected]
    assert embedded == ["a cup", "a hat", "a key", "a cup"]


@pytest.mark.parametrize(
    ("most", "known", "shown"), [(1, False, True), (4, False, False), (1, True, False)]
)
def test_progress_of_long_searches_alone(
    model: QRAGModel,
    samples: list[SupportSample],
    most: int,
    known: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = search_samples(model, samples, SearchOptions(2))
    monkeypatch.setattr(evaluation, "_MOST_SAMPLES", most)
    capsys.readouterr()
    kept = evaluation.EmbeddedTexts(model) if known else None
    found = search_samples(model, samples, SearchOptions(2), kept)
    assert [beam.retrieved for beam in found] == [beam.retrieved for beam in expected]
    assert ("0/4" in capsys.readouterr().err) is shown
    search_samples(model, iter(samples), SearchOptions(2))  # how many is not known
    assert capsys.readouterr().err == ""


def test_questions_on_one_corpus_share_its_embeddings(model: QRAGModel) -> None:
    corpus = tuple(f"the {thing} fell" for thing in ("cup", "hat", "key"))
    samples = [SupportSample(str(i), "where is the cup", corpus, (i,)) for i in range(2)]
    first, second = evaluation.EmbeddedTexts(model, corpus).actions(samples)
    assert first is second


def test_groups_hold_no_more_than_fits_and_everything() -> None:
    sizes = [5, 90_000, 90_000, 90_000, 300_000, *[1] * 70]
    samples = [SupportSample("", "?", ("a",) * size, (0,)) for size in sizes]
    groups = list(evaluation.in_groups(iter(samples)))
    assert [len(sample.chunks) for group in groups for sample in group] == sizes
    assert [len(group) for group in groups] == [3, 1, 1, 64, 6]
    assert list(evaluation.in_groups([])) == []
    corpus = ("a",) * 150_000
    shared = [SupportSample("", "?", corpus, (0,)) for _ in range(5)]
    assert [len(group) for group in evaluation.in_groups([*shared, *samples[:2]])] == [6, 1]
