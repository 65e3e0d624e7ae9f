"""Load a run's configuration, reporting all its mistakes at once, and write it back.

`load_config` reads the tree (presets.py), turns numbers into what each field declares, validates
the fields (fields.py), then the rules between fields (rules.py). A rule is skipped when a field
that it looks at is wrong already.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_mode.command_line import suggest
from megatron_mode.config.describe import (
    describe_accepted,
    find_field,
    is_section,
    unwrap,
    walk_fields,
)
from megatron_mode.config.fields import Config
from megatron_mode.config.presets import Tree, TreeBuilder
from megatron_mode.config.rules import find_broken_rules
from megatron_mode.config.section import Text
from megatron_mode.config.yaml_text import write_value, write_yaml
from megatron_mode.errors import ConfigError

Location = tuple[str | int, ...]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Load a run file with its presets and dotted overrides `key.path=value`.

    Raises ConfigError with one line for each mistake: key, value, what is accepted, the fix.
    """
    builder = TreeBuilder(Path(path))
    for override in overrides:
        builder.override(override)
    return build_config(builder.tree, builder.mistakes, builder.broken)


def dump_config(config: Config) -> str:
    """Write every key of a config as YAML that `load_config` reads back as an equal config."""
    return write_yaml(config.model_dump())


def build_config(
    tree: Tree, mistakes: Sequence[str] = (), broken: frozenset[str] | set[str] = frozenset()
) -> Config:
    """Validate a tree of plain values; `mistakes` found before are reported with its own.

    `broken` names sections about which nothing more is said. Raises ConfigError.
    """
    lines = list(mistakes)
    wrong: set[Location] = {(section,) for section in broken}
    config: Config | None = None
    values = copy.deepcopy(tree)
    while config is None:
        try:
            config = Config.model_validate(as_declared(Config, values), strict=True)
        except ValidationError as error:
            # Mend each wrong field with a stand-in, so that one look finds the other mistakes.
            for detail in error.errors(include_url=False):
                location = detail["loc"]
                if not any(location[:depth] in wrong for depth in range(1, len(location) + 1)):
                    lines.append(_explain(detail))
                wrong.add(location)
                _mend(values, location, detail["type"] == "missing")
    lines.extend(find_broken_rules(config, lambda key: _is_wrong(key, wrong)))
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def as_declared(annotation: Any, value: Any) -> Any:
    """Turn lists into tuples and numbers into the declared kind where nothing is lost.

    All else stays as it is, for strict validation to judge: `true` is no integer, "12" no number.
    """
    bare, _, _ = unwrap(annotation)
    match value:
        case dict() if is_section(bare):
            fields = bare.model_fields
            declared = {key: field.annotation for key, field in fields.items()}
            return {key: as_declared(declared.get(key), item) for key, item in value.items()}
        case list() if get_origin(bare) is tuple:
            first, *others = get_args(bare)
            kinds = [first] * len(value) if others == [...] else [first, *others, *value]
            return tuple(as_declared(kind, item) for kind, item in zip(kinds, value, strict=False))
        case bool():  # no choice is a truth value, but Python's True equals 1
            return str(value).lower() if get_origin(bare) is Literal else value
        case int() if bare is Decimal:
            return Decimal(value)
        case Decimal() if bare is float and math.isfinite(float(value)):
            return float(value)
        case Decimal() if bare is int and value == value.to_integral_value():
            return int(value)  # 1e6 steps
    return value


def _mend(values: Tree, location: Location, missing: bool) -> None:
    """Put a stand-in for a missing value, take a wrong one out with the list that holds it."""
    keys = location
    while isinstance(keys[-1], int):
        keys, missing = keys[:-1], False
    here: Any = values
    for key in keys[:-1]:
        if key not in here and not isinstance(key, int):
            return  # an earlier mistake took the list out
        here = here[key]
    if not missing:
        here.pop(keys[-1], None)
        return
    bare, bounds, _ = unwrap(*find_field(location)[:2])
    texts = [bound.example for bound in bounds if isinstance(bound, Text)]
    stand_ins = {int: 1, str: texts[0] if texts else "unset"}
    here[keys[-1]] = {} if is_section(bare) else stand_ins[bare]


def _is_wrong(key: str, wrong: set[Location]) -> bool:
    path = tuple(key.split("."))
    return any(
        path[: len(location)] == location or location[: len(path)] == path for location in wrong
    )


def _explain(detail: ErrorDetails) -> str:
    """Say what is wrong with one field: key, value given, what is accepted, the fix."""
    location = detail["loc"]
    key = ".".join(str(part) for part in location)
    annotation, metadata, field = find_field(location)
    if detail["type"] == "extra_forbidden":
        parent, bounds, _ = find_field(location[:-1])
        known = list(unwrap(parent, bounds)[0].model_fields)
        fix = suggest(str(location[-1]), known) or _suggest_elsewhere(str(location[-1]))
        return f"{key} is not a key; accepted: one of {', '.join(known)}{fix}"
    accepted = describe_accepted(annotation, metadata)
    if detail["type"] == "missing":
        return f"{key} is missing; accepted: {accepted}; add it"
    given = detail["input"]
    fix = "; correct it"
    if isinstance(given, str):
        choices = get_args(unwrap(annotation)[0]) if "one of" in accepted else ()
        fix = suggest(given, list(map(str, choices))) or fix
    if unwrap(annotation)[0] is str and isinstance(given, int | Decimal):
        fix = f"; put it in quotes: '{given}'"
    elif fix == "; correct it" and field is not None and not field.is_required():
        if is_section(unwrap(annotation)[0]):
            return f"{key} is {write_value(given)[:60]}; accepted: {accepted}; write its keys"
        fix = f"; the default is {write_value(field.default)}"
    return f"{key} is {write_value(given)[:60]}; accepted: {accepted}{fix}"


def _suggest_elsewhere(name: str) -> str:
    """Name the key of another section whose last word is nearest."""
    by_word: dict[str, str] = {}
    for key, _ in walk_fields():
        parts = key.split(".")
        for depth in range(len(parts), 0, -1):  # sections too, such as mix.mode2_fraction
            by_word.setdefault(parts[depth - 1], ".".join(parts[:depth]))
    near = difflib.get_close_matches(name, list(by_word), n=1)
    return f"; did you mean {by_word[near[0]]}?" if near else "; remove it"
