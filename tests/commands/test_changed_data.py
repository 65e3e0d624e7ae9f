"""Prepared files that change after they were sealed are named, by samples or complete digests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from run_files import metrics
from tiny_run import Outcome, Trained, refusal

Call = Callable[..., Outcome]
LONGER = "run.steps=4"


@pytest.fixture
def data(trained: Trained, tmp_path: Path) -> Path:
    """Copy the prepared data."""
    return shutil.copytree(trained.data, tmp_path / "data")


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """Copy the small run."""
    return shutil.copytree(trained.run, tmp_path / "run")


def last_line(outcome: Outcome) -> str:
    """Return the sentence below the progress bar."""
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    return outcome.err.splitlines()[-1]


def zero_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def alter_tokens(path: Path) -> None:
    """Turn 100 tokens in the middle into others of the vocabulary."""
    ids = np.fromfile(path, np.uint16)
    middle = len(ids) // 2
    ids[middle : middle + 100] = 300 - ids[middle : middle + 100] % 300
    ids.tofile(path)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("books.bin", zero_half),
        ("books.bin", alter_tokens),
        ("chat.flags.bin", zero_half),
        ("chat.docs.arrow", zero_half),
        ("books-valid.bin", zero_half),
    ],
)
def test_a_new_run_on_changed_data_ends_with_its_name(
    pretrain: Call, data: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(data / name)
    place = f"data.root={data}"
    assert f"{data / name} has SHA-256" in last_line(pretrain(place))
    if name.endswith(".bin"):
        assert pretrain(place, "data.verify=false", f"run.dir={data / 'run'}").status == 0


@pytest.mark.parametrize("name", ["books.bin", "chat.flags.bin", "chat.docs.arrow"])
def test_a_resume_compares_samples_before_it_loads(
    pretrain: Call, data: Path, run: Path, name: str
) -> None:
    words = (f"data.root={data}", "data.verify=false", LONGER)
    zero_half(data / name)
    before = metrics(run)
    assert f"{data / name} has SHA-256" in refusal(pretrain(*words))
    assert metrics(run) == before


def test_the_probe_names_changed_data_first(pretrain: Call, data: Path, run: Path) -> None:
    """A run of before has no samples; every token differs."""
    (run / "data.json").unlink()
    for name in ("books.bin", "chat.bin"):
        ids = np.fromfile(data / name, np.uint16)
        np.full_like(ids, 7).tofile(data / name)
    sentence = refusal(pretrain(f"data.root={data}", "data.verify=false", LONGER))
    assert ".bin has SHA-256" in sentence
    assert "memory, device" not in sentence


def test_mended_data_are_taken(pretrain: Call, trained: Trained, data: Path) -> None:
    """Also where the samples were taken of the changed file."""
    words = (f"data.root={data}", LONGER)
    zero_half(data / "books.bin")
    last_line(pretrain(*words))
    shutil.copy(trained.data / "books.bin", data)
    assert pretrain(*words).status == 0
