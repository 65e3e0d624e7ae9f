"""Start a process of a run: read from the launcher who we are and when our job ends.

Only this file reads launcher variables. `deepspeed` and `torchrun` set RANK, WORLD_SIZE and
LOCAL_RANK; `srun` sets SLURM_* instead; plain `python` sets nothing and is alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from megatron_mode.errors import ConfigError

ASK_SECONDS = 15.0


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
    job: str = ""
    """Number of the Slurm job, where there is one."""
    restarts: int = 0
    """How often Slurm has put the job back in the queue."""


def identify(environment: Mapping[str, str]) -> Process:
    """Work out the process from its launcher's variables.

    Raises ConfigError when a launcher's variables are incomplete or contradict each other.
    """
    is_task = environment.keys() >= {"SLURM_PROCID", "SLURM_STEP_ID"}
    if "RANK" in environment:
        process = _from_torch_variables(environment)
    elif is_task and not _is_in_shell(environment):
        process = _from_slurm(environment)
    else:
        process = Process(0, 1, 0, 1, "127.0.0.1", _free_port(), "python")
    _check_agreement(process, environment)
    return replace(
        process,
        job=environment.get("SLURM_JOB_ID", ""),
        restarts=_integer(environment, "SLURM_RESTART_COUNT", default=0),
    )


def _is_in_shell(environment: Mapping[str, str]) -> bool:
    """Tell whether a user typed the command in a shell of `srun --pty`: it is alone there.

    The shell is a task and hands its variables down. The tasks of a further srun inherit
    SLURM_PTY_PORT, but they have no terminal.
    """
    is_task_itself = environment.get("SLURM_TASK_PID") == str(os.getpid())
    return "SLURM_PTY_PORT" in environment and not is_task_itself and _has_terminal()


def _has_terminal() -> bool:
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def _from_torch_variables(environment: Mapping[str, str]) -> Process:
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if missing:
        raise ConfigError(
            f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, "
            "or unset RANK to run one process"
        )
    world_size = _integer(environment, "WORLD_SIZE", least=1)
    # torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE; without either there is one machine.
    size_name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    return Process(
        rank=_integer(environment, "RANK"),
        world_size=world_size,
        local_rank=_integer(environment, "LOCAL_RANK", default=None if world_size > 1 else 0),
        local_world_size=_integer(environment, size_name, least=1, default=world_size),
        master_addr=environment["MASTER_ADDR"],
        master_port=_integer(environment, "MASTER_PORT", least=1),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed",
    )


def _from_slurm(environment: Mapping[str, str]) -> Process:
    world_size = _integer(environment, "SLURM_NTASKS", least=1)
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
        master_port=_integer(environment, "MASTER_PORT", default=0) or _free_port(),
        launcher="srun",
    )


def _slurm_tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    # Of "4(x2),3" takes node SLURM_NODEID's entry, repeats expanded. The step's variable comes
    # first: under `srun --preserve-env` the other one describes the entire job.
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    name = next((n for n in names if n in environment), names[0])
    text = environment.get(name, str(world_size))
    entries = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry) for entry in text.split(",")]
    counts = [n for e in entries if e for n in [int(e[1])] * int(e[2] or 1)]
    node = _integer(environment, "SLURM_NODEID", default=0)
    if not all(entries) or sum(counts) != world_size or node >= len(counts):
        raise ConfigError(
            f"{name} is {text!r} at SLURM_NODEID {node}: use tasks for each node that sum to "
            f"SLURM_NTASKS = {world_size}, such as '4(x2),3'; start with srun, which sets them"
        )
    return counts[node]


def _integer(
    environment: Mapping[str, str], name: str, *, least: int = 0, default: int | None = None
) -> int:
    value = environment.get(name, "" if default is None else str(default))
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(
            f"{name} is {value!r}: use an integer of {least} or more; start with deepspeed, "
            "torchrun or srun, which set it"
        )
    return int(value)


def _check_agreement(process: Process, environment: Mapping[str, str]) -> None:
    """Raise ConfigError when the numbers of a process contradict each other."""
    most = {
        "rank": (process.rank, process.world_size - 1),
        "number of processes on this machine": (process.local_world_size, process.world_size),
        "rank on this machine": (process.local_rank, process.local_world_size - 1),
        "master port": (process.master_port, 65535),
    }
    for name, (number, limit) in most.items():
        if number > limit:
            raise ConfigError(
                f"the {name} is {number} by the variables of {process.launcher}: use at most "
                f"{limit}; unset variables that are left over from another run"
            )
    # Started without srun or a hostfile, a run would take one process or machine and succeed.
    tasks = _integer(environment, "SLURM_NTASKS", default=1)
    nodes = _integer(environment, "SLURM_NNODES", default=1)
    # deepspeed and torchrun start as many on each; srun's nodes may have different numbers.
    machines = -(-process.world_size // process.local_world_size)
    too_few_machines = machines < (min(nodes, 2) if process.launcher == "srun" else nodes)
    if process.world_size < tasks or too_few_machines:
        # The step of an `srun --pty` shell holds the job's resources: srun would wait for them.
        srun = "srun --overlap" if "SLURM_PTY_PORT" in environment else "srun"
        raise ConfigError(
            f"the allocation has SLURM_NTASKS = {tasks} on SLURM_NNODES = {nodes} but "
            f"{process.launcher} started {process.world_size}, {process.local_world_size} of them "
            f"here: fill it; start with {srun}, give deepspeed a hostfile, or unset both"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment(process: Process) -> None:
    """Export what torch and DeepSpeed read, before either is imported."""
    # Slurm signals every process of a task: a signal that only asks the run to stop would kill
    # torch's compile helper, and the next compilation wait for ever. One thread needs no helper.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.update(
        RANK=str(process.rank),
        WORLD_SIZE=str(process.world_size),
        LOCAL_RANK=str(process.local_rank),
        LOCAL_SIZE=str(process.local_world_size),
        MASTER_ADDR=process.master_addr,
        MASTER_PORT=str(process.master_port),
    )


def cpu_threads(requested: int, local_world_size: int) -> int:
    """Return CPU threads for one process: as asked, else an equal share of this machine's cores."""
    return requested or max(1, len(os.sched_getaffinity(0)) // local_world_size)


def ask_squeue(job_id: str) -> str:
    """Return what squeue says of the end of a job; nothing where it cannot be asked."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%e"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def job_end_seconds(
    environment: Mapping[str, str], ask: Callable[[str], str] = ask_squeue
) -> float | None:
    """Return the end of the Slurm job in Unix time; None outside Slurm and without a limit.

    An end that has passed is another job's: a shell that outlived its job keeps the variables.
    SLURM_JOB_END_TIME came after Slurm 22.05; where it is missing, rank 0 alone asks the controller
    once: a thousand ranks that ask at the same time would stall it.
    """
    job_id = environment.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    stated = environment.get("SLURM_JOB_END_TIME", "")
    try:
        is_stated = stated.isdecimal()
        end = (
            float(stated) if is_stated else datetime.fromisoformat(ask(job_id).strip()).timestamp()
        )
    except ValueError:  # N/A, NONE or Unknown: there is no limit
        return None
    if end <= time.time():
        print(
            f"note: job {job_id} of SLURM_JOB_ID ended at {datetime.fromtimestamp(end)}, before "
            "this start: its time limit is ignored"
        )
        return None
    return end
