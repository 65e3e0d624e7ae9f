"""A run that cannot continue, or may not resume, says so in one sentence and changes nothing."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_pretrain import Server
from tiny_run import Outcome, Trained, refusal, tree

from megatron_mode.checkpoint.resumable import refuse, setting_differences
from megatron_mode.errors import CheckpointError

Call = Callable[..., Outcome]


def last_line(outcome: Outcome) -> str:
    """Return the sentence of a run that was refused after it had begun to print."""
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    *_, line = outcome.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_resuming_another_run_names_every_differing_key(
    pretrain: Call, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    before = tree(run)
    changes = {
        "model.ffn_hidden_size": "64",
        "run.seed": "7",
        "mix.mode2_fraction.start": "0.25",
        "loss.mode_weight": "0.3",
        "optimizer.learning_rate": "0.5",
    }
    sentence = refusal(pretrain(*(f"{key}={value}" for key, value in changes.items())))
    assert "the checkpoint at step 3 belongs to another run" in sentence
    for key in changes:
        assert f"{key} is " in sentence
    assert tree(run) == before


def test_a_refusal_stays_short() -> None:
    """Digests of files are not printed, and of many differences only the first."""
    manifest: Any = SimpleNamespace(step=3, order={"files": {"chat.bin": 64 * "a"}})
    expected = {"files": "files is not that of the checkpoint (chat.bin)"}
    assert setting_differences(manifest, {}) == expected
    refuse(manifest, [])
    with pytest.raises(CheckpointError, match=r"k6; k7; and 3 more -- restore these") as caught:
        refuse(manifest, [f"k{number}" for number in range(11)])
    assert "k8" not in str(caught.value)


def test_resuming_with_other_data_is_refused(
    pretrain: Call, verb: Call, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    before = tree(run)
    words = ("--out", tmp_path / "other", "--input", trained.input, "--valid-share", "0.3")
    again = verb("prepare", *words, "--tokenizer", trained.data / "tokenizer.model", "--seed", "5")
    assert again.status == 0
    sentence = refusal(pretrain(f"data.root={tmp_path / 'other'}"))
    assert "mix.mode1.sources.books.content is " in sentence
    assert tree(run) == before


def test_resuming_a_damaged_checkpoint_is_refused(
    pretrain: Call, trained: Trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    for path in (run / "checkpoints" / "step-00000003").glob("zero_*"):
        path.write_bytes(path.read_bytes()[:1000])
    before = tree(run)
    sentence = refusal(pretrain())
    assert f"{run / 'checkpoints' / 'step-00000003'} is damaged: zero_pp_rank_0" in sentence
    assert tree(run) == before
    outcome = pretrain("checkpoint.fallback=true")  # as the sentence advises
    assert outcome.status == 0
    assert "WARNING: step-00000003 was set aside as step-00000003.damaged" in outcome.out
    assert "resumes at step 2" in outcome.out
    assert (run / "checkpoints" / "step-00000003.damaged").is_dir()


def fill(path: Path) -> None:
    """Write until the disk is full to the last byte."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as rest:
        while True:
            rest.write(b"x" * 512)


def test_a_disk_that_fills_while_training(pretrain: Call, small_disk: Path) -> None:
    run = small_disk / "run"
    sentence = last_line(pretrain(f"run.dir={run}"))
    assert f"{run / 'checkpoints' / 'step-00000002'} cannot be written" in sentence
    assert list((run / "checkpoints").glob("step-*")) == []
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[:2] == [1, 2]  # the failed write is seen after this step or the next
    # No room for a line of metrics either.
    fill(small_disk / "rest")
    assert str(run) in last_line(pretrain(f"run.dir={run}"))


def test_peers_leave_with_the_status_of_the_first_that_failed(
    server: Server, trained: Trained, tmp_path: Path
) -> None:
    """A policy of health is 3 on all ranks, also those that were torn out of a collective."""
    words = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={tmp_path / 'r'}")
    outcomes = server.run_world(2, *words, "optimizer.learning_rate=1e30", "run.steps=9")
    assert [outcome.status for outcome in outcomes] == [3, 3], outcomes
    assert "".join(outcome.err for outcome in outcomes).count("error: ") == 1


def test_two_ranks_say_it_once(
    server: Server, trained: Trained, tmp_path: Path, small_disk: Path
) -> None:
    """The disk of the run is full when both ranks save: one sentence, both leave with 2."""
    words = ("--config", trained.config, f"data.root={trained.data}", f"run.dir={small_disk / 'r'}")
    outcomes = server.run_world(2, *words)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    said = "".join(outcome.err for outcome in outcomes)
    assert said.count("error: ") == 1
    assert "cannot be written" in said
    assert "Traceback" not in said
    events = (small_disk / "r/health.jsonl").read_text().splitlines()
    assert [json.loads(event)["kind"] for event in events] == ["checkpoint"], "written once"
