"""Which chunks a search may see: one meaning for every way of writing a filter.

Two rules keep a filter from letting through what it was to keep out. A chunk that lacks a key is
not matched by any condition on that key, negated ones included (as NULL in SQL); only "is empty"
matches it. And what cannot be understood or compared is an error, never a match.
"""

from __future__ import annotations

import dataclasses
import operator
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from qrag_retriever.errors import InvalidInputError

if TYPE_CHECKING:
    from qrag_retriever.chunk import Chunk

_MISSING = object()


def compile_filter(filter: object) -> Callable[[Chunk], bool]:
    """Turn a filter into a function that says whether a chunk passes it.

    Args:
        filter: One of:

            * a function that takes a :class:`~qrag_retriever.chunk.Chunk` and returns a bool;
            * a mapping ``{key: value}``: the metadata has these values under all these keys. A
              value may be a mapping of operators: ``$eq $ne $gt $gte $lt $lte`` (compare), ``$in
              $nin`` (one, none of a list), ``$contains`` (a list holds the value, a string the
              substring), ``$not`` (of a mapping of operators). ``$and`` and ``$or`` in place of a
              key take a list of mappings, ``$not`` takes one;
            * LlamaIndex ``MetadataFilters`` with all its operators, also nested. Results equal
              those of LlamaIndex's in-memory store, except that its ``!=``, ``nin`` and ``not``
              match chunks that lack the key.

    Returns:
        The function; a :class:`CompiledFilter` unless a function was given.

    Raises:
        InvalidInputError: If the filter is empty, of another type, or has an operator or operand
            that is not allowed. Calling the result raises it too, where a chunk's value cannot be
            compared with the filter's (a string with a number, say).

    Example:
        >>> from qrag_retriever.chunk import Chunk
        >>> recent = compile_filter({"tenant": "a", "year": {"$gte": 2000}})
        >>> recent(Chunk("1", "text", {"tenant": "a", "year": 2024}))
        True
        >>> recent(Chunk("2", "text", {"tenant": "a"}))
        False
    """
    if isinstance(filter, Mapping):
        return CompiledFilter(_from_mapping(filter))
    if _is_llama_index(filter):
        return CompiledFilter(_from_llama_index(filter))
    if callable(filter):
        return lambda chunk: bool(filter(chunk))
    raise InvalidInputError(
        f"A filter of type {type(filter).__name__} is not supported; give a function on Chunk, "
        'a mapping such as {"tenant": "a", "year": {"$gte": 2000}}, or LlamaIndex MetadataFilters.'
    )


class CompiledFilter:
    """A filter that looks at nothing but a chunk's metadata.

    Attributes:
        key: Equal for filters that mean the same; ``None`` if a value in it cannot be hashed.
    """

    def __init__(self, condition: _Condition) -> None:
        self._condition = condition
        try:
            self.key: Hashable = condition.key()
            hash(self.key)
        except TypeError:
            self.key = None

    def __call__(self, chunk: Chunk) -> bool:
        """Whether a chunk passes."""
        return self.matches(chunk.metadata)

    def matches(self, metadata: Mapping[str, Any]) -> bool:
        """Whether metadata passes; what lacks a key that decides does not."""
        return self._condition.holds(metadata) is True


@dataclasses.dataclass(frozen=True)
class _Test:
    """One comparison. Like the conditions below it holds, does not, or is open (``None``)."""

    name: str
    operator: str
    value: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _listed(self.value))

    def holds(self, metadata: Mapping[str, Any]) -> bool | None:
        found = _listed(metadata.get(self.name, _MISSING))
        if self.operator == "is_empty":
            empty = isinstance(found, (str, list)) and not found
            return empty or found is _MISSING or found is None
        if found is _MISSING:
            return None
        if found is None and self.operator not in _WITH_NONE:
            return False
        try:
            return bool(_OPERATORS[self.operator](found, self.value))
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"The filter on {self.name!r} applies {self.operator!r} with a "
                f"{type(self.value).__name__}, but a chunk has a {type(found).__name__} there. "
                "Compare numbers with numbers and strings with strings."
            ) from error

    def key(self) -> Hashable:
        return (self.name, self.operator, _frozen(self.value))


@dataclasses.dataclass(frozen=True)
class _All:
    parts: tuple[_Condition, ...]

    def holds(self, metadata: Mapping[str, Any]) -> bool | None:
        result: bool | None = True
        for part in self.parts:
            holds = part.holds(metadata)
            if holds is False:
                return False
            result = None if holds is None else result
        return result

    def key(self) -> Hashable:
        return ("and", *(part.key() for part in self.parts))


@dataclasses.dataclass(frozen=True)
class _Not:
    part: _Condition

    def holds(self, metadata: Mapping[str, Any]) -> bool | None:
        holds = self.part.holds(metadata)
        return None if holds is None else not holds

    def key(self) -> Hashable:
        return ("not", self.part.key())


_Condition = _Test | _All | _Not


def _any(parts: tuple[_Condition, ...]) -> _Condition:
    return _Not(_All(tuple(_Not(part) for part in parts)))


