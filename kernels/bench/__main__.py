"""Run `python -m megatron_mode.kernels.bench`: time, memory and error of the loss beside its peers.

Every implementation computes the language-model loss and the mode loss of the same batch, forward
and backward; a peer gets a separate mode head. Times come from alternating calls in one process,
memory from a process for each implementation, errors from a truth in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings

from megatron_mode.errors import ConfigError
from megatron_mode.kernels.bench.case import Case, Effort, Shape
from megatron_mode.kernels.bench.command_line import DEFAULT_DTYPES, DEFAULT_SHAPES, parse
from megatron_mode.kernels.bench.failure import reason
from megatron_mode.kernels.bench.implementations import BY_NAME

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

    from megatron_mode.kernels.bench.compare import compare
    from megatron_mode.kernels.bench.table import table

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


if __name__ == "__main__":
    sys.exit(main())
