"""The examples run as the README calls them, on the offline embedder."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qrag_retriever import offline

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.skipif(
    not offline.is_installed(), reason="the examples need the extra 'offline'"
)


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some chapters with both places that answer the question: they take less time than all."""
    chapters = re.split(r"\n\d+\n", (EXAMPLES / "data" / "treasure_island.txt").read_text("utf-8"))
    file = tmp_path_factory.mktemp("book") / "excerpt.txt"
    file.write_text("\n".join(chapters[number] for number in (15, 33, 34)), "utf-8")
    return str(file)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in a folder of its own, in this process: it has imported the packages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_quickstart_finds_what_one_step_misses(run, excerpt, tmp_path):
    first = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", "--book", excerpt, "--plot", "steps.png"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "steps.png").stat().st_size > 10_000
    several, one, *_ = first.stdout.split("\n--- ")[1:]
    for evidence in ("Ben Gunn", "That was Flint's treasure"):
        assert evidence in several
    assert "That was Flint's treasure" not in one
    # the second run maps the saved index and finds the same
    again = run("quickstart.py", "--book", excerpt)
    assert again.split("\n--- ")[1] == several


def test_langchain_chain_gets_the_passages(run, excerpt):
    answer = run("langchain_rag.py", "--book", excerpt)
    assert "That was Flint's treasure" in answer


def test_llama_index_engine_reports_its_steps(run, excerpt):
    answer = run("llama_index_rag.py", "--book", excerpt)
    assert [line.split(":")[0] for line in answer.splitlines()[:4]] == [
        f"step {number}" for number in (1, 2, 3, 4)
    ]
    assert "That was Flint's treasure" in answer


def test_a_vector_database_gives_the_same_steps(run, excerpt):
    pytest.importorskip("langchain_qdrant")
    first = run("vector_store.py", "--book", excerpt)
    several, half, second = first.split("--- ")[1:]
    for evidence in ("Ben Gunn", "That was Flint's treasure"):
        assert evidence in several
        assert evidence in second
    numbers = [int(line.split()[3]) for line in half.splitlines() if line[:4].strip().isdigit()]
    assert len(numbers) == 4
    assert max(numbers) < 37
    # the second run finds the collection and asks it the same
    assert run("vector_store.py", "--book", excerpt) == first


def test_finetuning_ends_with_a_model_in_both_frameworks(run, tmp_path):
    out = run("finetune_on_your_corpus.py", "--updates", "1")
    parts = out.split("--- ")
    assert "3 notes in steps: Fact-EM" in parts[1]
    assert parts[3].startswith("the trained model")
    assert "3 notes in steps: Fact-EM" in parts[3]
    assert parts[4].startswith("in LangChain")
    assert parts[4].count("Document: ") == 3
    assert parts[5].count("NodeWithScore: ") == 3
    assert (tmp_path / "runs" / "handbook" / "model" / "qrag_config.json").exists()
