"""An encoder whose class is no class of transformers: it comes as code in the model's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_CODE = """
from transformers import BertConfig, BertModel


class OwnConfig(BertConfig):
    model_type = "own"


class OwnModel(BertModel):
    config_class = OwnConfig
"""


def bring_code(encoder: Path, folder: Path) -> Path:
    """Copy a BERT encoder to a folder and let its class come with it."""
    shutil.copytree(encoder, folder)
    config = folder / "config.json"
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(_CODE)
    return folder
