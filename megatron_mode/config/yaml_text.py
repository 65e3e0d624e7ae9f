"""Read and write YAML 1.2 with exact decimals; a repeated key is an error."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, NoReturn

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
    raise yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """Build mappings with text keys, text, truth values, integers and exact decimals."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute
    yaml_constructors: ClassVar[dict[Any, Any]] = {}  # those below and no others
    depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, a few lines of which name 10^9 values, and deep nesting."""
        event: Any = super().peek_event  # PyYAML's stubs give it no type
        if self.check_event(yaml.AliasEvent):
            _refuse("it has an alias (*name); write the value out", event().start_mark)
        if self.depth == MOST_DEPTH:
            _refuse(f"it is nested deeper than {MOST_DEPTH}", event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_tag(self) -> None:
        """Refuse tags, so that a scalar's kind always fits its text."""
        _refuse("it has a tag (!name); write the plain value", self.get_mark())

    def build_mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """Build a mapping with text keys, noting keys that stand twice."""
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse("a key must be plain text", key_node.start_mark)
            key = self.build_text(key_node)
            if key in mapping:
                self.repeated.append(
                    f"key {key!r} is given again on line {key_node.start_mark.line + 1}: accepted "
                    "is each key once; delete one of the two"
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def build_text(self, node: yaml.ScalarNode) -> str:
        """Build text, refusing what no file name and no UTF-8 file can hold."""
        if found := _UNWRITABLE.search(node.value):
            _refuse(f"the text holds the character U+{ord(found[0]):04X}", node.start_mark)
        return str(node.value)

    def build_decimal(self, node: yaml.ScalarNode) -> Decimal:
        """Build an exact decimal of a size that float64 has too."""
        try:
            value = Decimal(node.value)
        except InvalidOperation:  # an exponent that does not fit 64 bits
            value = Decimal("Infinity")
        if not value.is_finite() or (value and abs(value.adjusted()) > LARGEST_EXPONENT):
            _refuse(f"{node.value[:40]} is beyond 1e±{LARGEST_EXPONENT}", node.start_mark)
        return value


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
    _tag, _regex = f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$")
    _characters = ["" if character == "\0" else character for character in _first]
    _Loader.add_implicit_resolver(_tag, _regex, _characters)
    _Dumper.add_implicit_resolver(_tag, _regex, _characters)
_Loader.yaml_constructors = {
    "tag:yaml.org,2002:map": _Loader.build_mapping,
    "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "tag:yaml.org,2002:str": _Loader.build_text,
    "tag:yaml.org,2002:null": lambda loader, node: None,
    "tag:yaml.org,2002:bool": lambda loader, node: node.value.lower() == "true",
    "tag:yaml.org,2002:int": lambda loader, node: int(loader.build_decimal(node)),
    "tag:yaml.org,2002:float": _Loader.build_decimal,
}
_Dumper.add_representer(str, _Dumper.write_text)
_Dumper.add_representer(Decimal, _Dumper.write_number)
_Dumper.add_representer(float, _Dumper.write_number)
_Dumper.add_representer(tuple, _Dumper.represent_list)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse one YAML 1.2 document; numbers with a point or exponent become `Decimal`.

    `origin` names the text in messages. Raises ConfigError for text that is no YAML and for every
    key that a mapping repeats.
    """
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{origin} is not text: {error.reason}; write it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{origin} is not YAML{line}: {error.problem}; correct that place"
        ) from None
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
