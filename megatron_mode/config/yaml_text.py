"""Read and write YAML 1.2 with exact decimals; a repeated key is an error."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import yaml

from megatron_mode.errors import ConfigError

LARGEST_EXPONENT = 308  # as float64; keeps exact fractions of a config small
MOST_DEPTH = 40
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")

# PyYAML follows YAML 1.1, where 3e-4 is text, 014 is twelve, 1:30 is ninety and `no` is false.
_PLAIN_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
}


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """Compose nodes whose scalars are text, null, truth values or numbers."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def fetch_tag(self) -> None:
        """Refuse tags, so that a scalar's kind always fits its text."""
        _refuse("it has a tag (!name); write the plain value", self.get_mark())


class _Dumper(yaml.SafeDumper):
    """Write plain scalars that `_Loader` reads back as the same values."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value where it stands."""
        return True

    def write_number(self, value: float | Decimal) -> yaml.ScalarNode:
        """Write a number plainly; Decimal("1") reads back as the integer 1, its equal."""
        kind = "int" if str(value).lstrip("-").isdecimal() else "float"
        return self.represent_scalar(f"tag:yaml.org,2002:{kind}", str(value))

    def write_text(self, value: str) -> yaml.ScalarNode:
        """Write text; only double quotes keep the line breaks of Unicode from becoming spaces."""
        style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


for _kind, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}",
            re.compile(f"(?:{_pattern})$"),
            ["" if character == "\0" else character for character in _first],
        )
_Dumper.add_representer(str, _Dumper.write_text)
_Dumper.add_representer(Decimal, _Dumper.write_number)
_Dumper.add_representer(float, _Dumper.write_number)
_Dumper.add_representer(tuple, _Dumper.represent_list)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse one YAML 1.2 document; numbers with a point or exponent become `Decimal`.

    `origin` names the text in messages. Raises ConfigError for text that is no YAML and for every
    key that a mapping repeats.
    """
    repeated: list[str] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = None if node is None else _build(node, set(), repeated, 0)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{origin} is not text: {error.reason}; write it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{origin} is not YAML{line}: {error.problem}; correct that place"
        ) from None
    except RecursionError:
        raise ConfigError(
            f"{origin} is nested deeper than {MOST_DEPTH}; write it flatter"
        ) from None
    if repeated:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in repeated))
    return tree


def _build(node: yaml.Node, seen: set[int], repeated: list[str], depth: int) -> Any:
    """Turn a node into plain values, noting keys that a mapping repeats."""
    if id(node) in seen:  # a few lines of aliases name 10^9 values
        _refuse("it has an alias (*name); write the value out", node.start_mark)
    seen.add(id(node))
    if depth == MOST_DEPTH:
        _refuse(f"it is nested deeper than {MOST_DEPTH}", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, seen, repeated, depth + 1) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node, node.tag.rpartition(":")[2])
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _refuse("a key must be plain text", key_node.start_mark)
        key = _scalar(key_node, "str")
        if key in mapping:
            repeated.append(
                f"key {key!r} is given again on line {key_node.start_mark.line + 1}; accepted: "
                "each key once; delete one of the two"
            )
        mapping[key] = _build(value_node, seen, repeated, depth + 1)
    return mapping


def _scalar(node: yaml.Node, kind: str) -> Any:
    """Return text, null, a truth value, an integer or a decimal of a size that float64 has."""
    text = str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "str":
        if found := _UNWRITABLE.search(text):
            _refuse(f"the text holds the character U+{ord(found[0]):04X}", node.start_mark)
        return text
    try:
        value = Decimal(text)
    except InvalidOperation:  # an exponent that does not fit 64 bits
        value = Decimal("Infinity")
    if not value.is_finite() or (value and abs(value.adjusted()) > LARGEST_EXPONENT):
        _refuse(f"{text[:40]} is beyond 1e±{LARGEST_EXPONENT}", node.start_mark)
    return int(value) if kind == "int" else value


def write_yaml(tree: Any) -> str:
    """Write plain values, `Decimal` and tuples as YAML 1.2 that `parse_yaml` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_value(value: Any) -> str:
    """Write one value as YAML on one line, for messages and tables."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=9999)
    return " ".join(text.removesuffix("...\n").split())
