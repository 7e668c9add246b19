"""The models that come with the package: their size, and that they do what they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrag_retriever import QRAGModel, QRAGRetriever, SearchOptions
from qrag_retriever.model_names import default_model
from qrag_train.data import BabiLong, BabiSimulator, BackgroundText, FixedSamples, split_sentences
from qrag_train.evaluation import search_samples
from qrag_train.metrics import retrieval_metrics

MODELS = default_model().parent
BOOK = Path(__file__).parents[2] / "examples" / "data" / "treasure_island.txt"
PASSAGES = [
    "The Lantern Road. The Lantern Road is a 1961 drama film directed by Ilse Brandt.",
    "The Lantern Festival. The Lantern Festival is held on the first full moon of the year.",
    "Ilse Brandt. Ilse Brandt was a German film director who was born in Lübeck.",
    "Henrik Vos. Henrik Vos is a Dutch film director who was born in Delft.",
    "Lübeck. Lübeck is a city on the river Trave in Northern Germany.",
    "Delft. Delft is a city on the river Schie in the Netherlands.",
    "Road cycling. Road cycling is the most widespread form of cycling.",
    "Rivers. A river is a natural stream of fresh water that flows towards an ocean.",
]


@pytest.mark.parametrize(("name", "megabytes"), [("multihop-en", 50), ("babilong", 10)])
def test_models_are_small_calibrated_and_described(name: str, megabytes: int) -> None:
    folder = MODELS / name
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < megabytes * 1e6
    model = QRAGModel.from_pretrained(name, device="cpu")
    assert model.config.q_threshold is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Fact-EM" in card
    assert str(Path.home()) not in card


def test_the_default_follows_a_question_from_passage_to_passage() -> None:
    retriever = QRAGRetriever.from_texts(PASSAGES)
    question = "In which city was the director of the film The Lantern Road born?"
    assert [pick.index for pick in retriever.search(question, k=2).steps] == [0, 2]


@pytest.mark.filterwarnings("ignore::qrag_retriever.errors.TruncationWarning")  # long sentences
@pytest.mark.parametrize("task", [1, 2, 3, 5])
def test_babilong_finds_the_facts_in_a_book(task: int) -> None:
    book = BackgroundText(split_sentences(BOOK.read_text(encoding="utf-8")))
    samples = list(FixedSamples(BabiLong(BabiSimulator(task), book, 250), 20, seed=task))
    model = QRAGModel.from_pretrained("babilong", device="cpu")
    beams = search_samples(model, samples, SearchOptions(6, runners_up=0))
    paths = [beam.retrieved for beam in beams]
    scores = retrieval_metrics(paths, [sample.support for sample in samples])
    assert scores["fact_em"] >= 0.9
