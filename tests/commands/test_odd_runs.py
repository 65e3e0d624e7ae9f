"""Runs of unusual size or end: the smallest, the one-sided, the finished, the killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_pretrain import Server
from run_files import metrics
from tiny_run import PRETRAIN, ROOT, Outcome, Trained, tree, variables

Call = Callable[..., Outcome]
ONLY_MODE_1 = ("mix.mode2.sources=[]", "mix.mode2_fraction.start=0")
ONLY_MODE_2 = ("mix.mode1.sources=[]", "mix.mode2_fraction.start=1")


def trained_steps(outcome: Outcome, run: Path) -> list[int]:
    assert outcome.status == 0, outcome.err
    assert (run / "report.html").stat().st_size > 0
    return [line["step"] for line in metrics(run)]


def test_the_smallest_run(pretrain: Call, tmp_path: Path) -> None:
    """One step of one row, and more rows to evaluate than there are."""
    smallest = ("run.steps=1", "batch.global_rows=1", "batch.micro_rows=1", "run.eval_rows=99999")
    assert trained_steps(pretrain(*smallest), tmp_path / "run") == [1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["valid_mode_auroc"] <= 1


def test_without_zero_the_gradient_has_the_same_norm(pretrain: Call, tmp_path: Path) -> None:
    """DeepSpeed clips by it and does not keep it."""
    found = []
    for stage in (0, 1):
        run = tmp_path / str(stage)
        words = (f"run.dir={run}", f"parallel.zero_stage={stage}", "run.precision=fp32")
        assert trained_steps(pretrain(*words, "run.eval_every_steps=0"), run) == [1, 2, 3]
        found.append([line["grad_norm"] for line in metrics(run)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert min(found[0]) > 0


def test_nothing_held_out_and_nothing_during_the_run(pretrain: Call, tmp_path: Path) -> None:
    words = ("mix.valid.sources=[]", "run.eval_every_steps=0", "checkpoint.every_steps=0")
    outcome = pretrain(*words, "model.tied_embeddings=true")
    assert trained_steps(outcome, tmp_path / "run") == [1, 2, 3]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["valid_lm_loss"] is None
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert folders == ["step-00000003"]


@pytest.mark.parametrize(("words", "share"), [(ONLY_MODE_1, 0), (ONLY_MODE_2, 1)])
def test_a_single_mode(
    pretrain: Call, tmp_path: Path, words: tuple[str, ...], share: float
) -> None:
    assert trained_steps(pretrain(*words), tmp_path / "run") == [1, 2, 3]
    for line in metrics(tmp_path / "run"):
        assert line["mode2_fraction_realised"] == share
        assert line["mode_auroc"] is None


def test_a_finished_run_is_not_trained_again(pretrain: Call, trained: Trained) -> None:
    before = tree(trained.run / "checkpoints")
    lines = (trained.run / "metrics.jsonl").read_bytes()
    summary = json.loads((trained.run / "summary.json").read_text())
    outcome = pretrain(f"run.dir={trained.run}")
    assert trained_steps(outcome, trained.run) == [1, 2, 3]
    assert tree(trained.run / "checkpoints") == before
    assert (trained.run / "metrics.jsonl").read_bytes() == lines
    assert json.loads((trained.run / "summary.json").read_text()) == summary


def test_a_killed_run_resumes(server: Server, trained: Trained, tmp_path: Path) -> None:
    """Killed without warning, at whatever moment, it takes each step once."""
    run = tmp_path / "run"
    places = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={run}")
    started = server.start(*places, "run.steps=100000", "run.eval_every_steps=0")
    deadline = time.monotonic() + 60
    latest = run / "checkpoints" / "latest"
    while not latest.exists() or latest.read_text() < "step-00000004":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started.process_id, signal.SIGKILL)
    assert started.wait().status == -signal.SIGKILL
    # A crash may tear the last line.
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 99')
    finished = [p.name for p in run.glob("checkpoints/step-*") if p.name[5:].isdecimal()]
    newest = int(max(finished).removeprefix("step-"))
    assert latest.read_text().strip() in finished
    outcome = server.run(*places, f"run.steps={newest + 3}", "run.eval_every_steps=0")
    assert f"resumes at step {newest}" in outcome.out
    assert trained_steps(outcome, run) == list(range(1, newest + 4))


def test_a_longer_run_whose_past_is_unchanged_resumes(pretrain: Call, tmp_path: Path) -> None:
    """The ramp ended with the run; saying so lets it be prolonged. 0.50 is 0.5."""
    ramp = "mix.mode2_fraction={shape: linear, start: 0.25, end: 0.75}"
    assert pretrain(ramp).status == 0
    refused = pretrain(ramp, "run.steps=4")
    assert "mix.mode2_fraction.end_tokens is 512" in refused.err
    fixed = "mix.mode2_fraction={shape: linear, start: 0.250, end: 0.75, end_tokens: 384}"
    longer = pretrain(fixed, "run.steps=4", "mix.mode2.sources.0.weight=1.0")
    assert longer.status == 0, longer.err
    assert "resumes at step 3" in longer.out


def without_reader(trained: Trained, run: Path) -> int:
    """Train as a program whose output nobody reads any more; return its status."""
    pipe = run.parent / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pipe.open("w") as writer:
        os.close(reader)
        places = (f"data.root={trained.data}", f"run.dir={run}")
        done = subprocess.run(
            [sys.executable, str(PRETRAIN), "--config", str(trained.config), *places],
            stdout=writer,
            stderr=writer,
            check=False,
            cwd=ROOT,
            env=variables(),
        )
    return done.returncode


@pytest.mark.parametrize("output", ["no reader", "/dev/full"])
def test_a_run_outlives_what_reads_its_output(
    pretrain: Call, trained: Trained, tmp_path: Path, output: str
) -> None:
    """It takes all steps, writes the report and exits as the table says; the loss is on record."""
    run = tmp_path / "run"
    if output == "no reader":
        assert without_reader(trained, run) == 0
    else:
        assert pretrain(output=output).status == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert (run / "report.html").stat().st_size > 0
    (line,) = (run / "health.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert (event["kind"], event["action"]) == ("output", "drop")
    assert "cannot be written" in event["reason"]


def test_a_run_whose_terminal_hangs_up_saves(
    server: Server, trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    places = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={run}")
    started = server.start(*places, "run.steps=100000", "run.eval_every_steps=0")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(started.process_id, signal.SIGHUP)
    outcome = started.wait()
    assert outcome.status == 75, outcome.err
    assert "(SIGHUP) and saved in" in outcome.out
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{len(metrics(run)):08d}"


def test_a_tilde_in_the_config_is_the_home_folder(
    pretrain: Call, trained: Trained, tmp_path: Path
) -> None:
    words = ("run.dir=~/run", f"data.root=~/{trained.data.name}")
    outcome = pretrain(*words, "run.eval_every_steps=0", HOME=str(trained.data.parent))
    assert trained_steps(outcome, trained.data.parent / "run") == [1, 2, 3]
    assert not (ROOT / "~").exists()
