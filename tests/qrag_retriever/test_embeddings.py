"""A model as embeddings of both frameworks, against its encoders."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from corpus import IDS, QUERIES, QUERY, TEXTS, make_index, make_model, model_copy_in, shared_model
from langchain_core.embeddings import Embeddings
from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.kvstore import SimpleKVStore

from qrag_retriever import QRAGEmbedding, QRAGEmbeddings, QRAGModel, QRAGRetriever
from qrag_retriever.errors import InvalidInputError

MODEL = shared_model()
ACTIONS = MODEL.encode_actions(TEXTS)
STATES = MODEL.encode_states([(query, []) for query in QUERIES])


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


async def test_langchain():
    embeddings = QRAGEmbeddings(MODEL)
    assert isinstance(embeddings, Embeddings)
    assert isinstance(embeddings.embed_query(QUERY)[0], float)
    for row, query in enumerate(QUERIES):
        same(embeddings.embed_query(query), STATES[row])
        same(await embeddings.aembed_query(query), STATES[row])
    same(embeddings.embed_documents(TEXTS), ACTIONS)
    same(await embeddings.aembed_documents(TEXTS), ACTIONS)
    assert embeddings.embed_documents([]) == []


async def test_llama_index():
    embedding = QRAGEmbedding(MODEL, embed_batch_size=4)
    assert isinstance(embedding, BaseEmbedding)
    assert embedding.embed_batch_size == 4
    assert isinstance(embedding.get_query_embedding(QUERY)[0], float)
    for row, query in enumerate(QUERIES):
        same(embedding.get_query_embedding(query), STATES[row])
        same(await embedding.aget_query_embedding(query), STATES[row])
    same(embedding.get_text_embedding(TEXTS[2]), ACTIONS[2])
    same(await embedding.aget_text_embedding(TEXTS[2]), ACTIONS[2])
    same(embedding.get_text_embedding_batch(TEXTS), ACTIONS)
    same(await embedding.aget_text_embedding_batch(TEXTS), ACTIONS)
    assert "weight" not in str(embedding.to_dict())
    copied = pickle.loads(pickle.dumps(QRAGEmbedding(MODEL, embed_batch_size=4, num_workers=3)))
    assert (copied.embed_batch_size, copied.num_workers) == (4, 3)


def test_caches_of_llama_index_tell_models_apart(tmp_path):
    other = QRAGModel.from_pretrained(model_copy_in(tmp_path))
    with torch.no_grad():
        next(other.action_encoder.parameters()).mul_(2)
    cache, nodes = IngestionCache(), [TextNode(text=text) for text in TEXTS[:2]]
    for model in (MODEL, other):
        pipeline = IngestionPipeline(transformations=[QRAGEmbedding(model)], cache=cache)
        found = pipeline.run(nodes=nodes)
        same([node.embedding for node in found], model.encode_actions(TEXTS[:2]))


def test_nor_do_they_take_a_changed_model_for_what_it_was():
    model = make_model()
    embedding, cache = QRAGEmbedding(model), IngestionCache()
    for change in ({}, {"chunk_prompt": "passage: "}, {"scale": 2.0}):
        model.config = model.config.replace(**change)
        pipeline = IngestionPipeline(transformations=[embedding], cache=cache)
        found = pipeline.run(nodes=[TextNode(text=text) for text in TEXTS[:2]])
        same([node.embedding for node in found], model.encode_actions(TEXTS[:2]))


def test_a_cache_that_tells_neither_queries_nor_models_apart_is_refused():
    with pytest.raises(InvalidInputError, match="one vector for a text"):
        QRAGEmbedding(MODEL, embeddings_cache=SimpleKVStore())


def test_a_deep_copy_shares_the_model():
    embedding = QRAGEmbedding(MODEL, embed_batch_size=4)
    copied = copy.deepcopy(embedding)
    assert copied.model is MODEL
    assert copied is not embedding
    assert copied.embed_batch_size == 4


def test_nodes_are_embedded_by_what_they_show_to_an_embedder():
    embedding = QRAGEmbedding(MODEL)
    node = TextNode(text=TEXTS[0], metadata={"city": "paris"})
    [embedded] = embedding([node])
    seen = node.get_content(MetadataMode.EMBED)
    assert "paris" in seen
    same(embedded.embedding, MODEL.encode_actions([seen])[0])


def test_a_similarity_search_is_the_first_step():
    embedding = QRAGEmbedding(MODEL)
    nodes = [TextNode(text=text, id_=id_) for text, id_ in zip(TEXTS, IDS, strict=True)]
    index = VectorStoreIndex(nodes, embed_model=embedding)
    stored = index.vector_store.data.embedding_dict
    first = QRAGRetriever(index=make_index(MODEL), k=1)
    for query in QUERIES:
        state = embedding.get_query_embedding(query)
        best = max(stored, key=lambda id_: float(np.dot(stored[id_], state)))
        assert [best] == first.search(query).chunk_ids


def test_models_by_folder(tmp_path):
    folder = model_copy_in(tmp_path)
    same(QRAGEmbeddings(folder).embed_documents(TEXTS), ACTIONS)
    embedding = QRAGEmbedding(folder)
    assert embedding.model_name == folder
    same(embedding.get_text_embedding_batch(TEXTS), ACTIONS)
    copy = pickle.loads(pickle.dumps(embedding))
    same(copy.get_text_embedding(TEXTS[1]), ACTIONS[1])
    again = QRAGEmbedding.from_dict(embedding.to_dict())
    same(again.get_text_embedding(TEXTS[1]), ACTIONS[1])


@pytest.mark.parametrize("kind", [QRAGEmbeddings, QRAGEmbedding])
def test_what_is_no_model_is_refused(kind):
    with pytest.raises(InvalidInputError, match="A model is"):
        kind(3)
