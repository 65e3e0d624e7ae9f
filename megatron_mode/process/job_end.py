"""Ask Slurm when it will end the job that this process belongs to."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime

ASK_SECONDS = 15.0


def ask_squeue(job_id: str) -> str:
    """Return what squeue says of the end of a job; nothing where it cannot be asked."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%e"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def job_end_seconds(
    environment: Mapping[str, str], ask: Callable[[str], str] = ask_squeue
) -> float | None:
    """Return the end of the Slurm job in Unix time; None outside Slurm and without a limit.

    An end that has passed is another job's: a shell that outlived its job keeps the variables.

    SLURM_JOB_END_TIME came after Slurm 22.05; where it is missing the controller is asked once, by
    rank 0 only: a thousand ranks that ask at once would stall it.
    """
    job_id = environment.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    stated = environment.get("SLURM_JOB_END_TIME", "")
    try:
        end = float(stated) if stated.isdecimal() else _local_time(ask(job_id).strip())
    except ValueError:  # N/A, NONE or Unknown: there is no limit
        return None
    if end <= time.time():
        print(
            f"note: job {job_id} of SLURM_JOB_ID ended at {datetime.fromtimestamp(end)}, before "
            "this start: its time limit is ignored"
        )
        return None
    return end


def _local_time(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
