from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qrag_retriever.errors import ModelFormatError
from qrag_retriever.reference_config import ReferenceConfig

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """
seed: 42
mode: relative
modes: {none: {step: 1}, relative: {step: ${steps.${size}}, name: "at ${seed}, ${mode}"}}
size: large
steps:
  large: 20
chosen: ${modes.${mode}}
again: ${chosen.step}
path: data/${size}/${steps.large}.txt
empty: null
dangling: ${nowhere.at.all}
environment: ${oc.env:HOME}
loop: ${loop}
ring: {a: "x${ring.b}", b: "${ring.a}y"}
date: 2025-12-03
feedback: {api_key: secret}
logger: {log_dir: /home/someone}
"""


@pytest.fixture
def config(tmp_path: Path) -> ReferenceConfig:
    (tmp_path / "config.yaml").write_text(TEXT)
    return ReferenceConfig(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 42),
        ("modes.none.step", 1),
        ("modes.relative.step", 20),
        ("modes.relative.name", "at 42, relative"),
        ("chosen.step", 20),
        ("again", 20),
        ("path", "data/large/20.txt"),
        ("empty", None),
    ],
)
def test_references(config: ReferenceConfig, path: str, value: object) -> None:
    assert config.get(path) == value
    assert config.get("nowhere", path, "seed") == value


@pytest.mark.parametrize(
    "path", ["nowhere", "seed.deeper", "chosen.other", "dangling", "environment", "dangling.more"]
)
def test_settings_that_are_not_there(config: ReferenceConfig, path: str) -> None:
    with pytest.raises(ModelFormatError, match=f"has no setting {path}; it is not the complete"):
        config.get(path)
    assert config.get(path, default=7) == 7


@pytest.mark.parametrize("path", ["loop", "ring.a"])
def test_circles(config: ReferenceConfig, path: str) -> None:
    with pytest.raises(ModelFormatError, match=f"{path} refers to itself"):
        config.get(path)


def test_integers(config: ReferenceConfig) -> None:
    assert config.integer("nowhere", "again") == 20
    assert config.integer("nowhere", default=10) == 10
    for path in ("mode", "empty", "modes"):
        with pytest.raises(ModelFormatError, match="must be an integer of at least 1"):
            config.integer(path)


def test_record_keeps_references_and_no_secrets(config: ReferenceConfig) -> None:
    record = config.record()
    assert record["chosen"] == "${modes.${mode}}"
    assert record["modes"]["relative"]["step"] == "${steps.${size}}"
    assert record["date"] == "2025-12-03"
    assert not {"feedback", "logger"} & set(record)


@pytest.mark.parametrize(
    "content", [b"", b"- 1", b"a: [", b"\xff\xfe", b"a: !!python/name:os.system"]
)
def test_files_that_are_no_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ModelFormatError, match="Download it again"):
        ReferenceConfig(tmp_path / "config.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.yaml is missing\. Give the folder"):
        ReferenceConfig(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ModelFormatError, match="cannot be read"):
        ReferenceConfig(tmp_path / "config.yaml")
