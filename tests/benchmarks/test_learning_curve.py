from __future__ import annotations

import json
from pathlib import Path

import learning_curve
import pytest
import yaml
from running import run, save_model, write_hotpotqa

from qrag_retriever import QRAGModel, SearchOptions
from qrag_train.data import read_hotpotqa
from qrag_train.evaluation import evaluate


def test_shares_of_the_annotated_questions(tmp_path: Path) -> None:
    file = write_hotpotqa(tmp_path)
    questions = {"file": str(file), "format": "hotpotqa"}
    config = tmp_path / "config.yaml"
    settings = {
        "model": {
            "encoder": str(save_model(tmp_path)),
            "pqn": {"environments": 2},
            "optimizer": {"warmup_updates": 1},
        },
        "data": {"train": [questions | {"weight": 1}], "val": [questions]},
        "trainer": {"accelerator": "cpu"},
    }
    config.write_text(yaml.safe_dump(settings))
    folder, out = tmp_path / "runs" / "curve", tmp_path / "curve.json"
    arguments = ("--config", config, "--folder", folder, "--updates", 2, "--json", out)
    run(learning_curve, *arguments, "--shares", 0.34, 1)
    few, all_ = json.loads(out.read_text())["rows"]
    assert (few["questions"], all_["questions"]) == (1, 3)
    for name, row in (("0.34", few), ("1", all_)):
        model = QRAGModel.from_pretrained(folder / name / "model")
        expected = evaluate(model, read_hotpotqa(file), SearchOptions(2))["fact_em"]
        assert row["hotpotqa"] == round(expected, 4)
        kept = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert [source["limit"] for source in kept["data"]["train"]] == [row["questions"]]
    assert out.with_name("curve_curve.png").exists()

    before = (folder / "1" / "checkpoints" / "last.ckpt").read_bytes()
    run(learning_curve, *arguments, "--json", tmp_path / "again.json", "--shares", 1)
    assert (folder / "1" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == [all_]
    more = ("--updates", 3, "--json", tmp_path / "more.json")
    with pytest.raises(SystemExit, match="1 holds another training"):
        run(learning_curve, *arguments, *more, "--shares", 1)


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(learning_curve, "train", lambda folder, *_: trained.append(folder.name))
    monkeypatch.setattr(learning_curve, "judge", lambda *_: {"hotpotqa": 0.5})
    file = write_hotpotqa(tmp_path)
    questions = {"file": str(file), "format": "hotpotqa"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": [questions], "val": [questions]}}))
    out = tmp_path / "curve.json"
    arguments = ("--config", config, "--folder", tmp_path / "runs", "--json", out, "--updates")
    run(learning_curve, *arguments, 2, "--shares", 1)
    run(learning_curve, *arguments, 2, "--shares", 0.34, 1)
    assert trained == ["1", "0.34"]
    assert [row["share"] for row in json.loads(out.read_text())["rows"]] == [0.34, 1]
    before = out.read_text()
    with pytest.raises(SystemExit, match=r"'updates': 2.*this run.*'updates': 3"):
        run(learning_curve, *arguments, 3, "--shares", 1)
    assert trained == ["1", "0.34"]
    assert out.read_text() == before
