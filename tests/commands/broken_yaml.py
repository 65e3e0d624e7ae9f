"""Break the text of a run file: what is no YAML, no mapping, or too much of it."""

from __future__ import annotations

import random
from typing import Any

import yaml

BOMB = "b0: &b0 [x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
# Lines that no place at the top of a block mapping takes.
BROKEN_LINES: tuple[bytes, ...] = (
    b"x: \xff", b"\xfe\xff\x00x", b"x: \xc3\x28", b"\x80", b"x: \xed\xa0\x80",
    *(text.encode("utf-8", "surrogatepass") for text in (
        "\tx: 1", "x: [1, 2", "x: {a: 1", "@x: 1", "%x", "x: *nope", "x: &a [*a]", "? [a]\n: 1",
        "x: !!python/object:os.system id", "x: !!bool x", "x: !!map x", "x: !!timestamp x",
        "x: !local 3", "x: !!int x", "x: !!float .nan", "a: b: c", "- x", "x: `id`", "---\ny: 1",
        "run: {}", "x: 'unclosed", 'x: "unclosed', "x: |\ny", "...\n...\n}", "x:\n  y\n z: 1",
        'x: "\\0"', 'x: "\\ud800"', '"\\udfff": 1', "x: 1e400", "x: " + "9" * 4000,
        "x: " + "[" * 3000, "x: " + "{a: " * 3000, "x: " + "- " * 3000, BOMB, "x: \x00", "x: \x07",
        "\ud800: 1", "x: 1\nx: 2", "<<: *x", "x: !!binary ∆", "x: !!set {a}", "x: 2 3: 4",
    )),
)  # fmt: skip
NO_MAPPINGS: tuple[bytes, ...] = (
    b"", b" \n", b"# nothing\n", b"null\n", b"3\n", b"[]\n", b"- a\n- b\n", b"text\n", b"\x00" * 99,
    b"\xff\xfer\x00u\x00n\x00", b"PK\x03\x04", b"{", b"\xef\xbb\xbf", b"---\n---\n", b"!!str x",
    b"\x7fELF", b"<html>", b"run\n", b"{}\n", b"true",
)  # fmt: skip


def broken_text(rng: random.Random, tree: dict[str, Any]) -> tuple[str, bytes]:
    """Draw a file that is no YAML mapping, or one with a line that breaks it."""
    if rng.random() < 0.25:
        content = rng.choice(NO_MAPPINGS)
        return f"file {content[:20]!r}", content
    sections = [
        yaml.safe_dump({key: value}, allow_unicode=True).encode() for key, value in tree.items()
    ]
    line = rng.choice(BROKEN_LINES)
    place = rng.randrange(1, len(sections) + 1)
    return f"line {line[:40]!r} at {place}", b"\n".join(
        [*sections[:place], line + b"\n", *sections[place:]]
    )
