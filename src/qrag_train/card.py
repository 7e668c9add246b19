"""The model card of a trained model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qrag_retriever.config import QRAGConfig

_CARD = """---
library_name: qrag-retriever
tags: [sentence-transformers, retrieval, multi-hop, q-rag]
---

# Q-RAG retriever

Two encoders for multi-step retrieval (Q-RAG, arXiv 2511.07328), trained with `qrag-train`:
⟨E_s(question and chunks found so far), E_a(chunk)⟩ is the value of fetching that chunk next.

## Use

In LangChain and LlamaIndex, from a list of texts, Documents or Nodes:

```python
from qrag_retriever import QRAGModel, QRAGRetriever

retriever = QRAGRetriever.from_texts(chunks, model=QRAGModel.from_pretrained("{name}"))
print(retriever.search("a question whose evidence lies in several places"))
```

As a plain embedder, for the first step alone (unless in compact form, the folder also loads as
`SentenceTransformer("{name}")`):

```python
model = QRAGModel.from_pretrained("{name}").sentence_transformer()
scores = model.encode_query(["a question"]) @ model.encode_document(chunks).T
```

## Figures

On validation questions, {max_steps} chunks retrieved for each, after {updates} updates{mean_of}:

{figures}
{calibration}
## Data

{data}

## Settings

Of the model, at the end of training (`qrag_config.json` counts):

```json
{model}
```

Of its training:

```json
{settings}
```
"""


def model_card(name: str, config: QRAGConfig) -> str:
    """The text of the README.md in a model folder.

    Args:
        name: How examples call the model.
        config: Its settings; `training` may hold ``figures``, ``calibration``, ``data``,
            ``settings``, ``updates``, the ``max_steps`` of the figures, and as ``mean_of`` the
            names of what was averaged.
    """
    training = config.training
    model = json.loads(config.replace(training={}).to_json())
    del model["training"]
    return _CARD.format(
        name=name,
        max_steps=training.get("max_steps", config.max_steps),
        updates=training.get("updates", "?"),
        figures=_table(training.get("figures", {})),
        mean_of=_mean_of(training.get("mean_of", ())),
        calibration=_calibration(training.get("calibration", {}), config.max_steps),
        data=_json_block(training.get("data", {})),
        model=_json(model),
        settings=_json(training.get("settings", {})),
    )


def _json(values: object) -> str:
    """Sorted, so that a card is the same before and after its settings were written and read."""
    return json.dumps(values, indent=2, sort_keys=True)


def _mean_of(runs: Sequence[str]) -> str:
    if not runs:
        return ""
    return (
        f" (the weights are the mean of those of {', '.join(runs)}; data and settings below are "
        "the first one's)"
    )


def _table(figures: Mapping[str, Any]) -> str:
    rows = [f"| {name.removeprefix('val/')} | {figures[name]:.3f} |" for name in sorted(figures)]
    return "\n".join(["| measure | value |", "| --- | --- |", *rows])


def _calibration(figures: Mapping[str, Any], max_steps: int) -> str:
    if not figures:
        return ""
    return (
        f"\nStopped below Q = {figures['q_threshold']:.4f}, of at most {max_steps} chunks, on the "
        f"questions that chose this threshold: Fact-EM {figures['fact_em']:.3f}, Fact-F1 "
        f"{figures['fact_f1']:.3f}, {figures['steps']:.2f} chunks.\n"
    )


def _json_block(values: Mapping[str, Any]) -> str:
    return f"```json\n{_json(values)}\n```"
