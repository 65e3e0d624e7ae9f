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
    finished_checkpoints,
    forget_after,
    newest_checkpoint,
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
    before = newest_checkpoint(checkpoints)

    def act():
        prune(publish(checkpoints / f"{tag_of(8)}.partial"), 2, 0)

    seen = set()
    for _ in every_kill(monkeypatch, checkpoints, act):
        newest = newest_checkpoint(checkpoints)  # raises where latest names none that is there
        assert newest in (before, checkpoints / tag_of(8))
        assert is_whole(newest)
        assert all(is_whole(folder) for folder in finished_checkpoints(checkpoints))
        latest = checkpoints / (checkpoints / "latest").read_text().strip()
        assert is_whole(latest)
        seen.add((newest.name, latest.name))
        clear_unfinished(checkpoints)
        assert newest_checkpoint(checkpoints) == newest
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
        newest = newest_checkpoint(checkpoints)
        assert newest.name in (tag_of(4), tag_of(6))
        assert len({(newest / name).read_text() for name in ("a", "b")}) == 1
    assert is_whole(checkpoints / tag_of(6))


def test_a_kill_while_setting_aside_loses_nothing(checkpoints, monkeypatch):
    for _ in every_kill(monkeypatch, checkpoints, lambda: set_aside(checkpoints / tag_of(6))):
        assert newest_checkpoint(checkpoints).name in (tag_of(4), tag_of(6))
        kept = [checkpoints / tag_of(6), checkpoints / f"{tag_of(6)}.damaged"]
        assert sum(path.is_dir() and is_whole(path) for path in kept) == 1


def test_a_kill_while_going_back_leaves_a_good_checkpoint(checkpoints, monkeypatch):
    """What holds a step that is to be left out goes, the newest first."""
    assert forget_after(checkpoints, 1) is None
    assert forget_after(checkpoints, 6) == checkpoints / tag_of(6)
    assert len(finished_checkpoints(checkpoints)) == 3
    for _ in every_kill(monkeypatch, checkpoints, lambda: forget_after(checkpoints, 3)):
        assert is_whole(newest_checkpoint(checkpoints))
        left = [path.name for path in finished_checkpoints(checkpoints)]
        assert left == [tag_of(2), tag_of(4), tag_of(6)][: len(left)]
    assert names(checkpoints) == ["latest", tag_of(2)]
    assert newest_checkpoint(checkpoints) == checkpoints / tag_of(2)


def test_permanent_checkpoints_stay(tmp_path):
    for step in range(1, 13):
        prune(publish(written(tmp_path, step)), 2, 5)
    assert names(tmp_path) == ["latest", *map(tag_of, (5, 10, 11, 12))]


def test_the_only_checkpoint_stays(tmp_path):
    third = publish(written(tmp_path, 3))
    assert prune(third, 1, 0) == []
    aside = [set_aside(publish(written(tmp_path, 5))).name for _ in range(2)]
    assert aside == [f"{tag_of(5)}.damaged", f"{tag_of(5)}.damaged-2"], "what was kept is kept"
    assert prune(third, 1, 0) == []
    assert newest_checkpoint(tmp_path) == third


def test_the_one_just_published_stays_whatever_lies_beside_it(tmp_path):
    shutil.copytree(publish(written(tmp_path, 3)), tmp_path / tag_of(99))
    published = publish(written(tmp_path, 4))
    assert prune(published, 1, 0) == [tmp_path / tag_of(3)]
    assert published.is_dir()


def test_what_was_set_aside_alone_is_no_beginning(tmp_path):
    set_aside(publish(written(tmp_path, 5)))
    with pytest.raises(CheckpointError, match=r"but step-00000005\.damaged, which was set aside"):
        candidates(tmp_path)
    publish(written(tmp_path, 3))
    (tmp_path / f"{tag_of(7)}.partial").touch()
    assert candidates(tmp_path) == [tmp_path / tag_of(3)]
    assert candidates(tmp_path, 2) == []
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("named", ["step-00000009\n", "step-00000006", "", "\xff", "a/b\n"])
def test_a_latest_that_names_nothing_is_told(checkpoints, named):
    (checkpoints / "latest").write_text(named)
    with pytest.raises(CheckpointError, match=r"latest names .*the newest here is step-00000006"):
        newest_checkpoint(checkpoints)


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(checkpoints):
    for folder in finished_checkpoints(checkpoints):
        remove(folder)
    with pytest.raises(CheckpointError, match="there is none here"):
        newest_checkpoint(checkpoints)


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
