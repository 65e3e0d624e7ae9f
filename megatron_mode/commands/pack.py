"""Pack whole documents into rows of T tokens: writes NAME.rows.T.bin beside each source.

A source listed with `packing: whole` in a mix is read by this table. A document longer than a row
is cut into rows and a rest, and counted; the padding share is reported.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from megatron_mode.command_line import whole
from megatron_mode.errors import DataError

MOST_TOKENS = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add = parser.add_argument
    add("root", metavar="DATA_ROOT", type=Path, help="folder written by `megatron-mode prepare`")
    add(
        "--seq-len",
        type=whole(1, MOST_TOKENS),
        required=True,
        metavar="T",
        help="row length, tokens",
    )
    add("--sources", metavar="A,B", help="sources to pack (default: all that are Mode 2)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Pack and print a table; raises DataError for sources that cannot be read or written."""
    from tqdm import tqdm

    from megatron_mode.tokens.documents import is_safe_name
    from megatron_mode.tokens.source.row_table import write_table
    from megatron_mode.tokens.source.seal import read_info
    from megatron_mode.tokens.source.shards import Source

    names = list(filter(None, re.split(r"[,\s]+", args.sources or "")))
    if not names:
        found = sorted(path.stem for path in args.root.glob("*.idx"))
        names = [name for name in found if read_info(args.root, name).get("mode") == 2]
    for name in names:
        if not is_safe_name(name):
            raise DataError(
                f"--sources names {name!r}; accepted are names of sources in the folder"
            )
    if not names:
        raise DataError(
            f"{args.root} holds no Mode 2 source: name a folder that `megatron-mode prepare` "
            "wrote, or the sources to pack with --sources"
        )
    # All are opened before the first is written: a name that is wrong leaves nothing behind.
    sources = [Source.open(args.root, n, read_info(args.root, n).get("mode", 1)) for n in names]
    packed = {}
    for source in sources:
        name = source.name
        hidden = True if args.json else None
        with tqdm(total=source.documents, desc=name, leave=False, disable=hidden) as bar:
            packed[name] = write_table(source, args.seq_len, bar.update)
    if args.json:
        print(json.dumps({"seq_len": args.seq_len, "sources": packed}))
        return 0
    print(f"{'source':<28} {'rows':>12} {'documents cut':>14} {'padding':>9}")
    for name, entry in packed.items():
        print(
            f"{name[:28]:<28} {entry['rows']:>12,} {entry['split_documents']:>14,} "
            f"{entry['padding_share']:>9.2%}"
        )
    return 0
