"""Time the LM + mode loss beside its peers, and measure memory and error.

Every implementation computes the language-model loss and the mode loss of the same batch, forward
and backward; a peer gets a separate mode head. Times come from alternating calls in one process,
memory from a process for each implementation, errors from a truth in fp64.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import warnings
from typing import NoReturn

from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.case import DTYPES, Case, Effort, Shape, reason
from megatron_mode.kernels.bench.implementations import BY_NAME, IMPLEMENTATIONS, Implementation
from megatron_mode.kernels.bench.timing import LEAST_VALUES

DEFAULT_SHAPES = {"cpu": Shape(2048, 512, 32768), "cuda": Shape(8192, 4096, 128256)}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main() -> int:
    """Run the command line and return the exit status; a user's mistake is one sentence."""
    try:
        args = parse()
        # Peers warn about what they fall back to, torch about optional packages.
        warnings.simplefilter("ignore")
        status = _measure_memory(args) if args.memory_of else _compare(args)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it a place that accepts the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _compare(args: argparse.Namespace) -> int:
    """Print a table, or an object of the JSON list, for each dtype."""
    device = _device(args.device)
    runnable = [one for one in args.only if device == "cuda" or not one.not_on_cpu]
    for one in args.only:
        if one not in runnable:
            print(f"{one.name} left out: {one.not_on_cpu}", file=sys.stderr)
    if not runnable:
        names = ", ".join(one.name for one in args.only)
        raise ConfigError(f"only is {names}: none of these runs on the device {device}")

    from megatron_mode.kernels.bench.compare import compare, table

    effort = Effort(args.rounds, args.head_rounds, args.limit_seconds)
    objects = []
    for dtype in dict.fromkeys(args.dtype or DEFAULT_DTYPES[device]):
        case = _case(args, device, dtype)
        rows = compare(case, runnable, effort)
        if not args.json:
            print(table(case, rows), end="\n\n", flush=True)
        values = {"shape": list(case.shape), "dtype": dtype, "device": device}
        objects.append({**values, "threads": args.threads, "rows": [row.as_json() for row in rows]})
    if args.json:
        print(json.dumps(objects))
    return 0 if all(entry["rows"] for entry in objects) else FAILED


def _measure_memory(args: argparse.Namespace) -> int:
    """Print the extra bytes of one call in this process, for the process that asks for it."""
    try:
        from megatron_mode.kernels.bench.memory import extra_bytes

        case = _case(args, args.device, args.dtype[0])
        print(extra_bytes(BY_NAME[args.memory_of], case, short_warm_up=args.short_warm_up))
    except Exception as error:  # whatever a peer raises
        print(reason(error), file=sys.stderr)
        return FAILED
    return 0


def _case(args: argparse.Namespace, device: str, dtype: str) -> Case:
    import torch

    torch.set_num_threads(args.threads)
    shape = Shape(*args.shape) if args.shape else DEFAULT_SHAPES[device]
    return Case(shape, dtype, device, args.threads)


def _device(name: str | None) -> str:
    """Return the device to run on; raises ConfigError for one that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, of which torch sees none: accepted here is cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def parse() -> argparse.Namespace:
    """Return the arguments of this process; raises ConfigError in one sentence."""
    parser = _Parser(
        prog="python -m megatron_mode.kernels.bench",
        description=__doc__,
        epilog="implementations:\n" + "\n".join(f"  {one.name}" for one in IMPLEMENTATIONS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_case(parser)
    _add_effort(parser)
    parser.add_argument("--json", action="store_true", help="print a list of cases, for programs")
    parser.add_argument("--memory-of", choices=BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--short-warm-up", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shape and Shape(*args.shape).vocab_size == 1:
        raise ConfigError("shape has V = 1, where every LM loss is 0: accepted is at least 2")
    args.only = _chosen(args.only)
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and leaving."""
        raise ConfigError(f"{message}; `{self.prog} --help` shows what is accepted")


def _add_case(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=DEFAULT_SHAPES, help="default: cuda where torch sees one, else cpu")
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        help="fp32, bf16: a table each (default: both on a CPU, bf16 on cuda)",
    )
    add(
        "--shape",
        nargs=3,
        type=_positive,
        metavar=("N", "D", "V"),
        help="tokens, hidden size, vocabulary (default: 2048 512 32768 on a CPU, "
        "8192 4096 128256 on cuda)",
    )
    add("--threads", type=_threads, default=2, help="of torch on the CPU (default: %(default)s)")
    add("--only", metavar="NAME,...", help="implementations to run, named below (default: all)")


def _add_effort(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--rounds",
        type=_positive,
        default=5,
        metavar="K",
        help="timed calls of each implementation (default: %(default)s)",
    )
    add(
        "--head-rounds",
        type=_head_rounds,
        default=15,
        metavar="M",
        help="pairs of calls of megatron_mode chunked with and without the mode head, for the "
        "time that it adds; 0 for none (default: %(default)s)",
    )
    add(
        "--limit-seconds",
        type=_seconds,
        default=120.0,
        metavar="S",
        help="time for the timed calls of one implementation, which makes one in any case: bf16 "
        "is slow on a CPU without instructions for it (default: %(default)s)",
    )


def _chosen(only: str | None) -> list[Implementation]:
    """Return the implementations by name, in the order of the table."""
    if only is None:
        return list(IMPLEMENTATIONS)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(BY_NAME)}"
            raise ConfigError(f"only holds {name!r}, which is no implementation: {hint}")
    return [implementation for implementation in IMPLEMENTATIONS if implementation.name in names]


def _positive(text: str) -> int:
    return _whole_number(text, least=1)


def _threads(text: str) -> int:
    return _whole_number(text, least=1, most=1024)


def _head_rounds(text: str) -> int:
    value = _whole_number(text, least=0)
    if 0 < value < LEAST_VALUES:
        raise argparse.ArgumentTypeError(
            f"{value} pairs give no 95 % interval: accepted is 0 or at least {LEAST_VALUES}"
        )
    return value


def _whole_number(text: str, least: int, most: int = 2**31 - 1) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"{text!r}: accepted is a whole number from {least} to {most}"
        )
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a number of seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
