"""Whatever a kill leaves: `latest` names a whole checkpoint or is gone, and one is always left."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest

from megatron_mode import atomic
from megatron_mode.checkpoint.folders import (
    candidates,
    clear_unfinished,
    current_checkpoint,
    finished_checkpoints,
    forget_after,
    prune,
    publish,
    remove,
    set_aside,
    tag_of,
)
from megatron_mode.errors import CheckpointError

CONTENT = "whole"


class KilledError(Exception):
    """Stand for kill -9: nothing of the program runs after it."""


@pytest.fixture
def checkpoints(tmp_path):
    """Make a run that has saved steps 2, 4 and 6."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 4, 6):
        publish(written(folder, step))
    return folder


def written(checkpoints, step, content=CONTENT):
    """Write a checkpoint that is not yet published."""
    partial = checkpoints / f"{tag_of(step)}.partial"
    partial.mkdir()
    for name in ("a", "b"):
        (partial / name).write_text(content)
    return partial


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_whole(folder):
    return names(folder) == ["a", "b"] and all((folder / n).read_text() == CONTENT for n in "ab")


def kill_at(monkeypatch, number):
    """Make the `number`-th change of the file system the last thing that is not done."""
    left = [number]

    def counted(real):
        def change(*args, **kwargs):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return real(*args, **kwargs)

        return change

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    # rmtree(ignore_errors=True) would swallow the kill, but only after OSError.
    return left


def every_kill(monkeypatch, checkpoints, act):
    """Run `act` again and again from the same state, killed one change later each time."""
    number = 0
    start = checkpoints.with_name("start")
    shutil.copytree(checkpoints, start)
    while True:
        with monkeypatch.context() as patch:
            left = kill_at(patch, number)
            try:
                act()
                done = left[0] > 0
            except KilledError:
                done = False
        yield number
        if done:
            return
        shutil.rmtree(checkpoints)
        shutil.copytree(start, checkpoints)
        number += 1
        assert number < 200


def test_a_kill_while_publishing_and_pruning_leaves_a_good_checkpoint(checkpoints, monkeypatch):
    written(checkpoints, 8)
    before = current_checkpoint(checkpoints)

    def act():
        prune(publish(checkpoints / f"{tag_of(8)}.partial"), 2, 0)

    seen = set()
    for _ in every_kill(monkeypatch, checkpoints, act):
        newest = current_checkpoint(checkpoints)  # raises where latest names none that is there
        assert newest in (before, checkpoints / tag_of(8))
        assert is_whole(newest)
        assert all(is_whole(folder) for folder in finished_checkpoints(checkpoints))
        latest = checkpoints / (checkpoints / "latest").read_text().strip()
        assert is_whole(latest)
        seen.add((newest.name, latest.name))
        clear_unfinished(checkpoints)
        assert current_checkpoint(checkpoints) == newest
    assert (tag_of(8), tag_of(6)) in seen, "a kill between both is among them"
    assert names(checkpoints) == ["latest", tag_of(6), tag_of(8)]


def test_a_kill_while_one_is_replaced_leaves_a_good_checkpoint(checkpoints, monkeypatch):
    """After a roll-back the same step is written again."""
    shutil.rmtree(checkpoints / tag_of(6))
    publish(written(checkpoints, 6, "of the first time"))
    written(checkpoints, 6)

    for _ in every_kill(
        monkeypatch, checkpoints, lambda: publish(checkpoints / f"{tag_of(6)}.partial")
    ):
        newest = current_checkpoint(checkpoints)
        assert newest.name in (tag_of(4), tag_of(6))
        assert len({(newest / name).read_text() for name in ("a", "b")}) == 1
    assert is_whole(checkpoints / tag_of(6))


def test_a_kill_while_setting_aside_loses_nothing(checkpoints, monkeypatch):
    four, six = checkpoints / tag_of(4), checkpoints / tag_of(6)
    for _ in every_kill(monkeypatch, checkpoints, lambda: set_aside(four, {six: ".damaged"})):
        assert current_checkpoint(checkpoints) in (four, six)
        kept = [six, six.with_name(f"{six.name}.damaged")]
        assert sum(path.is_dir() and is_whole(path) for path in kept) == 1
    assert current_checkpoint(checkpoints) == four


