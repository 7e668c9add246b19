from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from qrag_retriever.errors import DatasetError
from qrag_train.cli import read_questions
from qrag_train.data import Mixture
from qrag_train.data.linked import LinkedPassages, Passage, bare, find_links, read_passages

PASSAGES = [
    Passage(
        "Treasure Island (novel)", "A novel by Robert Louis Stevenson. It has a map and Flint."
    ),
    Passage("Robert Louis Stevenson", "He was born in Edinburgh. He died on the island of Samoa."),
    Passage("Edinburgh (city)", "Capital of Scotland. Robert Louis Stevenson lived there."),
    Passage("Weir of Hermiston", "An unfinished novel by Robert Louis Stevenson, set in Scotland."),
    Passage("Flint", "A hard stone. Some novels have a captain of this name."),
    *(Passage(f"Island {i}", f"Island number {i} of the sea has {i} trees.") for i in range(12)),
]


def test_links_are_the_names_of_other_passages() -> None:
    expected = {
        (i, j)
        for i, (title, text) in enumerate(PASSAGES)
        for j, (other, _) in enumerate(PASSAGES)
        if i != j
        and len(bare(other)) > 8  # "Flint" is too short, "Island 3" as well
        and re.search(rf"\b{re.escape(bare(other))}\b", text)
    }
    links = list(find_links(PASSAGES))
    assert {(link.source, link.target) for link in links} == expected == {
        (0, 1), (1, 2), (2, 1), (3, 1)
    }  # fmt: skip
    assert all(link.sentence in PASSAGES[link.source].text for link in links)


def test_a_sample_leads_along_links_without_naming_where_to() -> None:
    source = LinkedPassages(PASSAGES, candidates=6)
    linked = {(link.source, link.target) for link in find_links(PASSAGES)}
    place = {f"{title}. {text}": i for i, (title, text) in enumerate(PASSAGES)}
    lengths = set()
    for seed in range(60):
        sample = source.sample(np.random.default_rng(seed))
        assert sample == source.sample(np.random.default_rng(seed))
        assert len(set(sample.chunks)) == 6
        way = [int(number) for number in sample.id.split("-")]
        lengths.add(len(way))
        assert all(step in linked for step in itertools.pairwise(way))
        assert {place[sample.chunks[i]] for i in sample.support} == set(way)
        assert bare(PASSAGES[way[-1]].title) not in sample.question
        others = {place[c] for i, c in enumerate(sample.chunks) if i not in sample.support}
        assert not any((other, way[-1]) in linked for other in others)  # they would do as well
    assert lengths == {2, 3}


def test_what_shares_the_questions_rarest_words_is_among_the_candidates() -> None:
    """A question on a captain meets the passage that has his pier, crew, wharf, toll and gold."""
    harbours = [
        Passage(f"Harbour of Xanthe{i}", f"Ships called at wharf{i} and paid toll{i} in gold{i}.")
        for i in range(40)
    ]
    captains = [
        Passage(
            f"Captain {i}", f"From pier{i} with crew{i} he sailed to Harbour of Xanthe{i} often."
        )
        for i in range(40)
    ]
    twins = [
        Passage(f"Twin {i}", f"A pier{i} and a crew{i}; a wharf{i} with toll{i} of gold{i}.")
        for i in range(40)
    ]
    source = LinkedPassages([*harbours, *captains, *twins], candidates=4)
    for seed in range(40):
        sample = source.sample(np.random.default_rng(seed))
        number = sample.id.split("-")[0]  # a captain's place among the passages
        twin = twins[int(number) - 40]
        assert any(chunk.startswith(f"{twin.title}.") for chunk in sample.chunks)


def test_what_is_made_up_has_no_size_for_its_share_of_a_mixture() -> None:
    with pytest.raises(DatasetError, match="LinkedPassages without end"):
        Mixture([LinkedPassages(PASSAGES)])


def test_links_are_needed() -> None:
    with pytest.raises(DatasetError, match="No passage names another"):
        LinkedPassages(PASSAGES[4:])


def test_reads_the_paragraphs_of_all_shapes(tmp_path: Path) -> None:
    shapes = {
        "plain.json": [{"title": "A", "text": "One. Two."}] * 2,
        "hotpotqa.json": [{"_id": "1", "context": [["A", ["One.", "Two."]]]}],
        "musique.jsonl": [{"paragraphs": [{"title": "A", "paragraph_text": "One. Two."}]}],
    }
    for name, records in shapes.items():
        file = tmp_path / name
        listed = name.endswith("json")
        file.write_text(json.dumps(records) if listed else "\n".join(map(json.dumps, records)))
        assert read_passages(file) == [Passage("A", "One. Two.")]
    (tmp_path / "bad.jsonl").write_text('{"title": "A"}\n{"text": "B"}')
    with pytest.raises(DatasetError, match="2 problems"):
        read_passages(tmp_path / "bad.jsonl")


def test_made_questions_are_judged_like_those_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "passages.json"
    context = [[passage.title, [passage.text]] for passage in PASSAGES]
    file.write_text(json.dumps([{"context": context}]))
    for pool in (False, True):
        [samples] = read_questions(str(file), format="linked", samples=7, pool=pool).values()
        assert len(samples) == 7
        assert all(sample.support for sample in samples)
