"""Find configuration keys, and say in words what each accepts."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_mode.config.fields import Config
from megatron_mode.config.section import Section, Text

_ARTICLES = {int: "an integer", float: "a number", Decimal: "an exact decimal"}


def unwrap(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, tuple[Any, ...], bool]:
    """Return the bare type, its bounds, and whether null is accepted."""
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        more = [b for e in extras for b in (e.metadata if isinstance(e, FieldInfo) else [e])]
        return unwrap(inner, (*metadata, *more))
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(annotation) if part is not types.NoneType)
        bare, bounds, _ = unwrap(inner, metadata)
        return bare, bounds, True
    return annotation, tuple(metadata), False


def is_section(annotation: Any) -> bool:
    """Say whether a type is a mapping of further keys."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def describe_accepted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Say in words what a field of this type and these bounds accepts."""
    bare, bounds, optional = unwrap(annotation, metadata)
    ending = " or null" if optional else ""
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(bare)) + ending
    if get_origin(bare) is tuple:
        first, *rest = [describe_accepted(part) for part in get_args(bare) if part is not ...]
        is_list = get_args(bare)[-1] is ...
        return (f"a list, each {first}" if is_list else f"[{', '.join([first, *rest])}]") + ending
    if is_section(bare):
        return "a mapping of " + ", ".join(bare.model_fields) + ending
    if bare in _ARTICLES:
        return _ARTICLES[bare] + _describe_bounds(bounds) + ending
    texts = [bound.words for bound in bounds if isinstance(bound, Text)] or ["text"]
    return ("true or false" if bare is bool else texts[0]) + ending


def _describe_bounds(bounds: Sequence[Any]) -> str:
    given = {name: getattr(b, name) for b in bounds for name in ("ge", "gt", "le", "lt")
             if hasattr(b, name)}  # fmt: skip
    if given.keys() == {"ge", "le"}:
        most = re.sub(r"0{6,}$", lambda zeros: f"e{len(zeros[0])}", str(given["le"]))
        return f" from {given['ge']} to {most}"
    words = {"ge": " of at least", "gt": " above", "le": " of at most", "lt": " below"}
    return " and".join(f"{words[name]} {limit}" for name, limit in given.items())


def walk_fields(
    section: type[Section] = Config, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every key below a section, as they are declared.

    `[]` stands for the entries of a list.
    """
    for name, field in section.model_fields.items():
        bare, _, _ = unwrap(field.annotation)
        if is_section(bare):
            yield from walk_fields(bare, f"{prefix}{name}.")
        elif get_origin(bare) is tuple and is_section(get_args(bare)[0]):
            yield from walk_fields(get_args(bare)[0], f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}", field


def find_field(location: Sequence[str | int]) -> tuple[Any, Sequence[Any], FieldInfo | None]:
    """Return type, bounds and field at a path of keys and list positions below `Config`."""
    annotation: Any = Config
    metadata: Sequence[Any] = ()
    field: FieldInfo | None = None
    for part in location:
        bare, _, _ = unwrap(annotation, metadata)
        if is_section(bare) and part in bare.model_fields:
            field = bare.model_fields[str(part)]
            annotation, metadata = field.annotation, field.metadata
        elif get_origin(bare) is tuple and isinstance(part, int):
            parts = get_args(bare)
            annotation = parts[0] if parts[-1] is Ellipsis else parts[min(part, len(parts) - 1)]
            metadata, field = (), None
        else:
            return None, (), None
    return annotation, metadata, field
