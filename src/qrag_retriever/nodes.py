"""LlamaIndex nodes as chunks, and back. LlamaIndex is imported only once it is in use."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

from qrag_retriever.errors import IndexFormatError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_index.core.schema import BaseNode
    from typing_extensions import TypeIs

    from qrag_retriever.chunk import Chunk

_MEDIA = ("text_resource", "image_resource", "audio_resource", "video_resource")


def is_node(item: object) -> TypeIs[BaseNode]:
    """Whether an object is a LlamaIndex node; imports nothing to find out."""
    if "llama_index.core.schema" not in sys.modules:
        return False  # nobody can have made one
    from llama_index.core.schema import BaseNode

    return isinstance(item, BaseNode)


def read_node(node: BaseNode) -> dict[str, Any]:
    """What a chunk takes over from a node, apart from the id: texts, metadata, source.

    The node is copied (an IndexNode's object is shared), so later changes to it do not reach the
    chunk. A vector stored in the node is left out: it is not of this index's model.
    """
    from llama_index.core.schema import MetadataMode

    source = _copied(node)
    return {
        "text": node.get_content(metadata_mode=MetadataMode.NONE),
        "metadata": source.metadata,
        "embed_text": node.get_content(metadata_mode=MetadataMode.EMBED),
        "source": source,
    }


def node_from_chunk(chunk: Chunk) -> BaseNode:
    """A new node for a chunk, whatever the chunk was made from.

    Args:
        chunk: The chunk; its id becomes the node's.

    Returns:
        A node that the caller may write into: of the class of the chunk's source, with its
        relationships, templates and excluded keys, if that was a node; otherwise a TextNode.

    Example:
        >>> from qrag_retriever.chunk import Chunk
        >>> node = node_from_chunk(Chunk("a", "text", {"page": 3}))
        >>> node.class_name(), node.node_id, node.get_content(), node.metadata
        ('TextNode', 'a', 'text', {'page': 3})
    """
    from llama_index.core.schema import MetadataMode, TextNode

    # which a Document may call as it likes
    metadata = {str(name): value for name, value in copy.deepcopy(chunk.metadata).items()}
    if not is_node(chunk.source):
        return TextNode(id_=chunk.id, text=chunk.text, metadata=metadata)
    node = _copied(chunk.source, id_=chunk.id, metadata=metadata)
    if node.get_content(metadata_mode=MetadataMode.NONE) != chunk.text:
        node.set_content(chunk.text)
    return node


def _copied(node: BaseNode, **changes: Any) -> BaseNode:
    for name in type(node).model_fields:
        if name not in changes and name != "obj":
            changes[name] = copy.deepcopy(getattr(node, name))
    if is_node(getattr(node, "obj", None)):
        changes["obj"] = _copied(node.obj)  # type: ignore[attr-defined]
    return node.model_copy(update={**changes, "embedding": None})


def node_to_record(node: BaseNode) -> dict[str, Any]:
    """A node as plain JSON values, without its id and metadata, which the chunk has.

    Raises:
        InvalidInputError: If the node holds an object that is not a node (an IndexNode's retriever
            or query engine, say), or a value that is not JSON.
    """
    inner = getattr(node, "obj", None)
    if inner is not None and not is_node(inner):
        raise InvalidInputError(
            f"The object in IndexNode {node.node_id!r} is a {type(inner).__name__}; only nodes can "
            "be saved there. Leave obj empty and give the retriever the objects by index_id "
            "(object_map)."
        )
    bare = node if inner is None else node.model_copy(update={"obj": None})
    data = bare.model_dump(mode="json", exclude={"id_", "metadata", "embedding"})
    for name in _MEDIA:  # LlamaIndex leaves the bytes of images out of its JSON
        content = getattr(getattr(node, name, None), "data", None)
        if content is not None:
            data[name]["data"] = content.decode("ascii")
    record: dict[str, Any] = {"class": _class_path(type(node)), "data": data}
    if inner is not None:
        record["obj"] = {
            "id": inner.node_id,
            "metadata": inner.metadata,
            "node": node_to_record(inner),
        }
    return record


def node_from_record(record: dict[str, Any], id_: str, metadata: dict[str, Any]) -> BaseNode:
    """The node that :func:`node_to_record` was given.

    Raises:
        IndexFormatError: If its class is not known in this process.
    """
    from llama_index.core.schema import BaseNode

    known = {_class_path(kind): kind for kind in _with_subclasses(*BaseNode.__subclasses__())}
    if record["class"] not in known:
        raise IndexFormatError(
            f"The index holds a node of class {record['class']}, which is not known here. "
            "Import the module that defines it before reading the index."
        )
    node = known[record["class"]].from_dict({**record["data"], "id_": id_, "metadata": metadata})
    if "obj" in record:
        inner = record["obj"]
        node.obj = node_from_record(inner["node"], inner["id"], inner["metadata"])  # type: ignore[attr-defined]
    return node


def _class_path(kind: type[BaseNode]) -> str:
    """LlamaIndex's own classes by name alone: their modules move between releases."""
    library = kind.__module__.startswith("llama_index.core.")
    return kind.__name__ if library else f"{kind.__module__}.{kind.__qualname__}"


def _with_subclasses(*kinds: type[BaseNode]) -> Iterator[type[BaseNode]]:
    for kind in kinds:
        yield kind
        yield from _with_subclasses(*kind.__subclasses__())
