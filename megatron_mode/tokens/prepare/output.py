"""Stop a preparation in an orderly way, and print what came of it."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mode.errors import DataError, ExitStatus, refusal

# Each with the format of its cells; the name of a source goes to the left.
COLUMNS = (
    ("source", "<28"), ("mode", ">5"), ("rendering", ">10"), ("documents", ">13,"),
    ("tokens", ">16,"), ("text_bytes", ">17,"), ("tokens_per_byte", ">12.3f"),
    ("duplicates_dropped", ">9,"), ("held_out_share", ">9.2%"),
)  # fmt: skip
TITLES = {
    "tokens_per_byte": "tokens/byte",
    "duplicates_dropped": "copies",
    "held_out_share": "held out",
}
ROLES = ("system", "user", "assistant", "tool")


@contextmanager
def stoppable(out: Path) -> Iterator[None]:
    """Turn SIGTERM into SystemExit and a refusal of the disk into DataError.

    After Ctrl-C or SIGTERM one line says that the finished part stays; exit status 130 or 143.
    """
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
        remedy = (
            "run the command again, or name another --out; for a while it needs about three times "
            "the tokenised size"
        )
        raise DataError(refusal(out, error, remedy, option="--out")) from None


@contextmanager
def terminated_by_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that locks and workers are given up on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(ExitStatus.TERMINATED)

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
        print(
            f"shard {summary['shard']} of {summary['out']}: {summary['tokens']:,} tokens in "
            f"{summary['units']} units, {summary['bad_lines']} bad lines, {summary['seconds']} s; "
            f"when all shards are there, run `megatron-mode merge --out {summary['out']}`"
        )
    else:
        print(table(summary))


def table(summary: dict[str, Any]) -> str:
    """Lay the summary out for a terminal."""
    sources = summary["sources"]
    titles = [(TITLES.get(key, key.replace("_", " ")), form) for key, form in COLUMNS]
    lines = [
        f"{summary['out']}: vocabulary {summary['vocab_size']} "
        f"(padded {summary['padded_vocab_size']}), {summary['bad_lines']} bad lines, "
        f"{summary['seconds']} s",
        "".join(format(title, form.split(".")[0].rstrip(",")) for title, form in titles),
    ]
    for source in sources:
        cells = {**source, "source": source["name"]}
        lines.append("".join(format(cells[key], form) for key, form in COLUMNS))
    for name, total in summary["modes"].items():
        mode = int(name.removeprefix("mode"))
        lines.append(mode_line(mode, total, [s for s in sources if s["mode"] == mode]))
    lines += [
        f"bad lines in {name}: {count}" for name, count in summary["bad_lines_by_input"].items()
    ]
    return "\n".join(lines)


def mode_line(mode: int, total: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """Sum a mode up: documents, tokens, tokens by role and the length of its documents."""
    roles = {role: sum(s["flags"][f"role_{role}"] for s in sources) for role in ROLES}
    spoken = ", ".join(f"{role} {count:,}" for role, count in roles.items() if count)
    lengths = Counter[int]()
    for source in sources:
        lengths.update({2**k: n for k, n in enumerate(source["lengths_log2"]) if n})
    shown = " ".join(f"{length}:{lengths[length]}" for length in sorted(lengths))
    return (
        f"Mode {mode}: {total['documents']:,} documents, "
        f"{total['tokens']:,} tokens{f' ({spoken})' if spoken else ''}, "
        f"{total['duplicates_dropped']:,} copies dropped, {total['repeated_ids']:,} ids repeated; "
        f"documents by tokens from {shown}"
    )


def progress_bar(label: str, total: int, show: bool, unit: str = "B") -> Any:
    """Return a bar over bytes or tokens; silent where stderr is no terminal."""
    from tqdm import tqdm

    hidden = None if show else True
    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, leave=False, disable=hidden)
