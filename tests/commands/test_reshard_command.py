"""`megatron-mode reshard` makes a sound folder or says in one sentence why it does not."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import context
from killed_reshard import killed_reshard
from spoilt_checkpoints import Bomb, seal
from tiny_run import Outcome, Trained, refusal, tree

pytestmark = pytest.mark.usefixtures("alone")  # rewriting joins a group of one and never leaves
Call = Callable[..., Outcome]

TAG, SHARD = "step-00000003", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
UNIVERSAL = f"{TAG}-universal"


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """Copy the small run's checkpoints."""
    shutil.copytree(trained.run / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def test_a_checkpoint_is_rewritten_once(verb: Call, run: Path) -> None:
    checkpoints = run / "checkpoints"
    before = tree(checkpoints / TAG)
    first = verb("reshard", run, "--to", "pipeline=2,data=2", "--json")
    assert first.status == 0, first.err
    told = json.loads(first.out)
    folder = checkpoints / UNIVERSAL
    sizes = [path.stat().st_size for path in folder.rglob("*.pt")]
    assert told["folder"] == str(folder)
    assert (told["step"], told["reused"]) == (3, False)
    assert told["bytes"] == sum(sizes)
    assert told["parameters"] == 2 * 6 + 5
    assert tree(checkpoints / TAG) == before
    made = tree(folder)
    second = verb("reshard", run / "checkpoints" / TAG)
    assert (second.status, tree(folder)) == (0, made)
    assert "is there already" in second.out
    assert not list(checkpoints.glob("*.partial"))
    older = verb("reshard", run, "--step", "2", "--threads", "1")
    assert older.status == 0
    assert (checkpoints / "step-00000002-universal").is_dir()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{run}", "--to", "tenser=2"], "--to is 'tenser=2': name tensor, pipeline, data"),
        (["{run}", "--to", "tensor=0"], "each with a size of 1 or more"),
        (["{run}", "--to", "tensor=²"], "each with a size of 1 or more"),
        (["{run}", "--to", ""], "--to is '': name tensor"),
        (["{run}", "--to", "tensor=1,tensor=2"], "tensor is there twice"),
        (["{run}", "--to", "tensor=2"], "--to cannot hold the model of {run}/checkpoints/"),
        (["{run}", "--to", "tensor=2"], "parallel.tensor is 2; accepted: a divisor of"),
        (["{run}", "--to", "pipeline=3"], "parallel.pipeline is 3; accepted: at most"),
        (["{run}", "--to", "data=3"], "world size is 3; accepted:"),
        (["{run}", "--step", "9"], "--step is 9, which is no finished checkpoint of {run}/check"),
        (["{run}", "--step", "9"], ": it may name step-00000002, step-00000003; correct it"),
        (["{run}", "--step", "0"], "--step: the value is '0'"),
        (["{run}", "--threads", "-1"], "--threads: the value is '-1'"),
        ([], "required: RUN"),
    ],
)
def test_bad_input_is_one_sentence(verb: Call, run: Path, words: list[str], fragment: str) -> None:
    sentence = refusal(verb("reshard", *(word.format(run=run) for word in words)))
    assert fragment.format(run=run) in sentence
    assert not list((run / "checkpoints").glob("*universal*"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_left(verb: Call, run: Path) -> None:
    checkpoint = run / "checkpoints" / TAG
    flip_byte(checkpoint / SHARD)
    sentence = refusal(verb("reshard", run))
    assert f"{TAG} is damaged: {SHARD} has SHA-256 " in sentence
    (checkpoint / SHARD).unlink()
    assert f"{TAG} is damaged: {SHARD} is missing" in refusal(verb("reshard", run))
    assert not list((run / "checkpoints").glob("*universal*"))


def test_a_file_that_would_run_code_is_refused_by_name(
    verb: Call, run: Path, tmp_path: Path
) -> None:
    checkpoint, mark = run / "checkpoints" / TAG, tmp_path / "mark"
    torch.save({"optimizer_state_dict": Bomb(mark)}, checkpoint / SHARD, pickle_module=pickle)
    seal(checkpoint)
    sentence = refusal(verb("reshard", run))
    assert f"{checkpoint / SHARD} is refused: it holds more than tensors" in sentence
    assert not mark.exists()
    assert not list((run / "checkpoints").glob("*universal*"))


def test_a_checkpoint_without_names_is_refused(verb: Call, run: Path) -> None:
    """DeepSpeed saves none without ZeRO: moments then stand in the order of one layout."""
    checkpoint, name = run / "checkpoints" / TAG, "mp_rank_00_model_states.pt"
    state = torch.load(checkpoint / name, weights_only=True)
    torch.save({**state, "param_shapes": None}, checkpoint / name)
    seal(checkpoint)
    sentence = refusal(verb("reshard", run))
    assert f"{checkpoint / name} does not name its parameters: parallel.zero_stage 0" in sentence


def test_what_stands_in_the_way_is_named(verb: Call, run: Path) -> None:
    folder = run / "checkpoints" / UNIVERSAL
    folder.mkdir()
    assert f"{folder} is there already and is not intact" in refusal(verb("reshard", run))
    folder.rmdir()
    assert verb("reshard", run).status == 0
    flip_byte(folder / "zero/1.layer.mlp.linear_fc1.weight/exp_avg.pt")
    assert "linear_fc1.weight/exp_avg.pt has SHA-256" in refusal(verb("reshard", run))
    seal(run / "checkpoints" / TAG)  # the same step, another checkpoint
    assert "it was not made from this checkpoint" in refusal(verb("reshard", run))


def test_a_full_disk_is_told_and_leaves_nothing(
    verb: Call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mode.checkpoint.reshard import universal

    save, written = universal.save_tensors, []

    def filling(state: object, path: Path) -> object:
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        return save(state, path)

    monkeypatch.setattr(universal, "save_tensors", filling)
    sentence = refusal(verb("reshard", run, "--json"))
    assert f"{UNIVERSAL} cannot be written (No space left on device): the disk has" in sentence
    assert not list((run / "checkpoints").glob("*universal*"))


def test_a_kill_at_any_file_leaves_nothing_that_counts(verb: Call, run: Path) -> None:
    checkpoints = run / "checkpoints"
    before = {name: data for name, data in tree(checkpoints).items() if name.startswith("step")}
    saves = 1 + 4 * (2 * 6 + 5)
    points = (0, 1, 2, 23, saves - 1, saves)  # the last kill comes when only the name is missing
    process = context().Process(target=killed_reshard, args=(run, points, run / "found.json"))
    process.start()
    process.join()
    assert json.loads((run / "found.json").read_text()) == [[9, []]] * len(points)
    assert verb("reshard", run).status == 0
    after = {name: data for name, data in tree(checkpoints).items() if "universal" not in name}
    assert {name: data for name, data in after.items() if name.startswith("step")} == before
    assert not list(checkpoints.glob("*.partial"))
