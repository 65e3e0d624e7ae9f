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
from megatron_mode.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mode.config import Config
    from megatron_mode.mix.audit.order_document import OrderDocument
    from megatron_mode.mix.corpus import Corpus

MOST_ROWS = 1_000_000


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
    config: Config | None
    corpus: Corpus | None
    steps_done: int


def run(args: argparse.Namespace) -> int:
    """Answer the question; raises ConfigError, DataError or CheckpointError."""
    opened = open_order(args.config, args.overrides)
    if args.rows is not None:
        begin, end = parse_rows(args.rows, opened.document.order.total_rows)
        answer, text = rows_answer(opened.document, begin, end)
    elif args.step is not None:
        begin, end = step_rows(opened.document, args.step)
        answer, text = rows_answer(opened.document, begin, end)
    elif args.document is not None:
        answer, text = document_answer(opened, args.document)
    elif args.verify is not None:
        answer, text = verify_answer(opened, args.verify, show_progress=not args.json)
    elif args.export is not None:
        answer, text = export_answer(opened, args.export)
    elif args.plot is not None:
        answer, text = plot_answer(opened, args.plot)
    else:
        from megatron_mode.mix.audit.summary import plan, table

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
        return Opened(read_document(path), None, None, 0)
    steps_done = 0
    if path.is_dir():
        steps_done = newest_step(path)
        path = path / "config.yaml"
    config = load_config(path, overrides)
    corpus = open_corpus(config)
    config = resolve_vocabulary(config, corpus)
    order = build_order(config, corpus)
    return Opened(describe(config, corpus, order), config, corpus, steps_done)


def newest_step(run: Path) -> int:
    """Return the steps that the newest finished checkpoint of a run folder has taken, 0 for none.

    The folder's name says it, so that nothing heavy is imported.
    """
    names = (path.parent.name for path in run.glob("checkpoints/step-*/manifest.json"))
    steps = (re.fullmatch(r"step-(\d{8,})", name) for name in names)
    return max((int(step[1]) for step in steps if step), default=0)


def parse_rows(text: str, total_rows: int) -> tuple[int, int]:
    """Read A:B; raise ConfigError outside of the run or for more rows than can be printed."""
    match = re.fullmatch(r"([0-9]{0,18}):([0-9]{0,18})", text.replace("_", ""))
    begin = int(match[1] or 0) if match else 1
    end = int(match[2] or total_rows) if match else 0
    if not 0 <= begin <= end <= total_rows:
        raise ConfigError(
            f"--rows is {text}: accepted is A:B with 0 <= A <= B <= {total_rows}, the rows of the "
            "run; correct it"
        )
    if end - begin > MOST_ROWS:
        raise ConfigError(
            f"--rows asks for {end - begin:,} rows: accepted is up to {MOST_ROWS:,} at a time; ask "
            "for fewer"
        )
    return begin, end


def step_rows(document: OrderDocument, step: int) -> tuple[int, int]:
    """Return the rows of a step; raise ConfigError beyond the run."""
    if step >= document.steps:
        raise ConfigError(
            f"--step is {step}: accepted is 0 to {document.steps - 1}, the steps of the run"
        )
    return step * document.global_rows, (step + 1) * document.global_rows


def rows_answer(document: OrderDocument, begin: int, end: int) -> tuple[dict[str, Any], str]:
    """List rows."""
    order = document.order
    rows = order.rows(begin, end)
    names = order.source_names
    columns = (rows.row, rows.mode, rows.source, rows.source_row, rows.epoch)
    found = [
        {
            "row": row,
            "step": row // document.global_rows,
            "mode": mode,
            "source": names[source],
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


def document_answer(opened: Opened, document: str) -> tuple[dict[str, Any], str]:
    """List the exposures of a document; those before the newest checkpoint are past."""
    from megatron_mode.mix.audit.documents import exposures

    if opened.config is None or opened.corpus is None:
        raise ConfigError(
            "--document needs the data to find an id in, and an exported order names none; give "
            "the run file or the run folder"
        )
    order = opened.document.order
    found = [
        {**e._asdict(), "shown": e.is_shown, "past": e.step < opened.steps_done}
        for e in exposures(opened.config, opened.corpus, order, document)
    ]
    shown = [e for e in found if e["shown"]]
    steps = sorted({e["step"] for e in shown})
    answer = {
        "document": document,
        "exposures": found,
        "steps": steps,
        "steps_done": opened.steps_done,
    }
    lines = [
        f"{document}: {len(shown)} rows in {len(steps)} steps, "
        f"{sum(e['past'] for e in shown)} of them past (step {opened.steps_done})",
        f"{'step':>10} {'row':>14} {'source row':>12} via",
    ]
    lines += [f"{e['step']:>10,} {e['row']:>14,} {e['source_row']:>12,} {e['via']}" for e in found]
    return answer, "\n".join(lines)


def verify_answer(opened: Opened, run: Path, *, show_progress: bool) -> tuple[dict[str, Any], str]:
    """Replay and hash; the first thing that differs is raised."""
    from tqdm import tqdm

    from megatron_mode.quiet import import_quietly

    verify: Any = import_quietly("megatron_mode.checkpoint.replay", 0)
    document = opened.document
    manifests = verify.find_manifests(run)
    for manifest in manifests:
        verify.check_settings(manifest, document.settings)
    hidden = None if show_progress else True
    steps = manifests[-1].step
    with tqdm(total=steps, desc="replay", unit="step", leave=False, disable=hidden) as bar:
        digest = verify.replay(document.order, document.global_rows, manifests, bar.update)
    size_bytes = 0
    if opened.corpus is not None:
        with tqdm(desc="hash", unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
            size_bytes = verify.check_source_files(
                opened.corpus.read_sources,
                document.packed_whole,
                document.order.seq_len,
                bar.update,
            )
    answer = {
        "verified": str(run),
        "checkpoints": [manifest.step for manifest in manifests],
        "order_digest": digest,
        "skips": manifests[-1].skips,
        "hashed_bytes": size_bytes,
    }
    text = (
        f"{run}: {len(manifests)} checkpoints up to step {steps} agree with the order "
        f"(digest {digest[:12]}); {size_bytes:,} bytes of sources are as they were prepared"
    )
    if manifests[-1].skips:
        text += f"\nupdates left out: steps {', '.join(map(str, manifests[-1].skips))}"
    return answer, text


def export_answer(opened: Opened, path: Path) -> tuple[dict[str, Any], str]:
    """Write the portable document."""
    from megatron_mode.mix.audit.order_document import export

    if opened.config is None:
        raise ConfigError("--export of an exported order is a copy; copy the file")
    if path.suffix != ".json":
        raise ConfigError(f"--export is {path}: accepted is a name in .json, by which it is read")
    tree = export(opened.document, opened.config.mix)
    write(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return {"export": str(path), "order_digest": tree["order_digest"]}, str(path)


def plot_answer(opened: Opened, path: Path) -> tuple[dict[str, Any], str]:
    """Draw the plan."""
    from megatron_mode.report.order_page import order_page

    write(path, order_page(opened.document.order, opened.document.global_rows))
    return {"plot": str(path)}, str(path)


def write(path: Path, text: str) -> None:
    """Write a file whole; ConfigError where the folder is missing or not writable."""
    from megatron_mode.atomic import write_whole

    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be written ({error.strerror}); name a file in a folder that "
            "exists and is writable"
        ) from None
