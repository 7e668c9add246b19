from __future__ import annotations

import json
from pathlib import Path

import corpus_sizes


def test_table_from_the_parts(tmp_path: Path) -> None:
    scans = [
        {"type": "int8", "positions": "continuous", "states": 1, "retrieved": r, "milliseconds": 10}
        for r in range(4)
    ]
    floor = {"what": "a query beside its encoder passes", "chunks": 1_000}
    batch = {"positions": "relative", "type": "int8", "state_encoder": True, "chunks": 100_000}
    results = {
        "scoring": {"matrix": {"chunks": 500_000, "dimension": 384}, "figures": scans},
        "serving": {
            "figures": [
                floor | {"query_milliseconds": 25, "passes_milliseconds": 20},
                batch | {"queries_per_s_one_by_one": 20},
            ]
        },
        "encoding": {"figures": [{"texts": "even", "chunk_index_per_s": 100}]},
        "ann": {
            "chunks": 1_000_000,
            "figures": [{"type": "float32", "kind": "hnsw", "approximate_milliseconds": 1}],
        },
    }
    for name, content in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows = [line.split(" | ") for line in corpus_sizes.table(tmp_path).splitlines()[2:]]
    cells = {row[0].strip("| "): [cell.strip(" |") for cell in row[2:]] for row in rows}
    # as they were measured
    assert cells["1,000"] == ["1.5 MB / 388 kB", "25 ms", "–", "≈ 10 s"]
    assert cells["100,000"][1] == "50 ms"
    # 20 ms of encoder passes and 4 scans of 10 ms for half a million
    assert cells["1,000,000"][:3] == ["1.5 GB / 388 MB", "≈ 100 ms", "≈ 24 ms"]
    assert cells["10,000"][1] == "≈ 21 ms"
    assert cells["1,000,000,000"] == ["1.5 TB / 388 GB", "≈ 80 s", "–", "≈ 116 days"]


def test_the_readme_has_the_table_of_the_results() -> None:
    root = Path(__file__).parents[2]
    table = corpus_sizes.table(root / "examples" / "benchmarks" / "results")
    assert table.strip() in (root / "README.md").read_text(encoding="utf-8")
