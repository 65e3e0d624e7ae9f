"""Parse the command line of the benchmark; imports no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.case import DTYPES, Shape
from megatron_mode.kernels.bench.implementations import BY_NAME, IMPLEMENTATIONS, Implementation
from megatron_mode.kernels.bench.interval import LEAST_VALUES

DEFAULT_SHAPES = {"cpu": Shape(2048, 512, 32768), "cuda": Shape(8192, 4096, 128256)}
DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
DESCRIPTION = """\
Time the LM + mode loss beside its peers, and measure memory and error.

Every implementation computes the language-model loss and the mode loss of the same batch, forward
and backward; a peer gets a separate mode head. Times come from alternating calls in one process,
memory from a process for each implementation, errors from a truth in fp64."""


def parse() -> argparse.Namespace:
    """Return the arguments of this process; raises ConfigError in one sentence."""
    parser = _Parser(
        prog="python -m megatron_mode.kernels.bench",
        description=DESCRIPTION,
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
