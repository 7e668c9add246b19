"""The same search over a vector store of LangChain or LlamaIndex.

`StoreCorpus` takes the place of a `ChunkIndex`; `Store` is what a database must be able to do, with
one file for each; `probe` finds out what its scores mean.
"""
