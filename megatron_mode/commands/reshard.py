"""Rewrite a run's checkpoint so that a run of another layout can continue from it.

The checkpoint stays; a folder `step-NNNNNNNN-universal` beside it holds every complete parameter
with its optimizer state. The next start at any layout finds it, whatever checkpoint.reshard says.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mode.command_line import whole
from megatron_mode.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_mode.checkpoint.manifest import Manifest

AXES = ("tensor", "pipeline", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run folder, or one of its checkpoint folders")
    add(
        "--to",
        metavar="AXIS=SIZE,...",
        help="layout to check that the model fits into: tensor=2,pipeline=4, also data=; without "
        "it none is checked",
    )
    add(
        "--step", type=whole(1), metavar="N", help="the checkpoint after N steps; unset: the newest"
    )
    add(
        "--threads",
        type=whole(0),
        default=0,
        help="parameters rewritten at a time, each complete in memory; 0: one a core",
    )
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check the input and rewrite; raises ConfigError or CheckpointError."""
    wanted = parse_layout(args.to) if args.to is not None else {}
    from megatron_mode.quiet import import_quietly

    import_quietly("megatron_mode.checkpoint.reshard.universal", threads=1)
    from megatron_mode.checkpoint.lock import PATIENCE_SECONDS, held
    from megatron_mode.checkpoint.manifest import read_manifest

    source = find_checkpoint(args.run, args.step)
    manifest = read_manifest(source)
    check_fits(manifest, wanted, source)
    begin = time.perf_counter()
    holder = f"megatron-mode reshard, process {os.getpid()}"
    threads = args.threads or len(os.sched_getaffinity(0))
    with held(source.parent, holder, PATIENCE_SECONDS):
        answer = rewrite(source, manifest, threads, show_progress=not args.json)
    answer |= {"to": wanted or None, "seconds": round(time.perf_counter() - begin, 3)}
    print(json.dumps(answer) if args.json else text_of(answer))
    return 0


def parse_layout(text: str) -> dict[str, int]:
    """Read `tensor=2,pipeline=4`; raises ConfigError naming what is accepted."""
    sizes: dict[str, int] = {}
    for word in text.split(","):
        axis, _, size = word.strip().partition("=")
        if axis not in AXES or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"--to is {text!r}: name {', '.join(AXES)}, each with a size of 1 or more, as in "
                "tensor=2,pipeline=4"
            )
        if axis in sizes:
            raise ConfigError(f"--to is {text!r}: {axis} is there twice; name it once")
        sizes[axis] = int(size)
    return sizes


def find_checkpoint(path: Path, step: int | None) -> Path:
    """Return the checkpoint folder that a path and --step name."""
    from megatron_mode.checkpoint.folders import CHECKPOINTS_NAME, find_step
    from megatron_mode.checkpoint.load import resolve_folder

    if step is None:
        return resolve_folder(path)
    inner = path / CHECKPOINTS_NAME
    return find_step(inner if inner.is_dir() else path, step, f"--step is {step}")


def check_fits(manifest: Manifest, wanted: dict[str, int], source: Path) -> None:
    """Raise ConfigError where the layout asked for cannot hold the model of a checkpoint."""
    from megatron_mode.checkpoint.manifest import saved_config
    from megatron_mode.config import check_world_size
    from megatron_mode.config.rules import find_broken_rules

    config = saved_config(manifest, source)
    sizes = {**manifest.layout, **wanted}
    parallel: dict[str, Any] = {axis: sizes[axis] for axis in ("tensor", "pipeline")}
    # What needs more of a layout than to hold the model may be changed with it.
    parallel |= {"schedule": "1f1b", "sequence_parallel": False}
    changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    for broken in find_broken_rules(changed, lambda key: False):
        raise ConfigError(f"--to cannot hold the model of {source}: {broken}")
    if "data" in wanted:
        check_world_size(changed, sizes["tensor"] * sizes["pipeline"] * sizes["data"])


def rewrite(
    source: Path, manifest: Manifest, threads: int, *, show_progress: bool
) -> dict[str, Any]:
    """Make the universal folder, or find that it is there; return what to print."""
    from megatron_mode.checkpoint.files import differences
    from megatron_mode.checkpoint.folders import universal_of
    from megatron_mode.checkpoint.load import join_alone
    from megatron_mode.checkpoint.manifest import check_files
    from megatron_mode.checkpoint.reshard.universal import make_universal, universal_manifest

    folder, found = universal_of(source), universal_manifest(source)
    reused = folder.exists()
    if reused:
        wrong = ["it was not made from this checkpoint"]
        if found is not None:
            damaged = differences(folder, found.files, found.files)
            wrong = [f"{name} {what}" for name, what in damaged.items()]
        if wrong:
            raise CheckpointError(
                f"{folder} is there already and is not intact ({wrong[0]}): delete it to make it "
                "again"
            )
    if found is None:
        check_files(source, manifest, manifest.files)
        join_alone()
        found = make_universal(source, manifest, threads, show_progress=show_progress)
    return {
        "folder": str(folder),
        "step": manifest.step,
        "from": manifest.layout,
        "parameters": len(found.parameters),
        "bytes": sum(record.bytes for record in found.files.values()),
        "reused": reused,
    }


def text_of(answer: dict[str, Any]) -> str:
    """Say what was made, and how to continue from it."""
    made = "is there already" if answer["reused"] else f"written in {answer['seconds']:.1f} s"
    start = " ".join(
        f"parallel.{axis}={size}" for axis, size in (answer["to"] or {}).items() if axis != "data"
    )
    return (
        f"{answer['folder']}: {answer['parameters']} parameters with their optimizer state after "
        f"step {answer['step']}, {answer['bytes']:,} bytes, {made}\n"
        f"start the run again with {start or 'another layout'}; it continues from there"
    )
