"""Killed at any moment, a run resumes from an intact checkpoint and ends in the same bits.

The run is TP 2 PP 2, saves after every step, and is killed with SIGKILL at a time drawn at random,
one rank first and the others a moment later, until enough kills have hit it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
import signal
import time

import gloo_world
import pytest
import resume_rank
import torch
from run_files import metrics


def make_config(corpus, run, steps):
    return resume_rank.make_config(
        corpus,
        run,
        run={
            "dir": str(run),
            "steps": steps,
            "eval_every_steps": steps // 3,
            "eval_rows": 4,
            "threads": 1,
        },
        checkpoint={"every_steps": 1, "keep": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    """Return a function: steps to (a run that nobody kills, the seconds it took)."""
    gloo_world.run_world(1, bool)  # the server's own start, which later worlds do not wait for

    @functools.cache
    def train(steps):
        run = tmp_path_factory.mktemp("whole") / "run"
        begin = time.monotonic()
        config = make_config(small_corpus, run, steps)
        gloo_world.run_world(4, resume_rank.run_training, config)
        return run, time.monotonic() - begin

    return train


def is_good(folder):
    """Check a checkpoint with nothing of the program's own."""
    manifest = (folder / "manifest.json").read_bytes()
    seal = (folder / "manifest.json.sha256").read_text()
    files = json.loads(manifest)["files"]
    return (
        seal.split() == [hashlib.sha256(manifest).hexdigest(), "manifest.json"]
        and len(files) == 17
        and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == record["sha256"]
            for name, record in files.items()
        )
    )


def check_left(run):
    """Hold what a kill left against what is promised; return the newest step and the leftovers."""
    checkpoints = run / "checkpoints"
    latest = checkpoints / "latest"
    folders = sorted(p.name for p in checkpoints.glob("step-*")) if checkpoints.exists() else []
    finished = [name for name in folders if re.fullmatch(r"step-\d{8}", name)]
    assert all(is_good(checkpoints / name) for name in finished), finished
    if latest.exists():
        assert latest.read_text().strip() in finished
    assert latest.exists() or len(finished) <= 1
    newest = int(finished[-1].removeprefix("step-")) if finished else 0
    return newest, [name for name in folders if name not in finished]


def last_step(run):
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # a run may be in the middle of a line
    return json.loads(lines[-1])["step"] if lines else 0


def kill_once(config, run, draw, step, seconds):
    """Start the run; once it took a step, kill it at a drawn time; return whether that hit it."""
    workers, folder = gloo_world.start_world(4, resume_rank.run_training, config)

    def are_alive():
        return any(worker.is_alive() for worker in workers)

    while last_step(run) < step and are_alive():
        time.sleep(0.01)
    deadline = time.monotonic() + draw.uniform(*seconds)
    while time.monotonic() < deadline and are_alive():
        time.sleep(0.002)
    was_alive = all(worker.is_alive() for worker in workers)
    order = draw.sample(workers, k=4)
    for number, worker in enumerate(order):
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
        if number == 0:
            time.sleep(draw.choice([0, 0.001, 0.02, 0.2]))
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    told = [gloo_world.load_result(path) for path in folder.glob("*.pickle")]
    refused = [text for state, text in told if state == "error" and "CheckpointError" in text]
    assert not refused, refused[0]
    return was_alive


def check_the_rest(config, run, steps, whole):
    """Let a killed run end, and compare it with the undisturbed one."""
    newest, _ = check_left(run)
    first_step = newest if newest < steps else None
    taken = gloo_world.run_world(4, resume_rank.run_training, config)
    assert taken == [first_step] * 4, "from the newest whole checkpoint"
    assert metrics(run) == metrics(whole)
    same_weights(run, whole, steps)
    assert check_left(run) == (steps, [])


def same_weights(run, whole, steps):
    name = f"checkpoints/step-{steps:08d}"
    for path in sorted((whole / name).glob("layer_*")):
        one, other = (torch.load(p, weights_only=True) for p in (path, run / name / path.name))
        for key, tensor in one.items():
            assert tensor is None or torch.equal(tensor, other[key]), (path.name, key)


@pytest.mark.distributed
def test_a_run_killed_a_few_times_ends_alike(undisturbed, small_corpus, tmp_path):
    """Soon after a step of its own, and once while it starts."""
    steps, draw, run = 12, random.Random(1), tmp_path / "run"
    config = make_config(small_corpus, run, steps)
    for steps_before in (3, 0, 2):
        newest, _ = check_left(run)
        assert kill_once(config, run, draw, newest + steps_before, (0, 0.2))
        assert check_left(run)[0] >= newest
    assert check_left(run)[0] > 0
    check_the_rest(config, run, steps, undisturbed(steps)[0])


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_many_kills(undisturbed, small_corpus, tmp_path):
    """KILLS=200 does as many as are asked for."""
    kills, steps = int(os.environ.get("KILLS", "60")), 30
    draw = random.Random(int(os.environ.get("SEED", "2")))
    whole, seconds = undisturbed(steps)
    hit = runs = during_saves = resumed = 0
    while hit < kills:
        run = tmp_path / f"run-{runs}"
        config = make_config(small_corpus, run, steps)
        for _ in range(min(8, kills - hit)):
            was_alive = kill_once(config, run, draw, 0, (0.2, seconds))
            newest, left_over = check_left(run)
            hit += was_alive
            during_saves += bool(left_over)
            resumed += newest > 0
            if not was_alive:
                break
        check_the_rest(config, run, steps, whole)
        runs += 1
    print(f"{hit} kills of {runs} runs, {during_saves} during saves, {resumed} left a checkpoint")
    assert during_saves > kills // 20
    assert resumed > kills // 2
