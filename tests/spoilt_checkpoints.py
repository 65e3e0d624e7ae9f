"""Change a checkpoint as someone would who means it: with digests that fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Bomb:
    """Leave a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change a manifest, let it name all files that are there as they are, and seal it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    there = [name for name in manifest["files"] if (folder / name).exists()]
    manifest["files"] = {}
    for name in there:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json.sha256").write_text(f"{digest}  manifest.json\n")
