"""A process knows who it is from each launcher's variables, and says what contradicts."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.errors import ConfigError
from megatron_mode.process import launch
from megatron_mode.process.launch import (
    Process,
    cpu_threads,
    identify,
    prepare_environment,
)
from megatron_mode.quiet import quiet_libraries

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
DEEPSPEED = MEETING | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
TORCHRUN = MEETING | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = MEETING | {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NNODES": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_deepspeed_says_who_we_are():
    assert identify(DEEPSPEED) == Process(5, 8, 1, 4, "node1", 29501, "deepspeed")


def test_torchrun_says_who_we_are():
    assert identify(TORCHRUN) == Process(5, 8, 1, 4, "node1", 29501, "torchrun")


def test_srun_says_who_we_are():
    assert identify(SRUN) == Process(9, 11, 1, 3, "node1", 29501, "srun")


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_plain_python_is_alone(environment):
    """So is a batch script of one task: it has a rank, but no step that srun started."""
    process = identify(environment)
    assert (process.rank, process.world_size, process.local_rank) == (0, 1, 0)
    assert (process.local_world_size, process.master_addr) == (1, "127.0.0.1")
    assert process.launcher == "python"
    assert 1024 <= process.master_port < 65536


def test_one_process_of_srun_needs_no_meeting_point():
    environment = without(SRUN, *MEETING, "SLURM_STEP_TASKS_PER_NODE") | {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
    }
    process = identify(environment)
    assert process.master_addr == "127.0.0.1"
    assert 1024 <= process.master_port < 65536


def test_one_process_of_deepspeed_needs_no_local_rank():
    environment = without(DEEPSPEED, "LOCAL_RANK", "LOCAL_SIZE") | {"RANK": "0", "WORLD_SIZE": "1"}
    process = identify(environment)
    assert (process.local_rank, process.local_world_size) == (0, 1)


@pytest.mark.parametrize("tasks", [1, 4])
def test_a_shell_of_srun_pty_runs_one_process_or_refuses(monkeypatch, tasks):
    """By its variables it is one task of four: the run waited for three that nobody started."""
    monkeypatch.setattr(launch, "_has_terminal", lambda: True)
    shell = SRUN | {
        "SLURM_PTY_PORT": "40000",
        "SLURM_TASK_PID": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": str(tasks),
    }
    if tasks == 1:
        assert identify(shell).launcher == "python"
        return
    for environment in (shell, without(shell, *MEETING)):
        with pytest.raises(ConfigError, match=r"python started 1, .*start with srun --overlap"):
            identify(environment)
    # The tasks of srun itself, also of one that the shell starts, are a run of four.
    assert identify(shell | {"SLURM_TASK_PID": str(os.getpid())}).world_size == 4
    monkeypatch.setattr(launch, "_has_terminal", lambda: False)
    assert identify(shell).world_size == 4


def test_without_a_local_size_all_processes_are_on_one_machine():
    process = identify(without(DEEPSPEED, "LOCAL_SIZE"))
    assert process.local_world_size == 8


def test_a_whole_job_of_srun_keeps_its_own_tasks_per_node():
    """`srun --preserve-env` leaves the job's variable beside the step's: the step's counts."""
    process = identify(SRUN | {"SLURM_TASKS_PER_NODE": "16(x3)"})
    assert process.local_world_size == 3
    renamed = without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_TASKS_PER_NODE": "4(x2),3"}
    assert identify(renamed).local_world_size == 3


def compress(counts):
    """Write tasks a node as Slurm does: runs of equal counts are joined."""
    groups: list[list[int]] = []
    for count in counts:
        if groups and groups[-1][0] == count:
            groups[-1][1] += 1
        else:
            groups.append([count, 1])
    return ",".join(f"{n}(x{times})" if times > 1 else f"{n}" for n, times in groups)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.data())
def test_tasks_of_any_nodes_are_read(counts, data):
    node = data.draw(st.integers(0, len(counts) - 1))
    local_rank = data.draw(st.integers(0, counts[node] - 1))
    environment = SRUN | {
        "SLURM_PROCID": str(sum(counts[:node]) + local_rank),
        "SLURM_NTASKS": str(sum(counts)),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_NODEID": str(node),
        "SLURM_NNODES": str(len(counts)),
        "SLURM_STEP_TASKS_PER_NODE": compress(counts),
    }
    process = identify(environment)
    assert process.local_world_size == counts[node]
    assert (process.rank, process.local_rank) == (sum(counts[:node]) + local_rank, local_rank)


