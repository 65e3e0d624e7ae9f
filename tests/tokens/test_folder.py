"""Check that a preparation appears whole or not at all, whatever the disk or a signal does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare import staging as folder
from megatron_mode.tokens.prepare.staging import WorkFolder
from megatron_mode.tokens.source.shards import Source

RunPrepare = Callable[..., int]
WriteLines = Callable[[Path, list[Any]], Path]


def mount(folder: Path, options: str) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 kB."""
    folder = tmp_path / "small"
    mount(folder, "size=256k")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "fixed"
    mount(folder, "size=256k,ro")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("place", ["data", "."])
@pytest.mark.parametrize("megabytes", [0.1, 2])
def test_a_full_disk(
    small_disk: Path, tmp_path: Path, write_lines: WriteLines, run_prepare: RunPrepare,
    place: str, megabytes: float,
) -> None:  # fmt: skip
    text = "It is a way I have of driving off the spleen. " * 100
    count = int(megabytes * 1e6 / len(text))
    lines = [{"text": f"{i} {text}", "source": "books"} for i in range(count)]
    path = write_lines(tmp_path / "in.jsonl", lines)
    if megabytes < 1:
        run_prepare("--out", small_disk / place, "--input", path)
        assert Source.open(small_disk / place, "books").documents == len(lines)
        return
    with pytest.raises(DataError, match=r"cannot be written \(No space left.*free space"):
        run_prepare("--out", small_disk / place, "--input", path)
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("place", ["data", ".", "a/b"])
def test_a_read_only_disk(
    read_only_disk: Path, corpus: list[Path], run_prepare: RunPrepare, place: str
) -> None:
    with pytest.raises(DataError, match=r"cannot be written \(Read-only file system"):
        run_prepare("--out", read_only_disk / place, "--input", *corpus)


