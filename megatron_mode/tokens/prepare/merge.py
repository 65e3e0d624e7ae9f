"""Merge the shards of a preparation: what an unsharded one would have written, to the byte."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.gather import gather_sources
from megatron_mode.tokens.prepare.prepare import UNITS_FOLDER
from megatron_mode.tokens.prepare.staging import PLAN_FILE, WorkFolder, work_name, work_parent
from megatron_mode.tokens.prepare.units import are_complete, finished_units
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE


def merge(out: Path, workers: int, *, show_progress: bool) -> dict[str, Any]:
    """Join all shards of a target into prepared sources and return the summary.

    Raises DataError when shards are missing, unfinished, at work, or of different plans.
    """
    out = Path(os.path.realpath(out))
    folders = shard_folders(out)
    plan = common_plan(out, folders)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(WorkFolder(out))
        shards = []
        for folder in folders:
            suffix = folder.name.removeprefix(work_name(out))
            shards.append(stack.enter_context(WorkFolder(out, suffix)))
            shards[-1].stays = True
        tokenizer = Tokenizer.load(folders[0] / MODEL_FILE)
        continues = work.begin({**plan, "merges": True})
        shutil.copyfile(folders[0] / MODEL_FILE, work.path / MODEL_FILE)
        pool = stack.enter_context(Workers(workers))
        units = [unit for folder in folders for unit in finished_units(folder / UNITS_FOLDER)]
        summary = gather_sources(work, plan, units, tokenizer, pool, show_progress=show_progress)
        work.publish()
        for shard in shards:
            shard.stays = False
    return {"out": str(out), "shards": len(folders), "continued": continues, **summary}


def shard_folders(out: Path) -> list[Path]:
    """Return the folders of all shards, in order; raise DataError when one is missing."""
    pattern = re.compile(re.escape(work_name(out)) + r"-(\d+)-of-(\d+)")
    parent = work_parent(out)
    present = parent.iterdir() if parent.is_dir() else iter(())
    found = [(match, path) for path in present if (match := pattern.fullmatch(path.name))]
    if not found:
        raise DataError(
            f"--out {out} has no shards beside it; run `megatron-mode prepare --out {out} "
            "--shard I/N ...` for all I first."
        )
    counts = sorted({int(match[2]) for match, _ in found})
    if len(counts) > 1:
        raise DataError(
            f"--out {out} has shards of preparations in {' and in '.join(map(str, counts))} parts; "
            f"remove {parent / work_name(out)}-I-of-N of those that are not meant."
        )
    by_index = {int(match[1]): path for match, path in found}
    missing = [
        index
        for index in range(counts[0])
        if index not in by_index or not are_complete(finished_units(by_index[index] / UNITS_FOLDER))
    ]
    if missing:
        raise DataError(
            f"--out {out} lacks the finished {listed(missing)} of {counts[0]}; run "
            f"`megatron-mode prepare --shard {missing[0]}/{counts[0]}` with the options of the "
            "others to make or continue it."
        )
    return [by_index[index] for index in range(counts[0])]


def listed(shards: Sequence[int]) -> str:
    """Name shards."""
    return f"{'shard' if len(shards) == 1 else 'shards'} {', '.join(map(str, shards))}"


def common_plan(out: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the plan of all shards; raise DataError naming those of another."""
    plans = [json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")) for folder in folders]
    texts = [json.dumps(plan, sort_keys=True) for plan in plans]
    usual = max(texts, key=texts.count)
    others = [index for index, text in enumerate(texts) if text != usual]
    if others:
        plan, other = json.loads(usual), plans[others[0]]
        keys = sorted(key for key in {*plan, *other} if plan.get(key) != other.get(key))
        raise DataError(
            f"--out {out}: {listed(others)} of {len(folders)} differ from the rest in "
            f"{', '.join(keys)}; prepare them again with the options and inputs of the others."
        )
    merged: dict[str, Any] = plans[0]
    return merged
