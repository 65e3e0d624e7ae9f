"""Train: `deepspeed launch/pretrain.py --config configs/run/X.yaml [key.path=value ...]`.

`torchrun`, `srun python` and plain `python` start it too. It resumes by itself from the newest
checkpoint of the run folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; the DeepSpeed launcher adds --local_rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run file, configs/run/X.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="config keys to set, later ones win"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str]) -> int:
    """Run; return the exit status: 0 done, 2 for a mistake that its one-sentence message names."""
    from megatron_mode.engine.launch import identify, prepare_environment, quiet_libraries
    from megatron_mode.errors import MegatronModeError

    options = parse_arguments(arguments)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    try:
        from megatron_mode.config import check_world_size, load_config

        process = identify(os.environ)
        rank = process.rank
        config = load_config(options.config, options.overrides)
        check_world_size(config, process.world_size)
        prepare_environment(process, ROOT / ".cache" / "torch_extensions")
        quiet_libraries()
        # Third-party imports warn about optional packages; our table says what was found.
        warnings.simplefilter("ignore")
        from megatron_mode.train import train

        train(config, process)
    except MegatronModeError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo and of the loader may outlive main; the work is done and on disk.
    os._exit(status)
