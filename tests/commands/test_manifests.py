"""A manifest that is sealed as it should be and says what none can say is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spoilt_checkpoints import seal
from tiny_run import Outcome, Trained, checkpoint, refusal, tree

Call = Callable[..., Outcome]
LAYER = "layer_01-model_00-model_states.pt"


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """Copy the small run, with its checkpoints of steps 2 and 3."""
    return shutil.copytree(trained.run, tmp_path / "run")


WRONG: list[tuple[str, Any]] = [
    ("layout", {"tensor": 1}),
    ("layout", {"tensor": "1", "pipeline": 1, "data": 1}),
    ("layout", {"tensor": 0, "pipeline": 1, "data": 1}),
    ("layout", {"tensor": 1, "pipeline": 1, "data": 1, "expert": 1}),
    ("config", {}),
    ("config", []),
    ("probe", {}),
    ("recent_digests", [[6]]),
    ("recent_digests", []),
    ("recent_digests", [[2, "x"]]),
    ("blocked_shares", [0.0]),
    ("skips", ["a"]),
    ("recent_losses", ["a"]),
    ("step", True),
    ("step", "3"),
    ("order_digest", None),
    ("order", 7),
    ("files", []),
    ("format", "2"),
]


OTHERWISE = {
    ("format", "2"): "manifest.json is not a manifest of format 2",
    ("config", "{}"): "holds no config of this version",
    ("recent_digests", "[]"): "manifest.json is damaged (recent_digests do not end with step 3)",
    ("recent_digests", "[[2, 'x']]"): "manifest.json is damaged (recent_digests do not end with",
}


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_manifest_of_other_types_is_refused(
    verb: Call, pretrain: Call, run: Path, key: str, value: Any, alone: None
) -> None:
    """Sealed as it should be: only what it says is wrong."""
    folder = checkpoint(run, 3)
    seal(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    write_sealed(folder, {**manifest, key: value})
    before = tree(run / "checkpoints")
    expected = OTHERWISE.get((key, str(value)), f"manifest.json is damaged ({key}")
    assert expected in refusal(verb("reshard", run))
    assert expected in refusal(pretrain("run.steps=4"))
    after = {name: data for name, data in tree(run / "checkpoints").items() if name != ".lock"}
    assert after == {name: data for name, data in before.items() if name != ".lock"}


RECORDS: list[tuple[str, Any]] = [
    ("sha256", 5), ("sha256", None), ("sha256", "zz"), ("bytes", "12"), ("bytes", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), RECORDS)
def test_a_manifest_with_a_wrong_record_is_refused(
    verb: Call, pretrain: Call, run: Path, key: str, value: Any, alone: None
) -> None:
    folder = checkpoint(run, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][LAYER][key] = value
    write_sealed(folder, manifest)
    assert f"manifest.json is damaged (files.{LAYER}.{key}: " in refusal(verb("reshard", run))
    assert f"manifest.json is damaged (files.{LAYER}.{key}: " in refusal(pretrain("run.steps=4"))


def write_sealed(folder: Path, manifest: dict[str, Any]) -> None:
    from megatron_mode.checkpoint import manifest as written

    written.write_sealed(folder, manifest)


def test_a_universal_folder_that_names_no_files_is_refused(
    verb: Call, run: Path, alone: None
) -> None:
    assert verb("reshard", run).status == 0
    folder = run / "checkpoints/step-00000003-universal"
    manifest = json.loads((folder / "manifest.json").read_text())
    write_sealed(folder, {**manifest, "files": {}})
    assert "is not intact" in refusal(verb("reshard", run))
