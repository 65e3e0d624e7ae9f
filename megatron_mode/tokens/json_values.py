"""Read JSON strictly: numbers are finite, no key comes twice, nulls that pad a table are no text.

Tables give every row the fields of all rows and fill those that a row lacks with null. Written as
JSON lines, such nulls stand in tool schemas and in the arguments of calls.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

from megatron_mode.tokens.read.lines import RefusedLine

# Python's own limit depends on where it is reached; no tool schema comes near this one.
TOOLS_LEVELS = 100
# A null under one of the first two means null; what stands under any of them is data, no schema.
MEANT_NULLS = ("default", "const")
SCHEMA_DATA = (*MEANT_NULLS, "enum", "examples", "example")
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")


class BadLineError(Exception):
    """Say why a line is no document; the reader adds file and line number."""


class NotFiniteError(ValueError):
    """Report NaN, Infinity or a number beyond a float's range, as it is written."""


def show(value: Any) -> str:
    """Show a value in an error, cut to 60 characters."""
    text = "missing" if value is None else json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadLineError(f"an object has the key {show(twice)} twice; give it once")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotFiniteError(text)
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_object_of, parse_float=_finite, parse_constant=_finite)


def read_json(text: str, field: str) -> Any:
    """Read JSON that stands in a field ("" for a line).

    Raises BadLineError for numbers and keys that are refused, ValueError where it is broken.
    """
    try:
        return STRICT.decode(text)
    except NotFiniteError as error:
        place = not_finite(json.loads(text), field)
        raise BadLineError(f"{place} is {error}; accepted are finite numbers") from None


def not_finite(value: Any, field: str) -> str | None:
    """Return the place of the first number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return field
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        inner = ((f"{field}.{key}" if field else key, held) for key, held in value.items())
    elif isinstance(value, list):
        inner = ((f"{field}[{index}]", held) for index, held in enumerate(value))
    return next(filter(None, (not_finite(held, place) for place, held in inner)), None)


def parse_json(line: bytes) -> Any:
    """Decode a line; raise BadLineError when it is refused, not UTF-8 or not JSON."""
    if isinstance(line, RefusedLine):
        raise BadLineError(line.decode())
    try:
        return read_json(line.decode("utf-8"), "")
    except UnicodeDecodeError as error:
        raise BadLineError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadLineError(f"malformed JSON at column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError):
        raise BadLineError("malformed JSON (nested too deep, or a number too long)") from None


def parsed(value: Any, field: str) -> Any:
    """Return a value, one that is a string read as JSON; BadLineError when it is broken."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value, field)
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"{field} is {show(value)}, broken JSON ({error})") from None


def parse_tools(tools: Any) -> Any:
    """Check the tool schemas; a string is read as JSON, an empty one as none."""
    if isinstance(tools, str):
        try:
            tools = read_json(tools, "tools") if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadLineError(
                f"tools is {show(tools)}, a tool schema that is not JSON; give a list of schemas "
                "or a string that holds one"
            ) from None
    if tools is None:
        return None
    if not isinstance(tools, list | dict):
        raise BadLineError(f"tools is {show(tools)}; use a list of tool schemas")
    level: list[Any] = [tools]
    has_nulls = False
    for _ in range(TOOLS_LEVELS):
        held = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = list(itertools.chain.from_iterable(held))
        if not level:
            return meant_schemas(tools) if has_nulls else tools
        has_nulls |= None in level
    raise BadLineError(f"tools is nested deeper than {TOOLS_LEVELS} levels; flatten the schemas")


def meant_schemas(schema: Any, *, by_name: bool = False) -> Any:
    """Leave out the nulls of schemas that mean nothing; by_name says that names are the keys."""
    if isinstance(schema, list):
        return [meant_schemas(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, inner in schema.items():
        if not by_name and key in SCHEMA_DATA:
            if inner is not None or key in MEANT_NULLS:
                kept[key] = inner
        elif inner is not None:
            kept[key] = meant_schemas(inner, by_name=not by_name and key in SCHEMAS_BY_NAME)
    return kept


def parameters_by_name(tools: Any) -> dict[str, Any]:
    """Return the schema of the arguments of each tool."""
    listed = tools if isinstance(tools, list) else [tools]
    functions = [one.get("function", one) for one in listed if isinstance(one, dict)]
    return {str(f.get("name")): f.get("parameters") for f in functions if isinstance(f, dict)}


def meant_values(value: Any, schema: Any) -> Any:
    """Leave out the nulls of a value at any depth, but where its schema takes null."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [meant_values(inner, schema.get("items")) for inner in value]
    if not isinstance(value, dict):
        return value
    given = schema.get("properties", schema)
    named = given if isinstance(given, dict) else {}
    return {
        key: meant_values(inner, named.get(key))
        for key, inner in value.items()
        if inner is not None or takes_null(named.get(key))
    }


def takes_null(schema: Any) -> bool:
    """Tell whether a schema names null among its values."""
    if not isinstance(schema, dict):
        return False
    kinds, values = schema.get("type"), schema.get("enum")
    choices = [schema.get("anyOf"), schema.get("oneOf")]
    return (
        kinds == "null"
        or schema.get("nullable") is True
        or (isinstance(kinds, list) and "null" in kinds)
        or (isinstance(values, list) and None in values)
        or any(key in schema and schema[key] is None for key in MEANT_NULLS)
        or any(takes_null(one) for held in choices if isinstance(held, list) for one in held)
    )
