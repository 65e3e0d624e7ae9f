"""What a forked process does in the test of kills: re-shard, and die at each of some files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mode.__main__ import run_verb


def killed_reshard(run: Path, points: tuple[int, ...], told: Path) -> None:
    """Re-shard until so many files are written; tell the signal and the folders that are left."""
    from megatron_mode.checkpoint.reshard import universal

    save, rename = universal.save_tensors, universal.rename_durably
    found = []
    for point in points:
        left = [point]

        def dying(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args)

            return call

        universal.save_tensors, universal.rename_durably = dying(save), dying(rename)
        child = os.fork()
        if child == 0:
            os._exit(run_verb(["reshard", str(run), "--json"]))
        killed = os.WTERMSIG(os.waitpid(child, 0)[1])
        folders = [path.name for path in (run / "checkpoints").glob("*universal")]
        found.append((killed, folders))
    told.write_text(json.dumps(found))
