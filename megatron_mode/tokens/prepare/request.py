"""Say what a preparation was asked for, and decide by seeded draws where each document goes.

A draw is a pure function of seed, purpose and names, so it does not depend on the order of the
input, the number of workers, or how the work is split.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mode import __version__
from megatron_mode.tokens.documents import Document
from megatron_mode.tokens.mode_tokens import ModeTokens
from megatron_mode.tokens.read.readers import input_files, size_bytes
from megatron_mode.tokens.template import Rendering

WORK_FORMAT = 4
DRAW_RANGE = 1 << 64
RENDERINGS: tuple[Rendering, ...] = ("chat", "plain")
HELD_OUT_CHAT, HELD_OUT_PLAIN = 2, 3


def draw(seed: int, purpose: str, *names: str) -> int:
    """Return a number in [0, 2**64) drawn for these names."""
    text = "\x1f".join((str(seed), purpose, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mode_token_key(seed: int, document: Document) -> int:
    """Return the key by which the places of a document's mode tokens are drawn."""
    return draw(seed, "mode-token", document.source, document.id)


@functools.lru_cache(maxsize=1024)
def order_key(seed: int, source: str) -> bytes:
    """Return the key of a source's order."""
    return hashlib.blake2b(f"{seed}\x1forder\x1f{source}".encode(), digest_size=32).digest()


def output_name(source: str, mode: int, code: int) -> str:
    """Return the name of the prepared source that an output code stands for."""
    if code < HELD_OUT_CHAT:
        return source
    return f"{source}-valid" if mode == 1 else f"{source}-valid-{RENDERINGS[code & 1]}"


@dataclass(frozen=True)
class Split:
    """Hold the shares (0 to 1, by document) and the sources that are held out completely."""

    seed: int
    plain_share: float
    valid_share: float
    valid_sources: frozenset[str]
    mode_tokens: ModeTokens = field(default_factory=ModeTokens)
    keeps_copies: bool = False
    """Keep documents whose contents came before in their source."""

    def is_held_out(self, document: Document) -> bool:
        """Tell whether a document is kept from training; equal ids of a source stay together."""
        if document.source in self.valid_sources:
            return True
        value = draw(self.seed, "valid", document.source, document.id)
        return value < self.valid_share * DRAW_RANGE

    def outputs(self, document: Document, line_number: int) -> list[int]:
        """Return the output codes of a document: 2 if it is held out, and 1 if it is plain."""
        if self.is_held_out(document):
            return [HELD_OUT_PLAIN] if document.mode == 1 else [HELD_OUT_PLAIN, HELD_OUT_CHAT]
        if document.mode == 1:
            return [1]
        # The line takes part so that a source whose lines all share one id is still mixed.
        names = (document.source, document.id, str(line_number))
        return [int(draw(self.seed, "plain", *names) < self.plain_share * DRAW_RANGE)]

    def order_digest(self, source: str, position: int, contents: Iterable[bytes]) -> bytes:
        """Return the 16 bytes by which the documents of a source are sorted: the shuffle.

        Copies share them, unless they are kept: then the position takes part.
        """
        digest = hashlib.blake2b(digest_size=16, key=order_key(self.seed, source))
        if self.keeps_copies:
            digest.update(position.to_bytes(8, "little"))
        for content in contents:
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.digest()


@dataclass(frozen=True)
class Preparation:
    """Hold what `megatron-mode prepare` was asked for."""

    out: Path
    inputs: tuple[Path, ...]
    tokenizer: Path | None
    """Model to use; None trains one of vocab_size pieces."""
    vocab_size: int
    split: Split
    workers: int
    max_bad_lines: int
    refuses_repeated_ids: bool = False
    licence: str | None = None
    licences: tuple[tuple[str, str], ...] = ()
    """Licences of sources that have their own."""
    is_shard: bool = False
    """Whether a merge is to follow, of `shards` parts; this one is number `shard`."""
    shard: int = 0
    shards: int = 1

    def description(self, tokenizer_digest: str | None) -> dict[str, Any]:
        """Return all that decides the result, as JSON; it also serves a later merge."""
        split = self.split
        paths = [os.path.realpath(path) for path in self.inputs]
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        return {
            "version": f"{__version__}/{WORK_FORMAT}",
            "tokenizer": tokenizer_digest or f"{self.vocab_size} pieces to train",
            "seed": split.seed,
            "plain_share": split.plain_share,
            "valid_share": split.valid_share,
            "valid_sources": sorted(split.valid_sources),
            "mode_tokens": split.mode_tokens.record(split.seed),
            "duplicates": "keep" if split.keeps_copies else "drop",
            "duplicate_ids": "error" if self.refuses_repeated_ids else "rename",
            "max_bad_lines": self.max_bad_lines,
            "licence": self.licence,
            "licences": dict(self.licences),
            "shards": self.shards,
            # Named from the folder on that holds all of them.
            "inputs": [
                {"name": Path(path).relative_to(root).as_posix(), "path": path, **stamp(Path(path))}
                for path in paths
            ],
        }

    @property
    def shares_files(self) -> bool:
        """Tell whether all shards read all inputs, each its share of the lines."""
        return len(self.inputs) < self.shards

    def dealt_inputs(self) -> list[int]:
        """Return the inputs to read: the largest file goes first to the shard with the least."""
        if self.shares_files:
            return list(range(len(self.inputs)))
        sizes_bytes = [size_bytes(path) for path in self.inputs]
        loads = [0] * self.shards
        mine = []
        for index in sorted(range(len(sizes_bytes)), key=lambda i: (-sizes_bytes[i], i)):
            target = loads.index(min(loads))
            # Empty files count too, so that none of the shards gets them all.
            loads[target] += sizes_bytes[index] + 1
            if target == self.shard:
                mine.append(index)
        return sorted(mine)


def stamp(path: Path) -> dict[str, int]:
    """Return what tells an input from a changed one without reading it."""
    times = [file.stat().st_mtime_ns for file in input_files(path) if file.exists()]
    return {"bytes": size_bytes(path), "changed_ns": max(times, default=0)}


def content_digest(path: Path) -> str:
    """Return the SHA-256 of an input; of a folder, that of its files' names and digests."""
    if path.is_dir():
        lines = [
            f"{content_digest(f)}  {f.relative_to(path).as_posix()}" for f in input_files(path)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
