"""Train: `megatron-mode train --config configs/run/X.yaml [key.path=value ...]`.

`deepspeed launch/pretrain.py`, `torchrun`, `srun python` and plain `python` start the same. A run
resumes from the newest checkpoint of its folder. SIGTERM, SIGUSR1, SIGHUP or a near time limit stop
it after a step: it saves and exits with status 75, so start it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_mode.command_line import CommandParser, exit_status
from megatron_mode.errors import ExitStatus
from megatron_mode.process.failures import (
    note_failure,
    outlast_peers,
    peers_status,
    wait_to_speak,
)
from megatron_mode.process.launch import identify, job_end_seconds, prepare_environment
from megatron_mode.process.stopping import Reason, StopRequest
from megatron_mode.quiet import quiet_libraries
from megatron_mode.streams import outlast_readers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training; the launchers may add --local_rank."""
    parser.add_argument("--config", type=Path, required=True, help="run file, configs/run/X.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="config keys to set, later ones win"
    )
    for option in ("--local_rank", "--local-rank"):
        parser.add_argument(option, type=int, default=0, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> NoReturn:
    """Train and leave the process."""
    supervise(lambda request: pretrain(options, request))


def pretrain(options: argparse.Namespace, request: StopRequest) -> int:
    """Train; report what is wrong with the config or the data before torch loads."""
    process = identify(os.environ)
    from megatron_mode.config import check_world_size, load_config
    from megatron_mode.mix.corpus import check_corpus
    from megatron_mode.report.writers import check_writable, silence_tensorboard, write_event

    config = load_config(options.config, options.overrides)
    run_dir = Path(config.run.dir)
    outlast_readers(lambda loss: write_event(run_dir, "output", loss, "drop"))
    check_world_size(config, process.world_size)
    check_corpus(config)
    check_writable(run_dir)
    if process.rank == 0:
        request.job_end_seconds = job_end_seconds(os.environ)
    prepare_environment(process)
    # Third-party imports warn about optional packages; our table says what was found.
    warnings.simplefilter("ignore")
    quiet_libraries()
    silence_tensorboard()
    from megatron_mode.train import train

    try:
        stop = train(config, process, request)
    except OSError as error:
        # A write to a full disk names no file; whatever a run writes is in its folder.
        error.filename = error.filename or config.run.dir
        raise
    return ExitStatus.STOPPED if stop else ExitStatus.DONE


def supervise(program: Callable[[StopRequest], int]) -> NoReturn:
    """Run one rank's program and leave with a status of docs/recovery.md's table.

    The process ends at once: threads of gloo and of the loader may outlive the work.
    """
    request = StopRequest().listen()
    try:
        status = exit_status(
            lambda: program(request),
            lambda said: wait_to_speak(os.environ, said, lambda: request.reason >= Reason.SIGHUP),
        )
    except RuntimeError:
        if (found := peers_status(os.environ)) is None:
            raise
        status = found
    except Exception:
        note_failure(ExitStatus.FAULT)
        raise
    if status not in (ExitStatus.DONE, ExitStatus.STOPPED):
        outlast_peers(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Train as the command line says; what `python -m megatron_mode.commands.train` runs."""

    def program(request: StopRequest) -> int:
        parser = CommandParser(description=__doc__, allow_abbrev=False)
        add_arguments(parser)
        return pretrain(parser.parse(sys.argv[1:] if arguments is None else arguments), request)

    supervise(program)


if __name__ == "__main__":
    main()
