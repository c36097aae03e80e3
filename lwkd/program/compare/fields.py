"""Plain values of a YAML file as the fields of a dataclass, of the right type; an error says what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lwkd.program.errors import ProgramError


def wrong(problem: str, remedy: str) -> ProgramError:
    """The error of a recipe."""
    return ProgramError(problem, remedy, code=2)


def fitted(value: Any, hint: Any) -> Any:
    """A plain value as a field of this type has it; the ValueError of one that does not fit says what was expected."""
    origin, of = get_origin(hint), get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in of:
            return value
        raise ValueError(f"one of {', '.join(of)}")
    if origin in (Union, UnionType):
        expected = []
        for part in of:
            try:
                return fitted(value, part)
            except ValueError as error:
                expected.append(str(error))
        raise ValueError(" or ".join(expected))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError("a list")
        if of[-1] is Ellipsis:
            return tuple(fitted(item, of[0]) for item in value)
        if len(value) != len(of):
            raise ValueError(f"a list of {len(of)}")
        return tuple(fitted(item, part) for item, part in zip(value, of, strict=True))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError("a mapping")
        return {fitted(key, of[0]): fitted(item, of[1]) for key, item in value.items()}
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as a word
            with suppress(ValueError):
                value = float(value)
        if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
            return value  # 1 stays 1: the names of results are made of it
        raise ValueError("a finite number")
    if isinstance(value, hint) and (hint is not int or type(value) is int):  # True is no number
        return value
    names = {int: "a whole number", str: "a text (in quotes)", bool: "true or false", type(None): "null"}
    raise ValueError(names.get(hint, hint.__name__))


def typed(value: Any, hint: Any, what: str) -> Any:
    """The same; the error of a value that does not fit names it as ``what``."""
    try:
        return fitted(value, hint)
    except ValueError as error:
        raise wrong(f"{what} is {value!r}", f"expected {error}") from error


def filled(kind: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """A dataclass from plain values of the types of its fields."""
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise wrong(f"{what}{name} is not known", f"known are {', '.join(hints)}")
    return kind(**{name: typed(value, hints[name], f"{what}{name}") for name, value in values.items()})
