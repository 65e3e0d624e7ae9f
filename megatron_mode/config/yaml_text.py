"""Read and write YAML 1.2 with exact decimals; a repeated key is an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, NoReturn

import yaml

from megatron_mode.errors import ConfigError

LARGEST_EXPONENT = 308  # as float64; keeps exact fractions of a config small
# Aliases counted as often as they are named: a few lines can name 10^9 nodes, or nest for ever.
MOST_NODES, MOST_DEPTH = 1_000_000, 40
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")

# PyYAML follows YAML 1.1, where 3e-4 is text, 014 is twelve, 1:30 is ninety and `no` is false.
_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):
    """Build mappings with text keys, integers and exact decimals."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute
    # Those below and no others: PyYAML's own for bool and timestamp fail on `!!bool x`.
    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    repeated: list[str]

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        """Refuse deep nesting where it is read: scanning it takes the square of its depth."""
        if self.flow_level > MOST_DEPTH:
            _refuse(f"it is nested deeper than {MOST_DEPTH}", self.get_mark())
        super().fetch_flow_collection_start(token_class)


class _Dumper(yaml.SafeDumper):
    """Write plain scalars that `_Loader` reads back as the same values."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value where it stands."""
        return True


for _name, _pattern, _first in _PLAIN_SCALARS:
    _tag, _regex = f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$")
    _characters = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(_tag, _regex, _characters)
    _Dumper.add_implicit_resolver(_tag, _regex, _characters)


def _refuse(problem: str, mark: Any) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


def _build_mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        _refuse("expected keys and values", node.start_mark)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _refuse("a key must be plain text", key_node.start_mark)
        key = _build_text(loader, key_node)
        if key in mapping:
            line = key_node.start_mark.line + 1
            loader.repeated.append(
                f"key {key!r} is given again on line {line}: accepted is each key once; "
                "delete one of the two"
            )
        # Deep, so that an alias of itself is refused by PyYAML instead of built.
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _build_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Build text, refusing what no file name and no UTF-8 file can hold, written as an escape."""
    text = str(loader.construct_scalar(node))
    if found := _UNWRITABLE.search(text):
        _refuse(f"the text holds the character U+{ord(found[0]):04X}", node.start_mark)
    return text


def _build_null(loader: _Loader, node: yaml.ScalarNode) -> None:
    loader.construct_scalar(node)


def _build_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    word = str(loader.construct_scalar(node)).lower()
    if word not in ("true", "false"):
        _refuse(f"{word[:40]} is neither true nor false", node.start_mark)
    return word == "true"


def _build_decimal(loader: _Loader, node: yaml.ScalarNode) -> Decimal:
    try:
        value = Decimal(str(loader.construct_scalar(node)))
    except InvalidOperation:  # no number, or an exponent that does not fit 64 bits
        value = Decimal("Infinity")
    if not value.is_finite() or (value and abs(value.adjusted()) > LARGEST_EXPONENT):
        _refuse(f"{node.value[:40]} is no number, or beyond 1e±{LARGEST_EXPONENT}", node.start_mark)
    return value


def _build_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(_build_decimal(loader, node))


def _build_list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _write_number(dumper: _Dumper, value: float | Decimal) -> yaml.ScalarNode:
    text = str(value)
    plain = text.lstrip("-").isdecimal()  # Decimal("1") reads back as the integer 1, its equal
    return dumper.represent_scalar(f"tag:yaml.org,2002:{'int' if plain else 'float'}", text)


_BUILDERS: dict[str, Callable[[Any, Any], Any]] = {
    "map": _build_mapping,
    "seq": _build_list,
    "str": _build_text,
    "null": _build_null,
    "bool": _build_bool,
    "int": _build_integer,
    "float": _build_decimal,
}
for _kind, _builder in _BUILDERS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _builder)
_Loader.yaml_constructors[None] = _Loader.construct_undefined  # of any other tag


def _write_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # Only double quotes escape the line breaks of Unicode; others read back as a space.
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _write_text)
_Dumper.add_representer(Decimal, _write_number)
_Dumper.add_representer(float, _write_number)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def parse_yaml(text: str, origin: str) -> Any:
    """Parse one YAML 1.2 document; numbers with a point or exponent become `Decimal`.

    `origin` names the text in messages. Raises ConfigError for text that is no YAML and for every
    key that a mapping repeats.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{origin} is not text: {error.reason}; write it as UTF-8") from None
    loader.repeated = []
    try:
        node = loader.get_single_node()
        _check_size(node, {})
        tree = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{origin} is not YAML{line}: {error.problem}; correct that place"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{origin} is not YAML: {type(error).__name__}; correct it") from None
    finally:
        loader.dispose()
    if loader.repeated:
        raise ConfigError("\n".join(f"{origin}: {line}" for line in loader.repeated))
    return tree


def _check_size(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return nodes below a node and its depth, aliases followed; refuse what is too much to build.

    `known` holds the sizes of nodes seen; a node inside itself is left to the builders, who refuse.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (0, 0)
    below: list[Any] = []
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        below = [part for pair in node.value for part in pair] if pairs else node.value
    sizes = [_check_size(part, known) for part in below]
    count = 1 + sum(nodes for nodes, _ in sizes)
    depth = 1 + max((depth for _, depth in sizes), default=0)
    if depth > MOST_DEPTH:
        _refuse(f"it is nested deeper than {MOST_DEPTH}", node.start_mark)
    if count > MOST_NODES:
        _refuse(f"with its aliases it has more than {MOST_NODES} values", node.start_mark)
    known[id(node)] = (count, depth)
    return count, depth


def write_yaml(tree: Any) -> str:
    """Write plain values, `Decimal` and tuples as YAML 1.2 that `parse_yaml` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_value(value: Any) -> str:
    """Write one value as YAML on one line, for messages and tables."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=9999)
    return " ".join(text.removesuffix("...\n").split())
