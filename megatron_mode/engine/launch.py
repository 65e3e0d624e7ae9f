"""Start a process of a run: read who we are from the launcher, join the group, choose the device.

This is the only place that reads launcher variables. `deepspeed` and `torchrun` set RANK,
WORLD_SIZE and LOCAL_RANK; `srun` sets SLURM_* instead; plain `python` sets nothing and is alone.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mode.errors import ConfigError

FAILURES_KEY = "failures"


@dataclass(frozen=True)
class Process:
    """Say which process this is and where the group meets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str


def identify(environment: Mapping[str, str]) -> Process:
    """Work out the process from its launcher's variables.

    Raises ConfigError when a launcher's variables are incomplete or contradict each other.
    """
    if "RANK" in environment:
        return _from_torch_variables(environment)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _from_slurm(environment)
    return Process(0, 1, 0, 1, "127.0.0.1", _free_port(), "python")


def _from_torch_variables(environment: Mapping[str, str]) -> Process:
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if missing:
        raise ConfigError(
            f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, "
            "or unset RANK to run one process"
        )
    world_size = _integer(environment, "WORLD_SIZE")
    local_rank = environment.get("LOCAL_RANK", "0")
    return Process(
        rank=_integer(environment, "RANK"),
        world_size=world_size,
        local_rank=int(local_rank),
        local_world_size=int(
            environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size))
        ),
        master_addr=environment["MASTER_ADDR"],
        master_port=_integer(environment, "MASTER_PORT"),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed",
    )


def _from_slurm(environment: Mapping[str, str]) -> Process:
    world_size = _integer(environment, "SLURM_NTASKS")
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        raise ConfigError(
            f"SLURM_NTASKS is {world_size} but MASTER_ADDR or MASTER_PORT is unset: export both in "
            "the batch script, e.g. MASTER_ADDR=$(scontrol show hostnames | head -n 1) "
            "MASTER_PORT=29500"
        )
    return Process(
        rank=_integer(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_world_size=_slurm_tasks_here(environment, world_size),
        master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environment.get("MASTER_PORT", 0)) or _free_port(),
        launcher="srun",
    )


def _slurm_tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    # SLURM_TASKS_PER_NODE reads like "4(x2),3": node SLURM_NODEID's entry, repeats expanded.
    counts: list[int] = []
    for entry in environment.get("SLURM_TASKS_PER_NODE", str(world_size)).split(","):
        count, _, repeat = entry.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise ConfigError(f"{name} is {value!r}: it must be a whole number set by the launcher")
    return int(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment(process: Process, extensions_dir: Path) -> None:
    """Export what torch and DeepSpeed read, before either is imported.

    `extensions_dir` is where `make install` built DeepSpeed's CPU op; naming it here means that no
    run compiles under a lock.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir))
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(process.local_rank),
        LOCAL_SIZE=str(process.local_world_size),
        MASTER_ADDR=process.master_addr,
        MASTER_PORT=str(process.master_port),
    )


def quiet_libraries() -> None:
    """Leave warnings and errors of DeepSpeed and torch, drop their progress chatter."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name in ("DeepSpeed", "deepspeed", "torch.distributed", "megatron", "numexpr"):
        logging.getLogger(name).setLevel(logging.WARNING)


def cpu_threads(requested: int, local_world_size: int) -> int:
    """Return CPU threads for one process: as asked, else an equal share of this machine's cores."""
    return requested or max(1, len(os.sched_getaffinity(0)) // local_world_size)


def is_first_to_fail(environment: Mapping[str, str]) -> bool:
    """Tell whether this process is the one that says what went wrong.

    Before the group is joined every process meets the same mistake, so rank 0 says it. Afterwards a
    mistake may meet one process only (its disk is full), so the first says it, whichever it is.
    """
    failures = _add_failures(1) if _is_joined() else None
    return _is_rank_0(environment) if failures is None else failures == 1


def has_peer_failed(environment: Mapping[str, str]) -> bool:
    """Tell whether another process has said what went wrong, so that this one need not."""
    if not _is_joined():
        return False
    failures = _add_failures(0)
    # Rank 0 holds the counter: where that is gone, rank 0 has failed and said so.
    return not _is_rank_0(environment) if failures is None else failures > 0


def _is_rank_0(environment: Mapping[str, str]) -> bool:
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def _is_joined() -> bool:
    torch = sys.modules.get("torch")  # not imported for this: a process without it is not joined
    return torch is not None and bool(torch.distributed.is_initialized())


def _add_failures(count: int) -> int | None:
    """Count failures of the group's processes and return their sum; None where it is gone."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add(FAILURES_KEY, count))
    except RuntimeError:
        return None
