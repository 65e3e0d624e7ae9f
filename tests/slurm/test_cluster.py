"""The Slurm of these tests leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import cluster
import pytest

pytestmark = pytest.mark.slurm


def processes_of(folder):
    """Return the processes whose command line or environment names the folder, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has just ended
            continue
        if str(folder).encode() in text and int(process.name) != os.getpid():
            found.append(text)
    return found


def test_a_killed_test_run_leaves_no_daemon_and_no_shared_memory(tmp_path_factory):
    if reason := cluster.reason_to_skip():
        pytest.skip(reason)  # whether that may be is what the other tests say
    tmp_path = tmp_path_factory.mktemp("killed")
    started = cluster.Cluster(tmp_path)
    job = started.submit("--wrap", "touch /dev/shm/left-by-a-job; sleep 100")
    deadline = time.monotonic() + 60
    while (facts := started.facts(job))["JobState"] != "RUNNING":
        assert time.monotonic() < deadline, facts
        time.sleep(0.1)
    assert len(processes_of(tmp_path)) >= 5
    os.kill(started._wrapper.pid, signal.SIGKILL)
    started.close()
    deadline = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    assert not Path("/dev/shm/left-by-a-job").exists()
