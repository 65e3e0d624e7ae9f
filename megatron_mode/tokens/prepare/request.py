"""Say what a preparation was asked for, and whether two were asked for the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mode import __version__
from megatron_mode.tokens.prepare.split import Split
from megatron_mode.tokens.read.readers import input_files, size_bytes

WORK_FORMAT = 4


@dataclass(frozen=True)
class Shard:
    """Name one of several preparations that are merged."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


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
    shard: Shard | None = None

    def description(self, tokenizer_digest: str | None) -> dict[str, Any]:
        """Return all that decides the result, as JSON; it also serves a later merge."""
        split = self.split
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
            "shards": self.shard.count if self.shard else 1,
            "inputs": [
                {"name": name, "path": os.path.realpath(path), **stamp(path)}
                for name, path in zip(input_names(self.inputs), self.inputs, strict=True)
            ],
        }


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


def input_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name of each input: from the folder on that holds all of them."""
    real = [os.path.realpath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in real])
    return [Path(os.path.relpath(path, root)).as_posix() for path in real]


def shares_files(plan: Preparation) -> bool:
    """Tell whether all shards read all inputs, each its share of the lines."""
    return plan.shard is not None and len(plan.inputs) < plan.shard.count


def dealt_inputs(plan: Preparation) -> list[int]:
    """Return the inputs that a preparation reads: the largest first to the shard with the least."""
    if plan.shard is None or shares_files(plan):
        return list(range(len(plan.inputs)))
    sizes_bytes = [size_bytes(path) for path in plan.inputs]
    loads = [0] * plan.shard.count
    mine = []
    for index in sorted(range(len(sizes_bytes)), key=lambda i: (-sizes_bytes[i], i)):
        target = loads.index(min(loads))
        # Empty files count too, so that none of the shards gets them all.
        loads[target] += sizes_bytes[index] + 1
        if target == plan.shard.index:
            mine.append(index)
    return sorted(mine)
