"""Read and write YAML 1.2 with exact decimals; a repeated key is an error."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from megatron_mode.errors import ConfigError

LARGEST_EXPONENT = 308  # as float64; keeps exact fractions of a config small

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
    repeated: list[str]


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


def _build_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be plain text", key_node.start_mark
            )
        key = key_node.value
        if key in mapping:
            line = key_node.start_mark.line + 1
            loader.repeated.append(
                f"key {key!r} is given again on line {line}: accepted is each key once; "
                "delete one of the two"
            )
        # Deep, so that an alias of itself is refused by PyYAML instead of built.
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _build_decimal(loader: _Loader, node: yaml.ScalarNode) -> Decimal:
    try:
        value = Decimal(str(loader.construct_scalar(node)))
    except InvalidOperation:  # an exponent that does not fit 64 bits
        value = Decimal("Infinity")
    if not value.is_finite() or (value and abs(value.adjusted()) > LARGEST_EXPONENT):
        raise yaml.constructor.ConstructorError(
            None, None, f"the number {node.value} is beyond 1e±{LARGEST_EXPONENT}", node.start_mark
        )
    return value


def _build_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(_build_decimal(loader, node))


def _build_list(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _write_number(dumper: _Dumper, value: float | Decimal) -> yaml.ScalarNode:
    text = str(value)
    plain = text.lstrip("-").isdecimal()  # Decimal("1") reads back as the integer 1, its equal
    return dumper.represent_scalar(f"tag:yaml.org,2002:{'int' if plain else 'float'}", text)


_Loader.add_constructor("tag:yaml.org,2002:map", _build_mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _build_list)
_Loader.add_constructor("tag:yaml.org,2002:float", _build_decimal)
_Loader.add_constructor("tag:yaml.org,2002:int", _build_integer)
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
        tree = loader.get_single_data()
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


def write_yaml(tree: Any) -> str:
    """Write plain values, `Decimal` and tuples as YAML 1.2 that `parse_yaml` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_value(value: Any) -> str:
    """Write one value as YAML on one line, for messages and tables."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=9999)
    return " ".join(text.removesuffix("...\n").split())
