"""One object that is a retriever in LangChain and in LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.callbacks import CallbackManager
from pydantic import Field, ValidationInfo, field_validator

from qrag_retriever import langchain
from qrag_retriever.llama_index import LlamaIndexHooks


# LangChain's base goes first: it is the pydantic model, whose metaclass and __init__ must win. What
# LangChain calls stays in a class of its own, since LlamaIndex wraps overrides of abstract methods.
class QRAGRetriever(langchain.QRAGRetriever, LlamaIndexHooks):
    """Multi-step retrieval for LangChain and LlamaIndex in one object.

    ``invoke``, ``ainvoke``, ``batch`` and ``stream`` make it a LangChain retriever, ``retrieve``
    and ``aretrieve`` a LlamaIndex retriever; `search` tells why each chunk was chosen.

    Settings as `qrag_retriever.langchain.QRAGRetriever`, and those of LlamaIndex:

    Attributes:
        callback_manager: LlamaIndex's callback manager.
        object_map: Objects that index nodes stand for, by id.
        verbose: Print when retrieval enters an object.

    Example:
        .. code-block:: python

            retriever = QRAGRetriever.from_texts(chunks, k=4)
            retriever.invoke("Who directed the film that won in 1994?")  # LangChain Documents
            retriever.retrieve("Who directed the film that won in 1994?")  # LlamaIndex nodes
            print(retriever.search("Who directed the film that won in 1994?"))
    """

    callback_manager: CallbackManager = Field(
        default_factory=CallbackManager, exclude=True, repr=False
    )
    object_map: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    verbose: bool = False

    if TYPE_CHECKING:  # nothing but the index has to be given, and settings have other names too

        def __init__(self, **settings: Any) -> None: ...

    @field_validator("callback_manager", "object_map", mode="before")
    @classmethod
    def _some(cls, value: Any, info: ValidationInfo) -> Any:
        """None is what LlamaIndex's own retrievers take for the default."""
        kind = CallbackManager if info.field_name == "callback_manager" else dict
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"give a {kind.__name__}, or None")
        return kind() if value is None else value

    @property
    def _verbose(self) -> bool:  # type: ignore[override]
        return self.verbose

    def get_prompts(self, config: Any = None) -> Any:  # noqa: ARG002
        """No prompts, as both frameworks read it."""
        return {}
