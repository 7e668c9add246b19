"""Errors and warnings of this package, all under one base.

Every message says what was given, what is allowed, and what to do next.
"""

from __future__ import annotations


class QRAGError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(QRAGError, ValueError):
    """An argument has a value that cannot be used (an empty query, ``k < 1``, a NaN threshold)."""


class ConfigError(QRAGError, ValueError):
    """Settings of a model, an index or a training run that do not go together."""


class DatasetError(QRAGError, ValueError):
    """Training or evaluation data that is missing, malformed or contradicts itself."""


class ModelFormatError(QRAGError):
    """A model folder or checkpoint that is incomplete, corrupt or of another kind."""


class UnsafeModelError(ModelFormatError):
    """A model folder that would run code, or unpickle, when loaded."""


class IndexFormatError(QRAGError):
    """An index folder that is incomplete, corrupt or of another version."""


class FingerprintMismatchError(IndexFormatError):
    """An index whose embeddings were made by another model than the one given."""


class ReaderError(QRAGError):
    """An LLM that should answer from what was retrieved cannot be reached, or fails."""


class VectorStoreError(QRAGError):
    """A vector store that fails, cannot serve, or returns what cannot be used."""


class MissingDependencyError(QRAGError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""

    @classmethod
    def of(cls, purpose: str, package: str, extra: str) -> MissingDependencyError:
        """The error for a purpose that needs a package, which an extra of this one brings."""
        return cls(f"{purpose} needs {package}; run: pip install 'qrag-retriever[{extra}]'")


class TruncationWarning(UserWarning):
    """A text is longer than the encoder can read; what lies beyond was cut off."""
