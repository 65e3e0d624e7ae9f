"""Say which rows a run takes, before, during and after it: plan, query, verify and export.

CONFIG is a run file, a run folder, or what `--export` wrote. Without a question it prints what the
run takes from each source. A document is named SOURCE/ID.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_mode.command_line import whole
from megatron_mode.errors import ConfigError, refusal

if TYPE_CHECKING:
    from megatron_mode.config import Config
    from megatron_mode.mix.audit.order_document import OrderDocument
    from megatron_mode.mix.corpus import Corpus

MOST_ROWS = 1_000_000
Answer = tuple[dict[str, Any], str]  # as JSON, as text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add = parser.add_argument
    add("config", metavar="CONFIG", type=Path, help="run file, run folder or exported order")
    add("overrides", metavar="key.path=value", nargs="*", help="overrides of a run file")
    question = parser.add_mutually_exclusive_group()
    ask = question.add_argument
    ask("--rows", metavar="A:B", help="rows A to B - 1 of the run: mode, source, source row, epoch")
    ask("--step", type=whole(0), metavar="S", help="the rows of step S (from 0)")
    ask("--document", metavar="SOURCE/ID", help="every step at which a document is seen")
    ask("--verify", type=Path, metavar="RUN", help="replay against a run's checkpoints and files")
    ask("--export", type=Path, metavar="FILE", help="write the order as a portable document")
    ask("--plot", type=Path, metavar="FILE.html", help="draw shares, tokens, epochs by source")
    add("--json", action="store_true", help="print one JSON object")


class Opened(NamedTuple):
    """Hold an order with the config and data behind it; an exported order has neither."""

    document: OrderDocument
    config: Config | None = None
    corpus: Corpus | None = None
    steps_done: int = 0


def run(args: argparse.Namespace) -> int:
    """Answer the question; raises ConfigError, DataError or CheckpointError."""
    opened = open_order(args.config, args.overrides)
    if args.rows is not None or args.step is not None:
        answer, text = rows_answer(opened.document, *asked_rows(opened.document, args))
    elif args.document is not None:
        answer, text = document_answer(opened, args.document)
    elif args.verify is not None:
        answer, text = verify_answer(opened, args.verify, show_progress=not args.json)
    elif args.export is not None:
        answer, text = export_answer(opened, args.export)
    elif args.plot is not None:
        from megatron_mode.report.order_page import order_page

        write(args.plot, order_page(opened.document.order, opened.document.global_rows))
        answer, text = {"plot": str(args.plot)}, str(args.plot)
    else:
        from megatron_mode.mix.audit.forecast import plan, table

        answer = plan(opened.document)
        text = table(answer)
    print(json.dumps(answer, ensure_ascii=False) if args.json else text)
    return 0


def open_order(path: Path, overrides: list[str]) -> Opened:
    """Build the order of a run file, a run folder or an exported document."""
    from megatron_mode.config import load_config
    from megatron_mode.mix.audit.order_document import describe, read_document
    from megatron_mode.mix.corpus import build_order, open_corpus, resolve_vocabulary

    if path.suffix == ".json":
        if overrides:
            raise ConfigError(
                f"{overrides[0]} overrides an exported order, which is fixed; name the run file"
            )
        return Opened(read_document(path))
    # The names of finished checkpoints say how far a run folder is; nothing heavy is imported.
    names = (manifest.parent.name for manifest in path.glob("checkpoints/step-*/manifest.json"))
    steps = (re.fullmatch(r"step-(\d{8,})", name) for name in names)
    steps_done = max((int(step[1]) for step in steps if step), default=0)
    config = load_config(path / "config.yaml" if path.is_dir() else path, overrides)
    corpus = open_corpus(config)
    config = resolve_vocabulary(config, corpus)
    order = build_order(config, corpus)
    return Opened(describe(config, corpus, order), config, corpus, steps_done)


def asked_rows(document: OrderDocument, args: argparse.Namespace) -> tuple[int, int]:
    """Return begin and end of --rows or --step; ConfigError outside of the run or for too many."""
    if args.step is not None:
        if args.step >= document.steps:
            raise ConfigError(
                f"--step is {args.step}; accepted: 0 to {document.steps - 1}, the steps of the "
                "run; name one of them"
            )
        return args.step * document.global_rows, (args.step + 1) * document.global_rows
    total_rows = document.order.total_rows
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", args.rows.replace("_", ""))
    begin = int(match[1] or 0) if match else 1
    end = int(match[2] or total_rows) if match else 0
    if not 0 <= begin <= end <= total_rows:
        raise ConfigError(
            f"--rows is {args.rows}; accepted: A:B with 0 <= A <= B <= {total_rows}, the rows of "
            "the run; correct it"
        )
    if end - begin > MOST_ROWS:
        raise ConfigError(
            f"--rows asks for {end - begin:,} rows; accepted: up to {MOST_ROWS:,} at a time; ask "
            "for fewer"
        )
    return begin, end


def rows_answer(document: OrderDocument, begin: int, end: int) -> Answer:
    """List rows."""
    order = document.order
    rows = order.rows(begin, end)
    columns = (rows.row, rows.mode, rows.source, rows.source_row, rows.epoch)
    found = [
        {
            "row": row,
            "step": row // document.global_rows,
            "mode": mode,
            "source": order.source_names[source],
            "source_row": source_row,
            "epoch": epoch,
            "edit": source >= len(order.configs),
        }
        for row, mode, source, source_row, epoch in zip(*(c.tolist() for c in columns), strict=True)
    ]
    lines = [f"{'row':>14} {'step':>10} mode {'source':<28} {'source row':>12} epoch"]
    lines += [
        f"{r['row']:>14,} {r['step']:>10,} {r['mode']:>4} {r['source'][:28]:<28} "
        f"{r['source_row']:>12,} {r['epoch']:>5}{' edit' if r['edit'] else ''}"
        for r in found
    ]
    return {"rows": found}, "\n".join(lines)


def document_answer(opened: Opened, document: str) -> Answer:
    """List the exposures of a document; those before the newest checkpoint are past."""
    from megatron_mode.mix.audit.documents import exposures

    if opened.config is None or opened.corpus is None:
        raise ConfigError(
            "--document needs the data to find an id in, and an exported order names none; give "
            "the run file or the run folder"
        )
    found = [
        {**e._asdict(), "shown": e.is_shown, "past": e.step < opened.steps_done}
        for e in exposures(opened.config, opened.corpus, opened.document.order, document)
    ]
    shown = [e for e in found if e["shown"]]
    steps, done = sorted({e["step"] for e in shown}), opened.steps_done
    answer = {"document": document, "exposures": found, "steps": steps, "steps_done": done}
    lines = [
        f"{document}: {len(shown)} rows in {len(steps)} steps, "
        f"{sum(e['past'] for e in shown)} of them past (step {done})",
        f"{'step':>10} {'row':>14} {'source row':>12} via",
    ]
    lines += [f"{e['step']:>10,} {e['row']:>14,} {e['source_row']:>12,} {e['via']}" for e in found]
    return answer, "\n".join(lines)


def verify_answer(opened: Opened, run: Path, *, show_progress: bool) -> Answer:
    """Replay and hash; the first thing that differs is raised."""
    from megatron_mode.quiet import import_quietly

    verify: Any = import_quietly("megatron_mode.checkpoint.replay", 0)
    sources = opened.corpus.read_sources if opened.corpus else ()
    answer = verify.verify_run(run, opened.document, sources, show_progress=show_progress)
    steps = answer["checkpoints"]
    text = (
        f"{run}: {len(steps)} checkpoints up to step {steps[-1]} agree with the order (digest "
        f"{answer['order_digest'][:12]}); {answer['hashed_bytes']:,} bytes of sources are as they "
        "were prepared"
    )
    if answer["skips"]:
        text += f"\nupdates left out: steps {', '.join(map(str, answer['skips']))}"
    return answer, text


def export_answer(opened: Opened, path: Path) -> Answer:
    """Write the portable document."""
    from megatron_mode.mix.audit.order_document import export

    if opened.config is None:
        raise ConfigError("--export of an exported order is a copy; copy the file")
    if path.suffix != ".json":
        raise ConfigError(f"--export is {path}; accepted: a name in .json, by which it is read")
    tree = export(opened.document, opened.config.mix)
    write(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return {"export": str(path), "order_digest": tree["order_digest"]}, str(path)


def write(path: Path, text: str) -> None:
    """Write a file at once; ConfigError where the folder is missing or not writable."""
    from megatron_mode.atomic import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        remedy = "write it again, or name another file"
        raise ConfigError(refusal(path, error, remedy)) from None
