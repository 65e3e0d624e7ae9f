"""Going on without a checkpoint that cannot be taken loses nothing that can."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_pretrain import Server
from run_files import metrics
from spoilt_checkpoints import seal
from tiny_run import Outcome, Trained, checkpoint, refusal, tree

from megatron_mode.checkpoint import lock

Call = Callable[..., Outcome]
LAYER = "layer_01-model_00-model_states.pt"
STEPS = (2, 3)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """Copy the small run, with its checkpoints of steps 2 and 3."""
    return shutil.copytree(trained.run, tmp_path / "run")


def cut(run: Path, step: int) -> None:
    path = checkpoint(run, step) / LAYER
    path.write_bytes(path.read_bytes()[:-1])


def last_line(outcome: Outcome) -> str:
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    *_, line = outcome.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_nothing_is_set_aside_while_none_is_sound(pretrain: Call, run: Path) -> None:
    """Nor does the start after that begin anew."""
    for step in STEPS:
        cut(run, step)
    before = tree(run)
    for _ in range(2):
        sentence = refusal(pretrain("checkpoint.fallback=true"))
        assert f"no checkpoint of {run} is intact" in sentence
        assert LAYER in sentence
        assert tree(run) == before


def test_the_way_out_of_a_damaged_manifest_is_named_and_works(pretrain: Call, run: Path) -> None:
    path = checkpoint(run, 3) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    sentence = refusal(pretrain())
    assert (
        "is not the one in manifest.json.sha256; mend that, or set checkpoint.fallback" in sentence
    )
    outcome = pretrain("checkpoint.fallback=true")
    assert outcome.status == 0, outcome
    assert "; step-00000002 is taken instead" in outcome.out
    (event,) = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    assert (event["kind"], event["action"]) == ("checkpoint", "fallback")


def test_latest_decides_and_newer_checkpoints_are_kept(pretrain: Call, run: Path) -> None:
    """Without a newline at the end too; the steps that follow are those of before."""
    before, newer = metrics(run), tree(checkpoint(run, 3))
    (run / "checkpoints/latest").write_text("step-00000002")
    outcome = pretrain()
    assert outcome.status == 0, outcome
    assert "resumes at step 2" in outcome.out
    assert "note: step-00000003 is newer than step-00000002, which this run was" in outcome.out
    assert tree(run / "checkpoints/step-00000003.aside") == newer
    assert (run / "checkpoints/latest").read_text() == "step-00000003\n"
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in before]
    assert tree(checkpoint(run, 3)).keys() == newer.keys()


def test_the_config_goes_back_once(pretrain: Call, run: Path) -> None:
    """A start after the first save does not go back again; a name that is not there is refused."""
    back = "run.resume_from=step-2"
    refused = refusal(pretrain("run.resume_from=step-7"))
    assert "run.resume_from is step-7, which is no finished checkpoint of" in refused
    assert "it may name step-00000002, step-00000003; correct it" in refused
    assert "resumes at step 2" in pretrain(back).out
    assert (run / "checkpoints/step-00000003.aside").is_dir()
    assert "resumes at step 3" in pretrain(back).out
    assert not (run / "checkpoints/step-00000003.aside-2").exists()


def test_a_longer_run_says_which_key_keeps_its_plan(pretrain: Call) -> None:
    """A fraction that rises to the end of the run rises otherwise in a longer one."""
    rising = "mix.mode2_fraction={shape: linear, start: 0.25, end: 0.5}"
    assert pretrain(rising).status == 0
    sentence = refusal(pretrain(rising, "run.steps=4"))
    assert "end_tokens follows run.steps where it is not given: set it to 384 to keep" in sentence
    assert pretrain(rising, "run.steps=4", "mix.mode2_fraction.end_tokens=384").status == 0


def test_another_version_is_no_damage(pretrain: Call, run: Path) -> None:
    seal(checkpoint(run, 3), lambda manifest: manifest.update(format=3))
    before = tree(run)
    sentence = refusal(pretrain("checkpoint.fallback=true"))
    assert "is not a manifest of format 2: it was written by another version" in sentence
    assert tree(run) == before


def test_a_checkpoint_under_the_name_of_another_step_is_refused(pretrain: Call, run: Path) -> None:
    """Else older ones would seem newer, and the run would delete what it writes."""
    shutil.copytree(checkpoint(run, 2), checkpoint(run, 10))
    (run / "checkpoints/latest").write_text("step-00000010\n")
    sentence = refusal(pretrain("run.steps=4", "optimizer.schedule=constant"))
    assert f"{checkpoint(run, 10)} holds the checkpoint of step 2" in sentence


def test_a_rollback_keeps_the_newer_until_the_older_is_loaded(pretrain: Call, run: Path) -> None:
    seal(checkpoint(run, 3), lambda manifest: manifest.update(recent_losses=[0.1, 0.1]))
    words = ("run.steps=5", "health.spike=rollback", "health.spike_window_steps=2")
    words = (*words, "health.rollback_steps=2")
    sound = tree(checkpoint(run, 3))
    spoilt = shutil.copytree(run, run.with_name("spoilt"))
    cut(spoilt, 2)
    sentence = last_line(pretrain(*words, f"run.dir={spoilt}"))
    assert f"{checkpoint(spoilt, 2)} is damaged" in sentence
    assert tree(checkpoint(spoilt, 3)) == sound
    outcome = pretrain(*words)
    assert outcome.status == 0, outcome
    assert "back to step 2, to leave out the updates of 2 3" in outcome.err
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5]


def test_what_a_rollback_passes_over_is_said_and_written_down(pretrain: Call, run: Path) -> None:
    """The newest that is old enough is damaged; the one before it is taken."""
    words = ("run.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=4")
    assert pretrain(*words, f"run.dir={run}").status == 0
    seal(checkpoint(run, 4), lambda manifest: manifest.update(recent_losses=[0.1, 0.1]))
    cut(run, 3)
    words = ("run.steps=6", "health.spike=rollback", "health.spike_window_steps=2")
    words = (*words, "health.rollback_steps=2", "checkpoint.fallback=true")
    outcome = pretrain(*words)
    assert outcome.status == 0, outcome
    warning = "WARNING: step-00000003 was set aside as step-00000003.damaged: "
    assert warning in outcome.err
    events = [json.loads(line) for line in (run / "health.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["action"]) for e in events] == [
        ("loss_spike", "rollback"),
        ("checkpoint", "fallback"),
    ]
    assert events[1]["reason"].startswith(warning)


def test_a_run_stopped_for_lack_of_an_older_checkpoint_says_what_works(
    pretrain: Call, run: Path
) -> None:
    """Its own advice is taken, and the run ends."""
    seal(checkpoint(run, 3), lambda manifest: manifest.update(recent_losses=[0.1, 0.1]))
    shutil.rmtree(checkpoint(run, 2))
    words = ("run.steps=5", "health.spike=rollback", "health.spike_window_steps=2")
    stopped = pretrain(*words, "health.rollback_steps=2")
    assert stopped.status == 3, stopped
    assert f"delete {run}/checkpoints, set health.leave_out_steps=[2,3] and" in stopped.err
    shutil.rmtree(run / "checkpoints")
    again = pretrain("run.steps=5", "health.leave_out_steps=[2,3]")
    assert again.status == 0, again
    left_out = [line["step"] for line in metrics(run) if line.get("update_left_out")]
    assert left_out == [3, 4]


def test_a_checkpoint_without_an_update_resumes_elsewhere(
    pretrain: Call, verb: Call, server: Server, trained: Trained, tmp_path: Path, alone: None
) -> None:
    """The optimizer has no moments yet, and none are made up."""
    words = ("run.steps=2", "health.leave_out_steps=[0,1]", "run.eval_every_steps=0")
    assert pretrain(*words).status == 0
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(run, other)
    assert verb("reshard", other).status == 0
    words = ("run.steps=4", *words[1:])
    assert pretrain(*words).status == 0
    places = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={other}")
    outcomes = server.run_world(2, *places, *words)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    one, two = metrics(run), metrics(other)
    assert [line["loss"] for line in one[:2]] == [line["loss"] for line in two[:2]]
    for line, expected in zip(two[2:], one[2:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_what_is_in_use_is_not_touched(
    pretrain: Call, verb: Call, run: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    before = tree(run)
    with lock.held(run / "checkpoints", "process 7 on a", 0.3):
        sentence = refusal(verb("reshard", run))
        assert f"{run / 'checkpoints'} is in use by process 7 on a: only one" in sentence
    assert tree(run) == {**before, "checkpoints/.lock": b""}
    assert verb("reshard", run).status == 0


def test_a_lock_that_another_user_holds_back_is_no_free_one(
    verb: Call, run: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *arguments: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(lock.os, "open", denied)
    sentence = refusal(verb("reshard", run))
    assert f"{run / 'checkpoints/.lock'} cannot be used (Permission denied)" in sentence


def test_what_stands_in_the_way_is_told_by_all_ranks(
    server: Server, trained: Trained, tmp_path: Path
) -> None:
    """Only rank 0 looks; the others need not be torn out of a collective."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/checkpoints").touch()
    places = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={tmp_path / 'r'}")
    outcomes = server.run_world(2, *places)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    assert "".join(outcome.err for outcome in outcomes).count("error: ") == 1


def test_a_second_run_of_a_folder_is_refused(
    server: Server, trained: Trained, tmp_path: Path
) -> None:
    """It would clear away what the first one writes; the first one ends as if alone."""
    places = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={tmp_path / 'r'}")
    words = (*places, "run.eval_every_steps=0", "checkpoint.every_steps=1", "checkpoint.keep=1")
    with lock.held(made(tmp_path / "r" / "checkpoints"), "process 7 on a", 0.3):
        outcomes = server.run_world(2, *words)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    said = "".join(outcome.err for outcome in outcomes)
    assert said.count("error: ") == 1
    assert "is in use by process 7 on a: " in said
    assert not (tmp_path / "r/metrics.jsonl").exists()
    assert [one.status for one in server.run_world(2, *words)] == [0, 0]


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
