"""Write the HTML page of one or several runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_mode.errors import ConfigError, refusal

REPORT_FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="run folder; several are overlaid"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help=f"page to write (default: RUN/{REPORT_FILE}; needed with several runs)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the page's path and head figures as JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and say where; raises ConfigError for what cannot be read or written."""
    from megatron_mode.atomic import write_whole
    from megatron_mode.report.page import build_page, head_figures
    from megatron_mode.report.run_folder import read_runs

    if args.out is None and len(args.runs) > 1:
        raise ConfigError(
            f"--out is not given for {len(args.runs)} runs; name the page to write, as in "
            f"--out {REPORT_FILE}."
        )
    runs = read_runs(args.runs)
    out = args.out or args.runs[0] / REPORT_FILE
    try:
        write_whole(out, build_page(runs))
    except OSError as error:
        remedy = "write the page again, or name another file"
        raise ConfigError(refusal(out, error, remedy, option="--out")) from error
    if args.json:
        figures = [
            {"run": run.name, **{figure.label: figure.value for figure in head_figures(run)}}
            for run in runs
        ]
        notes = {run.name: run.notes for run in runs}
        print(json.dumps({"report": str(out), "runs": figures, "notes": notes}))
    else:
        print(out)
    return 0
