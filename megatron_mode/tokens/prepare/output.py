"""Stop a preparation in an orderly way, and print what came of it."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mode.errors import ExitStatus

COLUMNS = (
    ("source", 28), ("mode", 5), ("rendering", 10), ("documents", 13), ("tokens", 16),
    ("text bytes", 17), ("tokens/byte", 12), ("copies", 9), ("held out", 9),
)  # fmt: skip
ROLES = ("system", "user", "assistant", "tool")


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Turn SIGTERM into SystemExit and a refusal of the disk into DataError.

    After Ctrl-C or SIGTERM one line says that the finished part stays; exit status 130 or 143.
    """
    from megatron_mode.tokens.prepare.staging import disk_error

    try:
        with terminated_by_exit():
            yield
    except (KeyboardInterrupt, SystemExit) as stop:
        print(
            f"stopped: what is finished stays beside {out}; the same command continues",
            file=sys.stderr,
        )
        raise SystemExit(
            ExitStatus.INTERRUPTED if isinstance(stop, KeyboardInterrupt) else stop.code
        ) from None
    except OSError as error:
        raise disk_error(error, out) from None


@contextmanager
def terminated_by_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that locks and workers are given up on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def print_summary(summary: dict[str, Any], seconds: float, *, as_json: bool) -> None:
    """Print a summary as JSON or for a terminal, warnings to stderr."""
    summary["seconds"] = round(seconds, 2)
    for warning in summary["warnings"] + summary["first_bad_lines"]:
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    elif "shard" in summary:
        print(shard_line(summary))
    else:
        print(table(summary))


def shard_line(summary: dict[str, Any]) -> str:
    """Say what became of a shard and what comes next."""
    return (
        f"shard {summary['shard']} of {summary['out']}: {summary['tokens']:,} tokens in "
        f"{summary['units']} units, {summary['bad_lines']} bad lines, {summary['seconds']} s; when "
        f"all shards are there, run `megatron-mode merge --out {summary['out']}`"
    )


def table(summary: dict[str, Any]) -> str:
    """Lay the summary out for a terminal."""
    lines = [
        f"{summary['out']}: vocabulary {summary['vocab_size']} "
        f"(padded {summary['padded_vocab_size']}), {summary['bad_lines']} bad lines, "
        f"{summary['seconds']} s",
        row([name for name, _ in COLUMNS]),
    ]
    lines += [row(source_cells(source)) for source in summary["sources"]]
    lines += [mode_line(name, total, summary) for name, total in summary["modes"].items()]
    lines += [
        f"bad lines in {name}: {count}" for name, count in summary["bad_lines_by_input"].items()
    ]
    return "\n".join(lines)


def source_cells(source: dict[str, Any]) -> list[Any]:
    """Return the cells of a source's row."""
    numbers = [f"{source[key]:,}" for key in ("documents", "tokens", "text_bytes")]
    return [
        source["name"],
        source["mode"],
        source["rendering"],
        *numbers,
        f"{source['tokens_per_byte']:.3f}",
        f"{source['duplicates_dropped']:,}",
        f"{source['held_out_share']:.2%}",
    ]


def row(cells: list[Any]) -> str:
    """Align the cells of a row, the first to the left."""
    first, *others = zip(cells, COLUMNS, strict=True)
    text = f"{first[0]:<{first[1][1]}}"
    return text + "".join(f"{cell:>{width}}" for cell, (_, width) in others)


def mode_line(name: str, total: dict[str, Any], summary: dict[str, Any]) -> str:
    """Sum a mode up: documents, tokens, tokens by role and the length of its documents."""
    sources = [s for s in summary["sources"] if f"mode{s['mode']}" == name]
    roles = {role: sum(s["flags"][f"role_{role}"] for s in sources) for role in ROLES}
    spoken = ", ".join(f"{role} {count:,}" for role, count in roles.items() if count)
    return (
        f"Mode {name.removeprefix('mode')}: {total['documents']:,} documents, "
        f"{total['tokens']:,} tokens{f' ({spoken})' if spoken else ''}, "
        f"{total['duplicates_dropped']:,} copies dropped, {total['repeated_ids']:,} ids repeated; "
        f"{lengths_line([s['lengths_log2'] for s in sources])}"
    )


def lengths_line(histograms: list[list[int]]) -> str:
    """Show how many documents have at least 1, 2, 4, ... tokens, in bins from 2**k on."""
    bins = [0] * max(map(len, histograms), default=0)
    for histogram in histograms:
        for index, count in enumerate(histogram):
            bins[index] += count
    shown = [f"{2**index}:{count}" for index, count in enumerate(bins) if count]
    return f"documents by tokens from {' '.join(shown)}"


def progress_bar(label: str, total: int, show: bool, unit: str = "B") -> Any:
    """Return a bar over bytes or tokens; silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        leave=False,
        disable=None if show else True,
    )