def _listed(value: Any) -> Any:
    """Tuples as lists, which is what a saved index makes of them."""
    if isinstance(value, Mapping):
        return {name: _listed(entry) for name, entry in value.items()}
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _text_match(found: Any, wanted: str) -> bool:
    if not isinstance(found, str):
        raise TypeError("text match of something that is not text")
    return wanted in found


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "in": lambda found, wanted: found in wanted,
    "nin": lambda found, wanted: found not in wanted,
    "contains": operator.contains,
    "any": lambda found, wanted: any(value in found for value in wanted),
    "all": lambda found, wanted: all(value in found for value in wanted),
    "text_match": _text_match,
    "text_match_insensitive": lambda found, wanted: _text_match(
        found.lower() if isinstance(found, str) else found, wanted.lower()
    ),
}
_WITH_NONE = ("==", "!=", "in", "nin")  # for these, None is a value as any other
_SIGNS = {
    "$eq": "==",
    "$ne": "!=",
    "$gt": ">",
    "$gte": ">=",
    "$lt": "<",
    "$lte": "<=",
    "$in": "in",
    "$nin": "nin",
    "$contains": "contains",
}


def _test(name: object, sign: str, value: Any) -> _Condition:
    if not isinstance(name, str):
        raise InvalidInputError(f"A filter's keys must be strings; got {name!r}.")
    if sign in ("in", "nin", "any", "all"):
        allowed, fits = "a list", isinstance(value, (list, tuple, set, frozenset))
    elif sign in (">", ">=", "<", "<="):
        wrong = (list, tuple, set, frozenset, Mapping, type(None))
        allowed, fits = "a number or a string", not isinstance(value, wrong)
    elif sign in ("text_match", "text_match_insensitive"):
        allowed, fits = "a string", isinstance(value, str)
    elif sign not in _OPERATORS and sign != "is_empty":
        raise InvalidInputError(
            f"The filter on {name!r} has the unknown operator {sign!r}; "
            f"known: {', '.join([*_OPERATORS, 'is_empty'])}."
        )
    else:
        allowed, fits = "", True
    if not fits:
        raise InvalidInputError(
            f"The filter on {name!r} applies {sign!r}, which takes {allowed}; "
            f"got {type(value).__name__}."
        )
    return _Test(name, sign, value)


def _from_mapping(filter: Mapping[Any, Any]) -> _Condition:
    if not filter:
        raise InvalidInputError("The filter is empty; give at least one condition, or None.")
    return _joined([_entry(name, value) for name, value in filter.items()])


def _entry(name: object, value: Any) -> _Condition:
    if name in ("$and", "$or"):
        if not isinstance(value, (list, tuple)) or not value:
            raise InvalidInputError(f"{name} takes a list of at least one mapping; got {value!r}.")
        parts = [_from_mapping(_mapping(name, part)) for part in value]
        return _joined(parts) if name == "$and" else _any(tuple(parts))
    if name == "$not":
        return _Not(_from_mapping(_mapping(name, value)))
    if isinstance(name, str) and name.startswith("$"):
        raise InvalidInputError(
            f"{name!r} cannot stand in place of a key; only $and, $or and $not can."
        )
    if isinstance(value, Mapping):
        return _operators(name, value)
    return _test(name, "==", value)


def _operators(name: object, operators: Mapping[Any, Any]) -> _Condition:
    if not operators:
        raise InvalidInputError(f"The filter on {name!r} is empty; give a value or an operator.")
    parts: list[_Condition] = []
    for sign, value in operators.items():
        if sign == "$not":
            parts.append(_Not(_operators(name, _mapping(sign, value))))
        elif sign in _SIGNS:
            parts.append(_test(name, _SIGNS[sign], value))
        else:
            raise InvalidInputError(
                f"The filter on {name!r} has the unknown operator {sign!r}; "
                f"known: {', '.join([*_SIGNS, '$not'])}. Write {{'$eq': {{...}}}} to compare with "
                "a mapping."
            )
    return _joined(parts)


def _mapping(name: object, value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInputError(f"{name} takes mappings; got {type(value).__name__}.")
    return value


def _joined(parts: list[_Condition]) -> _Condition:
    return parts[0] if len(parts) == 1 else _All(tuple(parts))


def _is_llama_index(filter: object) -> bool:
    types = sys.modules.get("llama_index.core.vector_stores.types")
    return types is not None and isinstance(filter, types.MetadataFilters)


def _from_llama_index(filters: Any) -> _Condition:
    if not filters.filters:
        raise InvalidInputError("MetadataFilters holds no filter; give at least one, or None.")
    parts = [
        _from_llama_index(part)
        if _is_llama_index(part)
        else _test(part.key, part.operator.value, part.value)
        for part in filters.filters
    ]
    condition = "and" if filters.condition is None else filters.condition.value
    if condition == "and":
        return _joined(parts)
    if condition == "or":
        return _any(tuple(parts))
    if condition == "not":  # none of them holds
        return _Not(_any(tuple(parts)))
    raise InvalidInputError(f"Unknown condition {condition!r}; known: and, or, not.")


def _frozen(value: Any) -> Hashable:
    """A hashable stand-in that differs where values differ, types included (1 and True)."""
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = frozenset if isinstance(value, (set, frozenset)) else tuple
        return (type(value), kind(_frozen(entry) for entry in value))
    if isinstance(value, Mapping):
        return (dict, frozenset((name, _frozen(entry)) for name, entry in value.items()))
    return (type(value), value)
