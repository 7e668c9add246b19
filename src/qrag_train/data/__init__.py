"""Questions with support chunks: readers, generators and mixtures (no training framework)."""

from qrag_train.data.babi import read_babi
from qrag_train.data.babilong import BabiLong, hide_story
from qrag_train.data.books import BackgroundText, split_sentences
from qrag_train.data.candidates import CandidateSets
from qrag_train.data.hotpotqa import read_hotpotqa
from qrag_train.data.jsonl import read_corpus_jsonl, read_documents_jsonl
from qrag_train.data.linked import LinkedPassages, Passage, read_passages
from qrag_train.data.mixture import Mixture
from qrag_train.data.musique import read_musique
from qrag_train.data.passages import pooled
from qrag_train.data.ruler import Ruler, read_words
from qrag_train.data.sample import (
    FixedSamples,
    SampleList,
    SampleSource,
    SupportSample,
    finite,
)
from qrag_train.data.simulator import BabiSimulator
from qrag_train.data.squad import read_squad
from qrag_train.data.twowiki import read_twowiki, read_twowiki_open

__all__ = [
    "BabiLong",
    "BabiSimulator",
    "BackgroundText",
    "CandidateSets",
    "FixedSamples",
    "LinkedPassages",
    "Mixture",
    "Passage",
    "Ruler",
    "SampleList",
    "SampleSource",
    "SupportSample",
    "finite",
    "hide_story",
    "pooled",
    "read_babi",
    "read_corpus_jsonl",
    "read_documents_jsonl",
    "read_hotpotqa",
    "read_musique",
    "read_passages",
    "read_squad",
    "read_twowiki",
    "read_twowiki_open",
    "read_words",
    "split_sentences",
]
