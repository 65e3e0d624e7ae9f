"""Describe every configuration key: what is accepted, the default, the meaning."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_mode.config.fields import Config
from megatron_mode.config.section import Section
from megatron_mode.config.yaml_text import write_value

_ARTICLES = {int: "an integer", float: "a number", Decimal: "an exact decimal"}


class FieldDescription(NamedTuple):
    """Say what one key accepts and means."""

    key: str
    """Dotted key; `[]` stands for the entries of a list."""
    accepted: str
    """What is accepted, in words."""
    default: str
    """The default as YAML, or `required`."""
    meaning: str
    """The field's docstring on one line."""


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
        return _describe_tuple(get_args(bare)) + ending
    if is_section(bare):
        return "a mapping of " + ", ".join(bare.model_fields) + ending
    if bare in _ARTICLES:
        return " ".join([_ARTICLES[bare], *_describe_bounds(bounds)]) + ending
    return {bool: "true or false", str: "text"}[bare] + ending


def _describe_tuple(parts: tuple[Any, ...]) -> str:
    if parts[-1] is Ellipsis:
        return f"a list, each {describe_accepted(parts[0])}"
    return "[" + ", ".join(describe_accepted(part) for part in parts) + "]"


def _describe_bounds(bounds: Sequence[Any]) -> Iterator[str]:
    given = {name: getattr(b, name) for b in bounds for name in ("ge", "gt", "le", "lt")
             if hasattr(b, name)}  # fmt: skip
    if given.keys() == {"ge", "le"}:
        most = re.sub(r"0{6,}$", lambda zeros: f"e{len(zeros[0])}", str(given["le"]))
        yield f"from {given['ge']} to {most}"
        return
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    phrases = [f"{words[name]} {limit}" for name, limit in given.items()]
    if phrases:
        yield " and ".join(phrases)


def describe_default(field: FieldInfo) -> str:
    """Write a field's default as YAML text; `required` where there is none."""
    if field.is_required():
        return "required"
    return write_value(field.default)


def describe_fields(
    section: type[Section] = Config, prefix: str = ""
) -> Iterator[FieldDescription]:
    """Describe every key below a section, in the order of declaration."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        bare, _, _ = unwrap(field.annotation)
        if is_section(bare):
            yield from describe_fields(bare, f"{key}.")
        elif get_origin(bare) is tuple and is_section(get_args(bare)[0]):
            yield from describe_fields(get_args(bare)[0], f"{key}[].")
        else:
            accepted = describe_accepted(field.annotation, field.metadata)
            meaning = " ".join((field.description or "").split())
            yield FieldDescription(key, accepted, describe_default(field), meaning)


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


def write_table() -> str:
    """Write the table of all keys in Markdown."""
    lines = ["| key | accepted | default | meaning |", "|---|---|---|---|"]
    for field in describe_fields():
        meaning = field.meaning.replace("|", "\\|")
        lines.append(f"| `{field.key}` | {field.accepted} | `{field.default}` | {meaning} |")
    return "\n".join(lines)


def renew_table(text: str, mark: str, table: str) -> str:
    """Replace what stands between the two marks of a table in a Markdown text."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def renew_page(path: str, mark: str, table: str) -> None:
    """Renew a table in a page."""
    page = Path(path)
    page.write_text(renew_table(page.read_text("utf-8"), mark, table), "utf-8")
