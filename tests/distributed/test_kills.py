"""Killed at any moment, a run goes on from a whole checkpoint and ends in the same bits.

The run is TP 2 PP 2, saves after every step, and is killed with SIGKILL after a time drawn
at random, one rank first and the others a moment later, until enough kills have hit it.
"""

from __future__ import annotations

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

STEPS = 30


def make_config(corpus, run):
    return resume_rank.make_config(
        corpus,
        run,
        run={
            "dir": str(run),
            "steps": STEPS,
            "eval_every_steps": 10,
            "eval_rows": 4,
            "threads": 1,
        },
        checkpoint={"every_steps": 1, "keep": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    gloo_world.run_world(1, bool)  # the server's own start, which later worlds do not wait for
    begin = time.monotonic()
    gloo_world.run_world(4, resume_rank.run_training, make_config(small_corpus, run))
    return run, time.monotonic() - begin


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


def kill_once(config, draw, longest_seconds):
    """Start the run and kill it after a drawn time; return whether it was still going."""
    workers, folder = gloo_world.start_world(4, resume_rank.run_training, config)
    deadline = time.monotonic() + draw.uniform(0.2, longest_seconds)
    while time.monotonic() < deadline and any(worker.is_alive() for worker in workers):
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


def kill_until(kills, undisturbed, corpus, folder, seed):
    """Kill runs until `kills` have hit; end each, and compare it with the undisturbed one."""
    whole, seconds = undisturbed
    draw = random.Random(seed)
    hit = runs = during_saves = resumed = 0
    while hit < kills:
        config = make_config(corpus, folder / f"run-{runs}")
        run = folder / f"run-{runs}"
        for _ in range(min(8, kills - hit)):
            was_alive = kill_once(config, draw, seconds)
            newest, lying_about = check_left(run)
            hit += was_alive
            during_saves += bool(lying_about)
            resumed += newest > 0
            if not was_alive:
                break
        newest, _ = check_left(run)
        first_step = newest if newest < STEPS else None
        taken = gloo_world.run_world(4, resume_rank.run_training, config)
        assert taken == [first_step] * 4, "from the newest whole checkpoint"
        assert metrics(run) == metrics(whole)
        same_weights(run, whole)
        assert check_left(run) == (STEPS, [])
        runs += 1
    print(f"{hit} kills of {runs} runs, {during_saves} during saves, {resumed} left a checkpoint")
    return during_saves, resumed


def same_weights(run, whole):
    name = f"checkpoints/step-{STEPS:08d}"
    for path in sorted((whole / name).glob("layer_*")):
        one, other = (torch.load(p, weights_only=True) for p in (path, run / name / path.name))
        for key, tensor in one.items():
            assert tensor is None or torch.equal(tensor, other[key]), (path.name, key)


@pytest.mark.distributed
def test_a_run_killed_a_few_times_ends_alike(undisturbed, small_corpus, tmp_path):
    _, resumed = kill_until(4, undisturbed, small_corpus, tmp_path, seed=1)
    assert resumed > 0


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_many_kills(undisturbed, small_corpus, tmp_path):
    """KILLS=200 does as many as are asked for."""
    kills = int(os.environ.get("KILLS", "60"))
    seed = int(os.environ.get("SEED", "2"))
    during_saves, resumed = kill_until(kills, undisturbed, small_corpus, tmp_path, seed)
    assert during_saves > kills // 20
    assert resumed > kills // 2