def test_a_mounted_target_is_replaced(
    small_disk: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    run_prepare("--out", small_disk, "--input", *corpus)
    run_prepare("--out", small_disk, "--input", corpus[0])
    assert {path.stem for path in small_disk.glob("*.idx")} == {"books"}
    assert not [path for path in small_disk.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("renames", [1, 3, 5])
def test_a_mounted_target_survives_a_stop_among_its_renames(
    small_disk: Path,
    corpus: list[Path],
    run_prepare: RunPrepare,
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    """Stopped while it fills the mount point, the same command ends with every file in place."""
    rename, done = os.rename, []

    def stopping(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise SystemExit(143)
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", stopping)
    with pytest.raises(SystemExit):
        run_prepare("--out", small_disk, "--input", corpus[0])
    monkeypatch.undo()
    run_prepare("--out", small_disk, "--input", corpus[0])
    names = {path.stem for path in small_disk.glob("*.idx")}
    assert names == {"books"}
    for name in names:
        assert Source.open(small_disk, name).document(0)[2]
    assert not [path for path in small_disk.iterdir() if path.name.startswith(".")]


def test_marks_go_before_what_they_mark(
    tmp_path: Path,
    corpus: list[Path],
    run_prepare: RunPrepare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run killed while it clears up must not leave a mark beside missing units."""
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watching(path: Path, **more: bool) -> None:
        if Path(path).name.endswith(".preparing"):
            seen.append([file.name for file in Path(path).glob("*.json")])
        remove(path, **more)

    monkeypatch.setattr(folder.shutil, "rmtree", watching)
    run_prepare("--out", tmp_path / "out", "--input", *corpus)
    assert seen == [[]]


def test_what_a_killed_pack_left_is_no_obstacle(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "out"
    run_prepare("--out", out, "--input", *corpus)
    for name in (".chat.rows.64.bin.first", ".chat.rows.64.bin.partial", ".chat.json.partial"):
        (out / name).write_text("half")
    run_prepare("--out", out, "--input", *corpus)
    assert not [path for path in out.iterdir() if path.name.endswith(("first", "partial"))]


def test_failure_keeps_the_former_target(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "out" / "d"
    run_prepare("--out", out, "--input", *corpus)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with corpus[1].open("ab") as stream:
        stream.write(b"\x1f\x8b cut")
    with pytest.raises(DataError, match="damaged or cut off"):
        run_prepare("--out", out, "--input", *corpus)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run_prepare("--out", out, "--input", corpus[0])
    assert {path.stem for path in out.glob("*.idx")} == {"books"}
    assert [path.name for path in out.parent.iterdir()] == ["d"]


def test_what_others_wrote_is_never_replaced(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    for name in ("notes.txt", "web.bin", "web.idx", "web.json"):
        out = tmp_path / f"with-{name}"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(DataError, match=f"holds {name}"):
            run_prepare("--out", out, "--input", *corpus)
        assert [path.name for path in out.iterdir()] == [name]
    with pytest.raises(DataError, match="is a file"):
        run_prepare("--out", corpus[0], "--input", *corpus)


def test_an_empty_folder_is_taken_and_permissions_are_ordinary(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "d"
    out.mkdir()
    ordinary = out.stat().st_mode
    run_prepare("--out", out, "--input", corpus[0])
    assert out.stat().st_mode == ordinary


def test_parents_made_for_a_failure_go_again(tmp_path: Path, run_prepare: RunPrepare) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        run_prepare("--out", tmp_path / "a" / "b" / "c", "--input", tmp_path / "none.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_living_run_beside_is_left_alone(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "d") as first:
        first.begin({"seed": 1})
        with pytest.raises(DataError, match="being prepared by another run"):
            WorkFolder(tmp_path / "d").__enter__()
        assert (first.path / "plan.json").exists()
        with WorkFolder(tmp_path / "d", "-0-of-2") as shard:
            assert shard.path.exists()
    assert list(tmp_path.iterdir()) == []


def test_another_plan_starts_anew(tmp_path: Path) -> None:
    for seed, continues in ((1, False), (1, True), (2, False)):
        with WorkFolder(tmp_path / "d") as work:
            assert work.begin({"seed": seed}) is continues
            assert (work.path / "units").exists() is continues
            (work.path / "units").mkdir(exist_ok=True)
            work.stays = True


PROGRAM = """
import sys
import megatron_mode.tokens.prepare.units as units
from megatron_mode.__main__ import main
if __name__ == "__main__":
    units.UNIT_BYTES = 1 << 20
    sys.exit(main())
"""


def started_run(tmp_path: Path, model_path: Path, path: Path) -> subprocess.Popen[str]:
    """Start a preparation that would take long, and wait until it has finished a unit."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = tmp_path / "data" / "d"
    command = [sys.executable, program, "prepare", "--out", out, "--input", path, "--workers", "2"]
    # A shell that starts a command in the background lets it ignore SIGINT; this one listens.
    process = subprocess.Popen(
        [*command, "--tokenizer", model_path],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out.parent / ".d.preparing/units/unit-000000.npz").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def children(process: subprocess.Popen[str]) -> list[int]:
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in listing.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_killed_run_leaves_nothing_half_written_and_is_continued(
    tmp_path: Path, model_path: Path, write_lines: WriteLines, run_prepare: RunPrepare,
    number: signal.Signals, status: int,
) -> None:  # fmt: skip
    lines = [{"text": f"{i} " + "sea " * 2500, "source": "books"} for i in range(4000)]
    path = write_lines(tmp_path / "a.jsonl.gz", lines)
    process = started_run(tmp_path, model_path, path)
    workers = children(process)
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_running(pid)]
    parent = tmp_path / "data"
    assert [child.name for child in parent.iterdir()] == [".d.preparing"]
    if number is not signal.SIGKILL:
        assert said.startswith(f"stopped: what is finished stays beside {parent / 'd'}; the same")
        assert len(said.splitlines()) == 1
    first_unit = parent / ".d.preparing/units/unit-000000.npz"
    before = first_unit.stat().st_mtime_ns
    process = started_run(tmp_path, model_path, path)
    assert first_unit.stat().st_mtime_ns == before
    process.kill()
    process.communicate()
    # Another plan starts anew, and leaves nothing of the first.
    other = write_lines(tmp_path / "b.jsonl", lines[:9])
    run_prepare("--out", parent / "d", "--input", other)
    assert [child.name for child in parent.iterdir()] == ["d"]
    assert Source.open(parent / "d", "books").documents == 9
