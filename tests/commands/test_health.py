"""Processes that are stopped, disks that are full: how a run ends, and that it then resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_files import metrics

STALL_SECONDS = 3


def events(run):
    return [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]


def wait_for_lines(run, count, started):
    deadline = time.monotonic() + 120
    while len(metrics(run)) < count:
        assert time.monotonic() < deadline
        assert all(Path(f"/proc/{one.process_id}").exists() for one in started)
        time.sleep(0.02)


def test_a_disk_that_is_full_at_the_last_save_is_told(pretrain, mount, tmp_path):
    """No step is in work then; the run resumes from its beginning where there is room again."""
    run = tmp_path / "run"
    run.mkdir()
    disk = mount(run / "checkpoints", "size=100k")
    words = ("run.steps=3", "run.eval_every_steps=0", "checkpoint.every_steps=0", f"run.dir={run}")
    ended = pretrain(*words)
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1
    assert "step-00000003 cannot be written" in ended.err
    (event,) = events(run)
    assert (event["kind"], event["step"]) == ("checkpoint", 3)
    assert "rows" not in event
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    assert pretrain(*words).status == 0


@pytest.mark.distributed
@pytest.mark.parametrize("stopped", [3, 0], ids=["a-rank", "rank-0-which-holds-the-store"])
def test_a_stopped_rank_ends_the_run_with_its_name_and_stacks(stopped, server, trained, tmp_path):
    """No rank waits for ever in a collective; started again, the run resumes to its end."""
    run = tmp_path / "run"
    words = (
        "--config",
        trained.config,
        f"data.root={trained.data}",
        f"run.dir={run}",
        "run.steps=100",
        "run.eval_every_steps=0",
        "checkpoint.every_steps=2",
        "parallel.tensor=2",
        "parallel.pipeline=2",
        f"health.stall_seconds={STALL_SECONDS}",
    )
    words = (*words, "model.kv_heads=2")
    started = server.start_world(4, *words)
    try:
        wait_for_lines(run, 4, started)
        os.kill(started[stopped].process_id, signal.SIGSTOP)
        begin = time.monotonic()
        others = [one for rank, one in enumerate(started) if rank != stopped]
        ends = [one.wait(60) for one in others]
        seconds = time.monotonic() - begin
    finally:
        for one in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process_id, signal.SIGKILL)
    assert seconds < STALL_SECONDS + 6
    assert [end.status for end in ends] == [4, 4, 4], ends
    told = [line for end in ends for line in end.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, told
    assert f"no progress for {STALL_SECONDS} s (health.stall_seconds) in step " in told[0]
    assert f": rank {stopped} has not arrived; " in told[0]
    stacks = {path.name: path.read_text() for path in (run / "stacks").glob("rank-*.txt")}
    assert sorted(stacks) == [f"rank-{rank:05d}.txt" for rank in range(4) if rank != stopped]
    for text in stacks.values():
        assert " in train\n" in text, "where the main thread stands"
        assert text.count("File ") > 10
    (event,) = events(run)
    assert (event["kind"], event["action"]) == ("stall", "stop")
    assert event["rows"][0]["documents"]
    done = len(metrics(run))
    again = server.run_world(4, *words, f"run.steps={done + 2}")
    assert [end.status for end in again] == [0] * 4, again
    assert [line["step"] for line in metrics(run)] == list(range(1, done + 3))


def test_a_disk_that_fills_with_checkpoints_loses_nothing(pretrain, mount, tmp_path):
    """The run ends in a sentence; with room again its metrics are those of an unbroken one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ("run.steps=6", "run.eval_every_steps=0")
    words = (*words, "checkpoint.every_steps=1", "checkpoint.keep=4")
    assert pretrain(*words, f"run.dir={whole}").status == 0
    one = sum(path.stat().st_size for path in (whole / "checkpoints/step-00000006").iterdir())
    broken.mkdir()
    disk = mount(broken / "checkpoints", f"size={int(2.6 * one) >> 10}k")
    ended = pretrain(*words, f"run.dir={broken}")
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    *_, sentence = ended.err.splitlines()
    assert sentence.startswith("error: ")
    assert "cannot be written" in sentence
    assert "bytes left; free space and start the run again" in sentence
    assert (disk / "latest").read_text().strip() == "step-00000002"
    assert [event["kind"] for event in events(broken)] == ["checkpoint"]
    subprocess.run(["mount", "-o", f"remount,size={8 * one >> 10}k", disk], check=True)
    assert pretrain(*words, f"run.dir={broken}").status == 0
    assert metrics(broken) == metrics(whole)
    assert (disk / "latest").read_text().strip() == "step-00000006"
