"""Turn a run file, its presets and the overrides into one tree of plain values.

A run file names presets as text (`model: tiny`) or as a mapping with `preset:` and changes beside
it. A preset of `model` or `mix` holds the keys of that section; a preset of `parallel` may also
fit the micro-batch, so it holds the sections `parallel:` and `batch:`. Later wins: preset, then run
file, then overrides in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_mode.command_line import suggest
from megatron_mode.config.yaml_text import parse_yaml, write_value
from megatron_mode.errors import ConfigError

PRESET_SECTIONS = {"model": ("model",), "mix": ("mix",), "parallel": ("parallel", "batch")}
MOST_BYTES = 8 << 20  # a config with ten thousand edits; /dev/zero never ends

Tree = dict[str, Any]


def find_configs() -> Path:
    """Return the folder `configs/` of the clone, or the copy that a wheel installs."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """Lay one tree over another; mappings merge, all else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, dict) and isinstance(value, dict)
        merged[key] = merge(under or {}, value) if both else value
    return merged


def read_mapping(path: Path) -> Tree:
    """Read a YAML file that holds a mapping; raises ConfigError."""
    example = "a YAML run file such as configs/run/tiny.yaml"
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text; accepted: YAML in UTF-8; convert it") from None
    except OSError as error:
        near = suggest(path.stem, [p.stem for p in (find_configs() / "run").glob("*.yaml")])
        raise ConfigError(
            f"config file {path} cannot be read ({error.strerror}); accepted: the path of "
            f"{example}{near or '; correct the path'}"
        ) from None
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"{path} is longer than {MOST_BYTES} bytes; accepted: {example}; name one"
        )
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if tree is None else repr(tree)[:60]}; accepted: a mapping "
            "of sections such as configs/run/tiny.yaml; add them"
        )
    return tree


class TreeBuilder:
    """Collect the tree of a run and every mistake met on the way.

    `tree` is the result, `mistakes` the sentences, `broken` the sections whose preset failed, about
    which nothing more can be said.
    """

    def __init__(self, run_file: Path) -> None:
        self.folders = (find_configs(), run_file.resolve().parent.parent)  # the later wins
        self.mistakes: list[str] = []
        self.broken: set[str] = set()
        self.tree: Tree = {}
        given = read_mapping(run_file)
        for section in PRESET_SECTIONS:
            self._place(section, given.pop(section, {}))
        self.tree = merge(self.tree, given)

    def override(self, text: str) -> None:
        """Apply one `key.path=value`, the value read as YAML."""
        try:
            self._override(text)
        except ConfigError as error:
            self.mistakes.append(str(error))

    def _override(self, text: str) -> None:
        key, equals, value_text = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"override {text!r} is not of the form key.path=value; accepted: for example "
                "batch.micro_rows=2; write it so"
            )
        if key != key.encode(errors="ignore").decode():
            raise ConfigError(
                f"override {text!r} has a key in bytes that are not UTF-8; accepted: "
                "key.path=value; correct the key"
            )
        value = parse_yaml(value_text, f"the value of {key}")
        if key.removesuffix(".preset") in PRESET_SECTIONS:
            key = key.removesuffix(".preset")
            self.tree.pop(key, None)
            self.broken.discard(key)
            self._place(key, value)
        else:
            self._set(key.split("."), value)

    def _place(self, section: str, value: Any) -> None:
        """Lay a preset and the changes beside it over the tree."""
        if isinstance(value, str | int | Decimal) and not isinstance(value, bool):
            value = {"preset": str(value)}
        if not isinstance(value, dict) or "preset" not in value:
            self.tree = merge(self.tree, {section: value})
            return
        changes = {key: item for key, item in value.items() if key != "preset"}
        try:
            preset = self._read_preset(section, value["preset"])
        except ConfigError as error:
            self.mistakes.append(str(error))
            self.broken.add(section)
            preset = {}
        self.tree = merge(merge(self.tree, preset), {section: changes})

    def _read_preset(self, section: str, name: Any) -> Tree:
        known = {p.stem: p for f in self.folders for p in sorted((f / section).glob("*.yaml"))}
        path = known.get(str(name))
        if path is None:
            fix = suggest(str(name), list(known)) or "; name one of them"
            raise ConfigError(
                f"{section} names the preset {str(name)!r}; accepted: one of "
                f"{', '.join(sorted(known))}{fix}"
            )
        body = read_mapping(path)
        sections = PRESET_SECTIONS[section]
        if len(sections) == 1:
            return {section: body}
        if strangers := [key for key in body if key not in sections]:
            raise ConfigError(
                f"{path} has the key {strangers[0]!r}; accepted: {' and '.join(sections)}; "
                "move it to the run file"
            )
        return body

    def _set(self, parts: Sequence[str], value: Any) -> None:
        """Set the leaf at a path, making mappings on the way and counting into lists."""
        here: Any = self.tree
        for depth, part in enumerate(parts):
            key = ".".join(parts[:depth])
            step: Any = part
            if isinstance(here, list):
                if not part.isdecimal() or int(part) >= len(here):
                    raise ConfigError(
                        f"{key} has no entry {part!r}; accepted: a position from 0 to "
                        f"{len(here) - 1}; give the complete list as {key}=[...]"
                    )
                step = int(part)
            elif not isinstance(here, dict):
                raise ConfigError(
                    f"{key} is the value {write_value(here)}, not a section; accepted: "
                    f"{key}=VALUE; leave out .{'.'.join(parts[depth:])}"
                )
            if depth == len(parts) - 1:
                here[step] = value
            else:
                here = here[step] if isinstance(here, list) else here.setdefault(step, {})
