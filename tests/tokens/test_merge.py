"""Check that workers, shards, units and stops leave no trace in the prepared sources."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mode.__main__ import run_verb
from megatron_mode.commands import merge as merge_command
from megatron_mode.errors import ConfigError, DataError
from megatron_mode.tokens.prepare import buckets, encode, units
from megatron_mode.tokens.source.shards import Source

RunPrepare = Callable[..., int]
WriteLines = Callable[[Path, list[Any]], Path]
Dialogue = Callable[..., dict[str, Any]]
OPTIONS = ("--valid-share", "0.2", "--licence", "CC0", "--max-bad-lines", "9")


def run_merge(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    merge_command.add_arguments(parser)
    return merge_command.run(parser.parse_args([*map(str, arguments)]))


def folder_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture
def mixed_inputs(
    tmp_path: Path, write_lines: WriteLines, dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """Write four files of two sources with copies, repeated ids and bad lines among them.

    Each file has four batches of lines.
    """
    monkeypatch.setattr(encode, "BATCH_LINES", 100)
    choose = random.Random(3)
    paths = []
    for file in range(4):
        lines: list[Any] = []
        for index in range(300):
            name = str(choose.randrange(80))
            text = f"{choose.randrange(180)} at sea"
            if index % 3:
                lines.append({"id": name, "source": "books", "text": text})
            else:
                lines.append(dialogue(name, text, "Aye."))
        lines.insert(140, {"text": file})
        (tmp_path / f"part{file}").mkdir()
        paths.append(write_lines(tmp_path / f"part{file}" / "lines.jsonl.gz", lines))
    return paths


@pytest.fixture
def undisturbed(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare
) -> dict[str, bytes]:
    run_prepare("--out", tmp_path / "whole", "--input", *mixed_inputs, *OPTIONS, "--workers", 1)
    return folder_bytes(tmp_path / "whole")


def test_units_and_buckets_leave_no_trace(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare,
    undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "d"
    for unit_bytes, bucket_bytes in ((1, 8_000), (8_000, 1_000)):
        monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(buckets, "BUCKET_BYTES", bucket_bytes)
        run_prepare("--out", out, "--input", *mixed_inputs, *OPTIONS, "--workers", 1)
        assert folder_bytes(out) == undisturbed


def test_workers_leave_no_trace(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare, undisturbed: dict[str, bytes]
) -> None:
    run_prepare("--out", tmp_path / "d", "--input", *mixed_inputs, *OPTIONS, "--workers", 2)
    assert folder_bytes(tmp_path / "d") == undisturbed


@pytest.mark.parametrize("count", [1, 3, 5])
def test_shards_leave_no_trace(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare,
    undisturbed: dict[str, bytes], count: int,
) -> None:  # fmt: skip
    """Three shards share four entire files, five share the lines of all."""
    out = tmp_path / "d"
    for index in reversed(range(count)):
        run_prepare("--out", out, "--input", *mixed_inputs, *OPTIONS, "--shard", f"{index}/{count}")
    assert not out.exists()
    run_merge("--out", out)
    assert folder_bytes(out) == undisturbed
    assert not list(tmp_path.glob(".*"))


def test_the_inputs_are_named_and_counted(undisturbed: dict[str, bytes]) -> None:
    info = json.loads(undisturbed["books.json"])
    names = [f"part{file}/lines.jsonl.gz" for file in range(4)]
    assert list(info["inputs"]) == names
    assert info["bad_lines_by_input"] == dict.fromkeys(names, 1)
    assert info["bad_lines"] == 4
    assert (
        info["duplicates_dropped"]
        == 800 - info["documents"] - json.loads(undisturbed["books-valid.json"])["documents"]
    )


def test_what_is_missing_or_foreign_is_named(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "d"
    shard = ("--out", out, "--input", *mixed_inputs, *OPTIONS)
    with pytest.raises(DataError, match="has no shards beside it"):
        run_merge("--out", out)
    run_prepare(*shard, "--shard", "1/4")
    with pytest.raises(DataError, match=r"lacks the finished shards 0, 2, 3 of 4.*--shard 0/4"):
        run_merge("--out", out)
    for index in (0, 2):
        run_prepare(*shard, "--shard", f"{index}/4")
    run_prepare(*shard, "--seed", "5", "--shard", "3/4")
    with pytest.raises(DataError, match="shard 3 of 4 differ from the rest in seed"):
        run_merge("--out", out)
    (tmp_path / ".d.preparing-3-of-4/units/unit-000000.npz").unlink()
    with pytest.raises(DataError, match="lacks the finished shard 3 of 4"):
        run_merge("--out", out)
    run_prepare(*shard, "--shard", "0/2")
    with pytest.raises(DataError, match="in 2 and in 4 parts"):
        run_merge("--out", out)
    assert not out.exists()
    # Nothing that was finished is lost by a merge that was refused.
    assert len(list(tmp_path.glob(".d.preparing-*/units/*.npz"))) == 4


def test_bad_lines_of_all_shards_count(
    tmp_path: Path, mixed_inputs: list[Path], run_prepare: RunPrepare
) -> None:
    out = tmp_path / "d"
    for index in range(2):
        arguments = ("--out", out, "--input", *mixed_inputs, "--max-bad-lines", "3")
        run_prepare(*arguments, "--shard", f"{index}/2")
    with pytest.raises(DataError, match=r"4 bad lines together.*part0/lines.jsonl.gz:141: text is"):
        run_merge("--out", out)


def test_a_shard_needs_a_number_and_a_tokenizer(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    for value in ("2/2", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="use I/N"):
            run_prepare("--out", tmp_path / "d", "--input", *corpus, f"--shard={value}")
    with pytest.raises(ConfigError, match="has no --tokenizer"):
        run_prepare("--out", tmp_path / "d", "--input", *corpus, "--shard", "0/2", tokenizer=None)


def test_a_finished_shard_is_not_made_again(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--out", tmp_path / "d", "--input", *corpus, "--shard", "0/1")
    run_prepare(*arguments)
    unit = tmp_path / ".d.preparing-0-of-1/units/unit-000000.npz"
    before = unit.stat().st_mtime_ns
    run_prepare(*arguments)
    assert unit.stat().st_mtime_ns == before
    assert "run `megatron-mode merge --out" in capsys.readouterr().out
    assert run_merge("--out", tmp_path / "d") == 0
    assert Source.open(tmp_path / "d", "books").documents == 200


def test_a_changed_input_starts_anew(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare
) -> None:
    arguments = ("--out", tmp_path / "d", "--input", *corpus, "--shard", "0/1")
    run_prepare(*arguments)
    with corpus[0].open("a") as stream:
        stream.write('{"text": "one more", "source": "books"}\n')
    run_prepare(*arguments)
    run_merge("--out", tmp_path / "d")
    assert Source.open(tmp_path / "d", "books").documents == 201


def test_a_shard_with_a_unit_missing_is_not_merged(
    tmp_path: Path, corpus: list[Path], run_prepare: Callable[..., int]
) -> None:
    """As after a kill while it was cleared up, or a disk that lost a file."""
    words = ("--out", tmp_path / "out", "--input", *corpus)
    for shard in ("0/2", "1/2"):
        run_prepare(*words, "--shard", shard)
    (unit, *_) = (tmp_path / ".out.preparing-0-of-2" / "units").glob("unit-000000.npz")
    unit.unlink()
    with pytest.raises(DataError, match="lacks the finished shard 0 of 2"):
        run_verb(["merge", "--out", str(tmp_path / "out")])
    run_prepare(*words, "--shard", "0/2")
    assert run_verb(["merge", "--out", str(tmp_path / "out")]) == 0