def test_a_kill_while_publishing_is_no_edit_and_an_edit_is_no_kill(checkpoints, monkeypatch):
    """After a kill the finished checkpoint counts; a person who names an older one is obeyed."""
    written(checkpoints, 8)
    partial, folder = checkpoints / f"{tag_of(8)}.partial", checkpoints / tag_of(8)
    for _ in every_kill(monkeypatch, checkpoints, lambda: publish(partial)):
        finished = folder.is_dir()
        edited = shutil.copytree(checkpoints, checkpoints.with_name("edited"))
        (edited / "latest").write_text(tag_of(2))  # as DeepSpeed writes it, without a newline
        assert candidates(edited, None) == [edited / tag_of(2)]
        assert (edited / tag_of(6)).is_dir(), "the newer ones stay"
        shutil.rmtree(edited)
        assert candidates(checkpoints, None)[0] == (folder if finished else checkpoints / tag_of(6))
        assert (checkpoints / "latest").read_text() == f"{tag_of(8 if finished else 6)}\n"
        assert not (checkpoints / "publishing").exists()


def test_a_kill_while_going_back_leaves_a_good_checkpoint(checkpoints, monkeypatch):
    """What holds a step that is to be left out goes, the newest first."""
    forget_after(checkpoints, 1)
    forget_after(checkpoints, 6)
    assert len(finished_checkpoints(checkpoints)) == 3
    for _ in every_kill(monkeypatch, checkpoints, lambda: forget_after(checkpoints, 3)):
        assert is_whole(current_checkpoint(checkpoints))
        left = [path.name for path in finished_checkpoints(checkpoints)]
        assert left == [tag_of(2), tag_of(4), tag_of(6)][: len(left)]
    assert names(checkpoints) == ["latest", tag_of(2)]
    assert current_checkpoint(checkpoints) == checkpoints / tag_of(2)


def test_permanent_checkpoints_stay(tmp_path):
    for step in range(1, 13):
        prune(publish(written(tmp_path, step)), 2, 5)
    assert names(tmp_path) == ["latest", *map(tag_of, (5, 10, 11, 12))]


def test_the_only_checkpoint_stays(tmp_path):
    third = publish(written(tmp_path, 3))
    aside = [
        set_aside(third, {publish(written(tmp_path, 5)): ".damaged"})[tmp_path / tag_of(5)]
        for _ in range(2)
    ]
    assert aside == [f"{tag_of(5)}.damaged", f"{tag_of(5)}.damaged-2"], "what was kept is kept"
    prune(third, 1, 0)
    assert current_checkpoint(tmp_path) == third


def test_the_one_just_published_stays_whatever_lies_beside_it(tmp_path):
    shutil.copytree(publish(written(tmp_path, 3)), tmp_path / tag_of(99))
    published = publish(written(tmp_path, 4))
    prune(published, 1, 0)
    assert finished_checkpoints(tmp_path) == [published, tmp_path / tag_of(99)]


def test_what_was_set_aside_alone_is_no_beginning(tmp_path):
    publish(written(tmp_path, 5)).rename(tmp_path / f"{tag_of(5)}.damaged")
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"but step-00000005\.damaged, which was set aside"):
        candidates(tmp_path, None)
    publish(written(tmp_path, 3))
    (tmp_path / f"{tag_of(7)}.partial").touch()
    assert candidates(tmp_path, None) == [tmp_path / tag_of(3)]
    assert candidates(tmp_path, 2) == []
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("named", ["step-00000009\n", "step-0000000", "", "\xff", "a/b\n"])
def test_a_latest_that_names_nothing_is_refused(checkpoints, named):
    (checkpoints / "latest").write_text(named)
    with pytest.raises(CheckpointError, match=r"latest names .*, step-00000006; correct it, or"):
        current_checkpoint(checkpoints)


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(checkpoints):
    for folder in finished_checkpoints(checkpoints):
        remove(folder)
    with pytest.raises(CheckpointError, match="none, for there is none; correct"):
        current_checkpoint(checkpoints)


def test_a_small_file_is_the_old_or_the_new(tmp_path, monkeypatch):
    seen = []
    for number in range(3):
        path = atomic.write_whole(tmp_path / "latest", "old")
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with contextlib.suppress(KilledError):
                atomic.write_whole(path, "new")
        seen.append(path.read_text())
    assert seen == ["old", "new", "new"]