BROKEN = {
    "no world size": (without(DEEPSPEED, "WORLD_SIZE"), "WORLD_SIZE"),
    "no meeting point": (without(TORCHRUN, *MEETING), "MASTER_ADDR, MASTER_PORT"),
    "no port": (without(DEEPSPEED, "MASTER_PORT"), "MASTER_PORT"),
    "no local rank": (without(DEEPSPEED, "LOCAL_RANK"), "LOCAL_RANK"),
    "rank is a word": (DEEPSPEED | {"RANK": "first"}, "RANK is 'first'"),
    "rank is negative": (DEEPSPEED | {"RANK": "-1"}, "RANK is '-1'"),
    "rank is a superscript": (DEEPSPEED | {"RANK": "²"}, "RANK is '²'"),
    "local rank is a word": (DEEPSPEED | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    "local size is a word": (DEEPSPEED | {"LOCAL_SIZE": "x"}, "LOCAL_SIZE is 'x'"),
    "local world is empty": (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    "port is a word": (DEEPSPEED | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    "port is too large": (DEEPSPEED | {"MASTER_PORT": "65536"}, "port is 65536.* 65535"),
    "rank outside": (DEEPSPEED | {"RANK": "8"}, "rank is 8 .*at most 7"),
    "empty world": (DEEPSPEED | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "local rank outside": (TORCHRUN | {"LOCAL_RANK": "4"}, "rank on this machine is 4 .*at most 3"),
    "local world outside": (DEEPSPEED | {"LOCAL_SIZE": "9"}, "on this machine is 9 .*at most 8"),
    "no tasks": (without(SRUN, "SLURM_NTASKS"), "SLURM_NTASKS is ''"),
    "no local id": (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID is ''"),
    "tasks without meeting point": (without(SRUN, "MASTER_PORT"), "scontrol show hostnames"),
    "task outside": (SRUN | {"SLURM_PROCID": "11"}, "rank is 11 .*at most 10"),
    "local task outside": (SRUN | {"SLURM_LOCALID": "3"}, "rank on this machine is 3 .*at most 2"),
    "tasks a node unread": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4x2,3"}, "is '4x2,3'"),
    "tasks a node of another sum": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, "= 11"),
    "node outside": (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID 3"),
    "srun's port is a word": (SRUN | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    # A run that would silently take one process, or one machine, of an allocation.
    "python among tasks": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "SLURM_NTASKS = 4"),
    "deepspeed without a hostfile": (
        DEEPSPEED
        | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        | {"SLURM_NTASKS": "2"},
        "deepspeed started 1, 1 of them",
    ),
    "two machines of three": (
        DEEPSPEED | {"SLURM_NTASKS": "3", "SLURM_NNODES": "3"},
        "SLURM_NTASKS = 3 on SLURM_NNODES = 3 but deepspeed started 8, 4 of them here",
    ),
    "one machine of two": (
        without(DEEPSPEED, "LOCAL_SIZE") | {"SLURM_NNODES": "2"},
        "SLURM_NNODES = 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_contradictions_are_one_sentence(case):
    environment, expected = BROKEN[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        identify(environment)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")


@pytest.mark.parametrize("environment", [DEEPSPEED, TORCHRUN])
def test_a_run_that_fills_its_allocation_is_accepted(environment):
    """One task a node that starts four processes, on two nodes."""
    assert identify(environment | {"SLURM_NTASKS": "2", "SLURM_NNODES": "2"}).world_size == 8


def test_the_job_and_its_requeues_are_known():
    alone = identify({})
    assert (alone.job, alone.restarts) == ("", 0)
    again = identify(SRUN | {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"})
    assert (again.job, again.restarts) == ("77", 2)


def test_threads_are_an_equal_share_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert cpu_threads(0, 1) == cores
    assert cpu_threads(0, 2 * cores) == 1
    assert cpu_threads(3, 2 * cores) == 3
    for processes in range(1, cores + 1):
        assert cpu_threads(0, processes) * processes <= cores


def test_what_the_libraries_read_is_exported(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    process = identify(SRUN)
    prepare_environment(process)
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1", "no helper that a signal kills"
    again = identify(os.environ)
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size) == (9, 11, 1, 3)
    assert (again.master_addr, again.master_port) == ("node1", 29501)


def test_deepspeed_does_not_look_for_a_gpu_where_torch_sees_none(monkeypatch):
    """It would print a warning that it found none, as the first line of every run on a CPU."""
    torch = pytest.importorskip("torch")
    for sees_gpu, expected in ((False, "cpu"), (True, None)):
        monkeypatch.setattr(os, "environ", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees_gpu=sees_gpu: sees_gpu)
        quiet_libraries()
        assert os.environ.get("DS_ACCELERATOR") == expected
