"""Train: `deepspeed launch/pretrain.py --config configs/run/X.yaml [key.path=value ...]`.

`torchrun`, `srun python` and plain `python` start it too. It resumes by itself from the newest
checkpoint of the run folder. SIGTERM, SIGUSR1 or a near time limit stop it after a step, saved, and
it leaves with exit status 75: start it again.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from megatron_mode.__main__ import CommandParser, exit_status
from megatron_mode.engine.failures import (
    FAULT,
    note_failure,
    outlast_peers,
    peers_status,
    wait_to_speak,
)
from megatron_mode.engine.job_end import job_end_seconds
from megatron_mode.engine.launch import identify, prepare_environment, quiet_libraries
from megatron_mode.engine.stopping import STOPPED, Reason, StopRequest


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the launchers may add --local_rank. Raises ConfigError."""
    parser = CommandParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="run file, configs/run/X.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="config keys to set, later ones win"
    )
    for option in ("--local_rank", "--local-rank"):
        parser.add_argument(option, type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse(arguments)


def run(arguments: list[str], request: StopRequest) -> int:
    """Train; what is wrong with the command line, config or data is told before torch loads."""
    options = parse_arguments(arguments)
    process = identify(os.environ)
    if process.rank == 0:
        request.job_end_seconds = job_end_seconds(os.environ)
    from megatron_mode.config import check_world_size, load_config
    from megatron_mode.mix.corpus import check_corpus
    from megatron_mode.report.writers import check_writable, silence_tensorboard

    config = load_config(options.config, options.overrides)
    check_world_size(config, process.world_size)
    check_corpus(config)
    check_writable(Path(config.run.dir))
    prepare_environment(process)
    quiet_libraries()
    silence_tensorboard()
    # Third-party imports warn about optional packages; our table says what was found.
    warnings.simplefilter("ignore")
    from megatron_mode.train import train

    try:
        stop = train(config, process, request)
    except OSError as error:
        # A write to a full disk names no file; whatever a run writes lies in its folder.
        error.filename = error.filename or config.run.dir
        raise
    return STOPPED if stop else 0


def main(arguments: list[str]) -> int:
    """Run; return one of the statuses in README.md's table."""
    request = StopRequest().listen()
    try:
        status = exit_status(
            lambda: run(arguments, request),
            lambda said: wait_to_speak(os.environ, said, lambda: request.reason is Reason.SIGTERM),
        )
    except RuntimeError:
        found = peers_status(os.environ)
        if found is None:
            raise
        status = found
    except Exception:
        note_failure(FAULT)
        raise
    if status not in (0, STOPPED):
        outlast_peers(os.environ)
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo and of the loader may outlive main; the work is done and on disk.
    os._exit(status)
