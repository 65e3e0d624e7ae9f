"""A run that is asked to stop saves the same step on all ranks, and resumes to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gloo_world
import preemption_rank
import pytest
import resume_rank
from free_port import free_port
from run_files import metrics

from megatron_mode.config import dump_config

SCRIPT = gloo_world.ROOT / "launch" / "pretrain.py"
DEADLINE_SECONDS = 200


def make_config(small_corpus, folder, **run):
    run = {"steps": 6, "eval_every_steps": 2, "eval_rows": 4, "threads": 1, **run}
    return resume_rank.make_config(small_corpus, folder, run={"dir": str(folder), **run})


def is_unfinished(folder):
    return not any((folder / name).exists() for name in ("summary.json", "report.html"))


# Each start: moment of the signals, ranks that get them, signals, keys of `run`; then why all ranks
# leave, after which step, and how many saves they have begun by then.
STARTS = [
    (("step", 1), (3,), ("SIGUSR1",), {}, "SIGUSR1", 1, 1),
    (("evaluation", 1), (0,), ("SIGTERM",), {}, "SIGTERM", 2, 1),
    # While the save that was due after step 3 is being written.
    (("step", 2), (1,), ("SIGUSR1", "SIGTERM"), {}, "SIGTERM", 4, 2),
    (None, (), (), {"time_limit_seconds": 1000, "time_margin_seconds": 999.9}, "TIME_LIMIT", 5, 1),
    # In the last save, which no second one follows; the report is left to the next start.
    (("save", 1), (0, 1, 2, 3), ("SIGTERM", "SIGUSR1"), {}, "SIGTERM", 6, 1),
    # In the last evaluation, which the next start does again.
    (("final", 1), (2,), ("SIGUSR1",), {}, "SIGUSR1", 6, 0),
]


@pytest.mark.distributed
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(small_corpus, tmp_path):
    whole, often = tmp_path / "whole", tmp_path / "often"
    gloo_world.run_world(4, preemption_rank.run_training, make_config(small_corpus, whole))
    expected = metrics(whole)
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    for moment, ranks, signals, run, reason, step, saves in STARTS:
        config = make_config(small_corpus, often, **run)
        arguments = (config, moment, ranks, signals)
        ended = gloo_world.run_world(4, preemption_rank.run_training, *arguments)
        assert ended == [(reason, saves)] * 4
        assert metrics(often) == expected[:step]
        assert (often / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"
        assert is_unfinished(often)
    config = make_config(small_corpus, often)
    assert gloo_world.run_world(4, preemption_rank.run_training, config) == [("NONE", 0)] * 4
    assert metrics(often) == expected
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, often))
    assert one["valid"] == other["valid"]


@pytest.fixture
def launched():
    """Offer to start runs by a launcher; what a failed test leaves of them is killed."""
    started = []

    def start(*arguments):
        started.append(Launched(*arguments))
        return started[-1]

    yield start
    for run in started:
        for process_id in run.members():
            os.kill(process_id, signal.SIGKILL)
        run.process.wait()


class Launched:
    """Hold a run that a launcher started."""

    def __init__(self, starter, config, run_dir, log):
        (run_dir.parent / "run.yaml").write_text(dump_config(config))
        self.run_dir, self.log = run_dir, log
        self.mark = f"STARTED_BY_TEST={log}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", *starter, str(SCRIPT), "--config", run_dir.parent / "run.yaml"],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=gloo_world.ROOT,
            env={**os.environ, "PYTHONSAFEPATH": "1", "STARTED_BY_TEST": str(log)},
        )

    def members(self):
        """Return {process id: command line} of the launcher and all that it started."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = command
            except OSError:  # it has just ended
                continue
        return found

    def after(self, steps):
        """Wait until so many steps are logged."""
        path, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + DEADLINE_SECONDS
        while not path.exists() or len(path.read_text().splitlines()) < steps:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def wait(self):
        """Return the launcher's exit status; nothing that it started may be left."""
        status = self.process.wait(DEADLINE_SECONDS)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == {}
        return status


def saved_step(run_dir):
    manifest = (run_dir / "checkpoints/latest").read_text().strip() + "/manifest.json"
    return json.loads((run_dir / "checkpoints" / manifest).read_text())["step"]


def endless(small_corpus, run_dir, pipeline=2):
    """Return the config of a run that only a signal ends."""
    return resume_rank.make_config(
        small_corpus,
        run_dir,
        run={"dir": str(run_dir), "steps": 100_000, "eval_every_steps": 0, "threads": 1},
        parallel={"tensor": 1, "pipeline": pipeline},
        checkpoint={"every_steps": 0, "reshard": "auto"},
    )


@pytest.mark.timeout(900)
@pytest.mark.distributed
def test_under_deepspeed_a_signalled_rank_or_launcher_loses_no_step(
    launched, small_corpus, tmp_path
):
    run_dir = tmp_path / "run"
    config = endless(small_corpus, run_dir)
    starter = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]

    first = launched([*starter, str(free_port())], config, run_dir, tmp_path / "first.log")
    first.after(2)
    ranks = [pid for pid, line in first.members().items() if "launcher" not in line]
    os.kill(max(ranks), signal.SIGUSR1)
    assert first.wait() == 75, first.log.read_text()
    stopped_at = metrics(run_dir)[-1]["step"]
    assert saved_step(run_dir) == stopped_at
    said = [line for line in first.log.read_text().splitlines() if "start the same command" in line]
    assert len(said) == 1
    assert f"stopped after step {stopped_at} of 100000 (SIGUSR1)" in said[0]

    config = endless(small_corpus, run_dir, pipeline=1)
    starter[2] = "1"
    second = launched([*starter, str(free_port())], config, run_dir, tmp_path / "second.log")
    second.after(stopped_at + 2)
    (launcher,) = (pid for pid, line in second.members().items() if "launcher.launch " in line)
    os.kill(launcher, signal.SIGTERM)
    assert second.wait() == 1, "launch.py leaves with 1 when it is signalled itself"
    assert saved_step(run_dir) == metrics(run_dir)[-1]["step"] > stopped_at + 1
    assert is_unfinished(run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed
def test_under_torchrun_a_signalled_rank_or_agent_loses_no_step(launched, small_corpus, tmp_path):
    run_dir = tmp_path / "run"
    config = endless(small_corpus, run_dir)
    starter = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    first = launched([*starter, str(free_port())], config, run_dir, tmp_path / "first.log")
    first.after(2)
    ranks = [pid for pid, line in first.members().items() if "distributed.run" not in line]
    os.kill(max(ranks), signal.SIGUSR1)
    assert first.wait() == 1, "torchrun leaves with 1 whatever its processes say"
    assert "exitcode  : 75" in first.log.read_text()
    stopped_at = saved_step(run_dir)
    second = launched([*starter, str(free_port())], config, run_dir, tmp_path / "second.log")
    second.after(stopped_at + 2)
    os.kill(second.process.pid, signal.SIGTERM)
    assert second.wait() != 0
    assert saved_step(run_dir) == metrics(run_dir)[-1]["step"] > stopped_at + 1
