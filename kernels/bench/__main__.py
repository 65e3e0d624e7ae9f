"""Time the LM + mode loss beside its peers, and measure memory and error.

Every implementation computes the language-model loss and the mode loss of the same batch, forward
and backward; a peer gets a separate mode head. Times come from alternating calls in one process,
memory from a process for each implementation, errors from a truth in fp64.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence

from megatron_mode.command_line import CommandParser, Formatter, run_program, suggest, whole
from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.implementations import BY_NAME, IMPLEMENTATIONS, Implementation

DEFAULT_SHAPES = {"cpu": (2048, 512, 32768), "cuda": (8192, 4096, 128256)}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
LEAST_HEAD_ROUNDS = 6


def main(arguments: Sequence[str]) -> int:
    """Print a table, or an object of the JSON list, for each dtype; return the exit status."""
    args = parser().parse(arguments)
    if 0 < args.head_rounds < LEAST_HEAD_ROUNDS:
        raise ConfigError(f"--head-rounds is {args.head_rounds}, and fewer than "
                          f"{LEAST_HEAD_ROUNDS} pairs give no 95 % interval: use 0 or at least "
                          f"{LEAST_HEAD_ROUNDS}")  # fmt: skip
    if args.shape and args.shape[2] == 1:
        raise ConfigError("--shape has V = 1, where every LM loss is 0: use at least 2")
    chosen = _chosen(args.only)
    # Peers warn about what they fall back to, torch about optional packages.
    warnings.simplefilter("ignore")
    import torch

    from megatron_mode.kernels.bench.compare import compare, table
    from megatron_mode.kernels.bench.problem import Case

    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise ConfigError("--device is cuda, of which torch sees none: use cpu here")
    device = args.device or ("cuda" if has_cuda else "cpu")
    runnable = [one for one in chosen if device == "cuda" or not one.not_on_cpu]
    for one in chosen:
        if one not in runnable:
            print(f"{one.name} left out: {one.not_on_cpu}", file=sys.stderr)
    if not runnable:
        raise ConfigError(f"--only is {args.only}: none of these runs on the device {device}")
    torch.set_num_threads(args.threads)
    shape, objects = tuple(args.shape or DEFAULT_SHAPES[device]), []
    for dtype in dict.fromkeys(args.dtype or DEFAULT_DTYPES[device]):
        case = Case(shape, dtype, device, args.threads)
        rows = compare(case, runnable, args.rounds, args.head_rounds)
        if not args.json:
            print(table(case, rows), end="\n\n", flush=True)
        objects.append(case._asdict() | {"rows": [row.as_json() for row in rows]})
    if args.json:
        print(json.dumps(objects))
    return 0 if all(entry["rows"] for entry in objects) else 1


def parser() -> CommandParser:
    """Return the parser; imports nothing heavy."""
    made = CommandParser(
        prog="python -m megatron_mode.kernels.bench",
        description=__doc__,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--device", choices=DEFAULT_SHAPES, help="cuda where torch sees one, else cpu")
    text = "a table each; both on a CPU, bf16 on cuda"
    add("--dtype", nargs="+", choices=DEFAULT_DTYPES["cpu"], help=text)
    text = "tokens, hidden size, vocabulary; 2048 512 32768 on a CPU, 8192 4096 128256 on cuda"
    add("--shape", nargs=3, type=whole(1, 2**31 - 1), metavar=("N", "D", "V"), help=text)
    add("--threads", type=whole(1, 1024), default=2, help="of torch on the CPU")
    text = f"implementations to run, all unless given: {', '.join(BY_NAME)}"
    add("--only", metavar="NAME,...", help=text)
    text = "timed calls of each implementation, of which slow ones make fewer"
    add("--rounds", type=whole(1), default=5, metavar="K", help=text)
    text = "pairs of calls of megatron_mode chunked with and without the mode head, for the time " \
        "that it adds; 0 for none"  # fmt: skip
    add("--head-rounds", type=whole(0), default=15, metavar="M", help=text)
    add("--json", action="store_true", help="print a list of cases, for programs")
    return made


def _chosen(only: str | None) -> list[Implementation]:
    """Return the implementations by name, in the order of the table."""
    names = list(BY_NAME) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in BY_NAME:
            hint = suggest(name, list(BY_NAME)) or f"; use {', '.join(BY_NAME)}"
            raise ConfigError(f"--only holds {name!r}, which is no implementation{hint}")
    return [implementation for implementation in IMPLEMENTATIONS if implementation.name in names]


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
