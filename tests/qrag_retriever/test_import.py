"""What importing costs: each part loads only what it needs, seen in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from corpus import encoder_folder

FRAMEWORKS = ("langchain_core", "llama_index")
HEAVY = (*FRAMEWORKS, "torch", "transformers", "sentence_transformers", "faiss", "lightning")

# In one process, since torch alone takes seconds to load: first the engine, with everything blocked
# that it must do without; then the adapters, with what the first one loaded out of memory.
STAGES = f"""
import json, sys

class Refuse:
    blocked = {(*FRAMEWORKS, "faiss", "lightning", "matplotlib")!r}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.blocked:
            raise ImportError(name + " is blocked")

def loaded():
    return [name for name in {HEAVY!r} if name in sys.modules]

sys.meta_path.insert(0, Refuse())
report = {{}}

import qrag_retriever.adapter, qrag_retriever.scoring
from qrag_retriever import ChunkIndex, MultiStepRetriever, QRAGModel, SearchOptions

model = QRAGModel.from_encoder({encoder_folder()!r}, "relative", device="cpu")
index = ChunkIndex.from_texts(["Mary went.", "John took."], [{{"a": 1}}] * 2, model=model)
index.save(sys.argv[1])
index = ChunkIndex.load(sys.argv[1], model=model)
engine = MultiStepRetriever(model, index)
report["found"] = len(engine.search("Who went?", SearchOptions(k=2), filter={{"a": 1}}))
report["engine"] = loaded()

Refuse.blocked = ()
from qrag_retriever.langchain import QRAGRetriever
report["langchain"] = loaded()
for name in [name for name in sys.modules if name.split(".")[0] == "langchain_core"]:
    del sys.modules[name]

from qrag_retriever.llama_index import QRAGRetriever
report["llama_index"] = loaded()
print(json.dumps(report))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import qrag_retriever; dir(qrag_retriever); qrag_retriever.__version__",
        "from qrag_retriever import Chunk, ChunkIndex, QRAGConfig, QRAGError, Step, Trajectory",
        "from qrag_retriever import SearchOptions; SearchOptions(k=1)",
    ],
)
def test_the_package_loads_nothing_heavy(code):
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert python(f"{code}\n{report}") == ""


def test_each_part_loads_what_it_needs_alone(tmp_path):
    stages = json.loads(python(STAGES, str(tmp_path / "index")))
    engine = ["torch", "transformers", "sentence_transformers"]
    assert stages == {
        "found": 2,
        "engine": engine,
        "langchain": ["langchain_core", *engine],
        "llama_index": ["llama_index", *engine],
    }


def test_names_of_the_package():
    import qrag_retriever

    assert set(qrag_retriever.__all__) <= set(dir(qrag_retriever))
    for name in qrag_retriever.__all__:
        assert getattr(qrag_retriever, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = qrag_retriever.Nothing
