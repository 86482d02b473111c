"""Frozen dataclasses to and from plain values and TOML, with every field checked: specs, preprocessing, recipes."""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import inf, isfinite
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from isthmus.errors import IsthmusError, SpecError

__all__ = [
    "FROM_0",
    "FROM_1",
    "Range",
    "check_fields",
    "check_ranges",
    "finite",
    "from_dict",
    "from_toml",
    "override",
    "to_dict",
    "to_toml",
]

T = TypeVar("T")
SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a number", lambda value: type(value) in (int, float)),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("text", lambda value: type(value) is str),
}


def expectation(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """What a type hint asks for, in words and as a test."""
    if hint in SCALARS:
        return SCALARS[hint]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return "one of " + ", ".join(map(str, choices)), lambda value: value in choices
    if get_origin(hint) is tuple:
        inner, *rest = get_args(hint)
        words, holds = expectation(inner)
        length = None if rest == [...] else len(rest) + 1
        words = f"a list of {words}" if length is None else f"{length} values, each {words}"
        return (
            words,
            lambda value: type(value) is tuple and length in (None, len(value)) and all(holds(item) for item in value),
        )
    if type(None) in get_args(hint):
        words, holds = expectation(next(arg for arg in get_args(hint) if arg is not type(None)))
        return f"{words}, or nothing", lambda value: value is None or holds(value)
    return f"a {hint.__name__}", lambda value: isinstance(value, hint)


@cache
def expectations(cls: Any) -> tuple[tuple[str, str, Callable[[Any], bool]], ...]:
    """Name, words and test of each field."""
    hints = get_type_hints(cls)
    return tuple((field.name, *expectation(hints[field.name])) for field in fields(cls))


def check_fields(record: Any, error: type[IsthmusError] = SpecError) -> None:
    """Raise `error` naming the first field whose value is not of its declared type."""
    cls: Any = type(record)
    for name, words, holds in expectations(cls):
        value = getattr(record, name)
        if not holds(value):
            raise error(f"{name} is {value!r}; it must be {words}")


Range = tuple[str, Callable[[float], bool]]
"""What must hold of a number, in words and as a test."""
FROM_0: Range = ("be 0 or more", lambda value: 0 <= value < inf)
FROM_1: Range = ("be at least 1", lambda value: 1 <= value < inf)


def check_ranges(record: Any, ranges: Mapping[str, Range], error: type[IsthmusError]) -> None:
    """Raise `error` naming the first field whose number is out of its range."""
    for name, (words, holds) in ranges.items():
        value = getattr(record, name)
        if not holds(value):
            raise error(f"{name} is {value}; it must {words}")


def to_dict(record: Any, *, defaults: bool = True) -> dict[str, Any]:
    """Plain values of a record: nested records as dicts, tuples as lists, None (and at wish defaults) left out."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return to_dict(value, defaults=defaults)
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    values = {field.name: getattr(record, field.name) for field in fields(record)}
    usual = {} if defaults else {field.name: field.default for field in fields(record)}
    return {
        name: plain(value) for name, value in values.items() if value is not None and value != usual.get(name, MISSING)
    }


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values for JSON, which has no word for what is not a finite number: None in its place, at any depth."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not isfinite(value) else value

    return {name: plain(value) for name, value in values.items()}


def from_dict(cls: type[T], values: Any, error: type[IsthmusError] = SpecError, where: str = "") -> T:
    """The record that `to_dict` wrote; raises `error` naming an unknown, missing or wrong setting."""
    place = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise error(f"{where or cls.__name__} must be a table of settings; got {values!r}")
    hints = get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise error(f"unknown setting {place}{unknown[0]}; known: {', '.join(hints)}")

    def made(name: str, value: Any) -> Any:
        hint = next((arg for arg in get_args(hints[name]) if is_dataclass(arg)), hints[name])
        if not is_dataclass(hint):
            return (
                tuple(tuple(item) if isinstance(item, list) else item for item in value)
                if isinstance(value, list)
                else value
            )
        kind: type[Any] = hint  # type: ignore[assignment]
        if isinstance(value, list):
            return tuple(from_dict(kind, item, error, f"{place}{name}.{i}") for i, item in enumerate(value))
        return from_dict(kind, value, error, f"{place}{name}")

    made_values = {name: made(name, value) for name, value in values.items()}
    try:
        return cls(**made_values)
    except TypeError as missing:
        raise error(f"{where or cls.__name__}: {str(missing).partition('() ')[2]}") from missing
    except IsthmusError as inner:
        raise (type(inner)(f"{where}: {inner}") if where else inner) from inner


def from_toml(cls: type[T], text: str, error: type[IsthmusError] = SpecError) -> T:
    """The record that a TOML document describes."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as syntax:
        raise error(f"not a TOML document: {syntax}") from syntax
    return from_dict(cls, values, error)


def to_toml(values: dict[str, Any]) -> str:
    """A TOML document of scalars, lists, tables and one level of tables in lists."""

    def scalar(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
        return "[" + ", ".join(map(scalar, value)) + "]" if isinstance(value, list) else repr(value)

    def lines(table: dict[str, Any]) -> list[str]:
        return [f"{key} = {scalar(value)}" for key, value in table.items()]

    def rows(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and isinstance(value[0], dict)

    flat = {key: value for key, value in values.items() if not isinstance(value, dict) and not rows(value)}
    blocks = [lines(flat)]
    for key, value in values.items():
        if isinstance(value, dict):
            blocks.append([f"[{key}]", *lines(value)])
        elif rows(value):
            blocks.extend([f"[[{key}]]", *lines(row)] for row in value)
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def override(
    record: T, settings: Iterable[str], error: type[IsthmusError] = SpecError, example: str = "stages.0.mid=32"
) -> T:
    """The record with dotted settings applied, e.g. `shortcut=avg` or `stages.0.mid=32`; errors give the example."""
    values = to_dict(record)
    hints = get_type_hints(type(record))
    for setting in settings:
        path, equals, text = (part.strip() for part in setting.partition("="))
        if not (path and equals and text):
            raise error(f"setting {setting!r} is not of the form field=value, e.g. {example}")
        *parents, last = path.split(".")
        target: Any = values
        for part in parents:
            key: Any = int(part) if isinstance(target, list) and part.isdigit() else part
            known = range(len(target)) if isinstance(target, list) else target
            if key not in known or not isinstance(target[key], dict | list):
                raise error(f"setting {setting!r}: there is no {part!r}; known: {', '.join(map(str, known))}")
            target = target[key]
        if isinstance(target, list):
            rows = any(isinstance(row, dict) for row in target)
            whole = f"give the whole list, e.g. {'.'.join(parents)}={target}"
            raise error(
                f"setting {setting!r}: " + (f"name a field of the row too, e.g. {path}.mid=32" if rows else whole)
            )
        if last not in target and (target is not values or last not in hints):
            raise error(f"setting {setting!r}: there is no {last!r}; known: {', '.join(target)}")
        try:
            target[last] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            target[last] = text  # a bare word, as a shell passes it
    return from_dict(type(record), values, error)
