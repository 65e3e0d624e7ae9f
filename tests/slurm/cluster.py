"""Talk to a real Slurm that lives in namespaces of its own; private_slurm.sh starts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRAPPER = Path(__file__).with_name("private_slurm.sh")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
START_SECONDS, JOB_SECONDS = 60, 150
# A Unix socket's name has at most 107 bytes; SLURM_FOLDER/spool.node1/node1_JOB.STEP is one.
LONGEST_FOLDER = 65
# Ends of a job; a requeued one passes through COMPLETING to PENDING.
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"}


def reason_to_skip() -> str | None:
    """Return why a real Slurm cannot be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm in private namespaces needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"],
        capture_output=True,
        check=False,
    )
    return None if tried.returncode == 0 else "private namespaces are not allowed here"


class Cluster:
    """Two nodes, node1 and node2, for jobs that start in the repository."""

    def __init__(self, folder: Path) -> None:
        """Start Slurm; `folder` gets its state and the logs of jobs."""
        assert len(str(folder)) <= LONGEST_FOLDER, f"{folder}: Slurm's sockets have long names"
        self.folder = folder
        self._log = (folder / "wrapper.log").open("w")
        # `cat` ends when its input does: even if this process is killed, Slurm goes.
        self._wrapper = subprocess.Popen(
            [str(WRAPPER), str(folder / "slurm"), "bash", "-c", f"touch {folder}/up; exec cat"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + START_SECONDS
        while not (folder / "up").exists():
            assert self._wrapper.poll() is None, (folder / "wrapper.log").read_text()
            assert time.monotonic() < deadline, (folder / "wrapper.log").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{self._wrapper.pid}/task/{self._wrapper.pid}/children")
        self._inside = children.read_text().split()[0]

    def close(self) -> None:
        """End Slurm and all that it started."""
        assert self._wrapper.stdin is not None
        self._wrapper.stdin.close()
        try:
            self._wrapper.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._wrapper.kill()  # --kill-child: the namespace goes with it
            self._wrapper.wait()
        self._log.close()

    def call(self, *words: str | Path, **variables: str) -> str:
        """Run a command inside, in the repository, and return what it prints."""
        launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "SBATCH_", "MODE_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        enter = ("nsenter", "--target", self._inside, *NAMESPACES)
        done = subprocess.run(
            [*enter, "env", f"--chdir={ROOT}", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={
                **kept,
                "SLURM_CONF": str(self.folder / "slurm/slurm.conf"),
                "OMP_NUM_THREADS": "1",
                **variables,
            },
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *words: str | Path, **variables: str) -> str:
        """Submit a job and return its number; its log is `log(job)`."""
        is_array = any(str(word).startswith("--array") for word in words)
        output = f"--output={self.folder}/{'%A_%a' if is_array else '%j'}.log"
        return self.call("sbatch", "--parsable", output, *words, **variables)

    def log(self, job: str) -> str:
        """Return what the starts of a job printed."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        """Return what scontrol says of a job: JobState, ExitCode, Restarts and the like."""
        words = self.call("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout_seconds: float = JOB_SECONDS) -> dict[str, str]:
        """Wait for the end of a job, requeues included, and return its facts."""
        deadline = time.monotonic() + timeout_seconds
        while (facts := self.facts(job))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, (facts, self.log(job))
            time.sleep(0.2)
        return facts
