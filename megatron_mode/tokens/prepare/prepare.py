"""Prepare a corpus: JSON lines in, one tokenizer and one source per name and purpose out.

[sample lines -> train tokenizer] -> lines -> batches -> units on disk -> buckets -> sources

Everything is in a work folder until it is moved to its place; a unit that is written is not made
again by a run that continues. A shard ends with its units, and a merge begins with those of all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare import units as unit_files
from megatron_mode.tokens.prepare.encode import LineBatch, encode_batch, line_batches, sample_texts
from megatron_mode.tokens.prepare.gather import gather_sources, unit_facts
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.request import Preparation, content_digest, stamp
from megatron_mode.tokens.prepare.staging import PLAN_FILE, WorkFolder, work_path
from megatron_mode.tokens.prepare.units import (
    EncodedBatch,
    Unit,
    are_complete,
    finished_units,
    unit_path,
    write_unit,
)
from megatron_mode.tokens.prepare.verdicts import BadLines, Catalogue
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.read.readers import open_reader, size_bytes
from megatron_mode.tokens.tokenizer import Tokenizer, train_tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE


def prepare(plan: Preparation, *, show_progress: bool) -> dict[str, Any]:
    """Prepare a corpus as one folder, or one shard, and return its summary.

    Raises DataError on bad input. OSError from the target (full, read-only) passes through after
    everything is removed; what a stopped run finished stays for the next one.
    """
    for path in plan.inputs:  # before hours are spent on the others
        with open_reader(path):
            pass
    given = None if plan.tokenizer is None else Tokenizer.load(plan.tokenizer)
    suffix = f"-{plan.shard}-of-{plan.shards}" if plan.is_shard else ""
    with WorkFolder(plan.out, suffix) as work:
        described = plan.description(given.vocabulary.digest if given else None)
        continues = work.begin(described)
        tokenizer = given or trained_tokenizer(plan, work.path / MODEL_FILE, show_progress)
        if given:
            shutil.copyfile(str(plan.tokenizer), work.path / MODEL_FILE)
        with Workers(plan.workers) as workers:
            units = tokenise(plan, work.path, workers, show_progress=show_progress)
        for path, before in zip(plan.inputs, described["inputs"], strict=True):
            if not before.items() >= stamp(path).items():
                raise DataError(f"Input {path} changed while it was read; prepare again.")
        if plan.is_shard:
            work.stays = True
            found = shard_summary(plan, units)
        else:
            found = gather_sources(
                work, described, units, tokenizer, plan.workers, show_progress=show_progress
            )
    return {"out": str(plan.out), "continued": continues, **found}


def trained_tokenizer(plan: Preparation, model: Path, show_progress: bool) -> Tokenizer:
    """Train a tokenizer on a sample of the documents, unless an earlier run did."""
    if model.exists():
        return Tokenizer(model.read_bytes(), str(model))
    total_bytes = sum(map(size_bytes, plan.inputs))
    with progress_bar("sample", total_bytes, show_progress) as bar:
        texts = sample_texts(plan.inputs, plan.split, plan.max_bad_lines, bar.update)
    partial = model.with_name(f"{model.name}.partial")
    tokenizer = train_tokenizer(texts, partial, plan.vocab_size)
    os.replace(partial, model)
    return tokenizer


def tokenise(
    plan: Preparation, folder: Path, workers: Workers, *, show_progress: bool
) -> list[Unit]:
    """Write the units that are not there yet; return all."""
    units = finished_units(folder)
    if are_complete(units):
        return units
    unit_path(folder, 0).parent.mkdir(exist_ok=True)
    catalogue, bad_lines = Catalogue(units), BadLines(plan.max_bad_lines)
    bad_lines.count = sum(sum(unit.facts["bad_lines"].values()) for unit in units)
    encode = functools.partial(encode_batch, folder / MODEL_FILE, plan.split)
    end = tuple(units[-1].facts["end"]) if units else (0, 0)
    held: list[EncodedBatch] = []
    held_bytes = 0
    for batch in workers.map(encode, remaining_batches(plan, end, show_progress)):
        bad_lines.add(batch.path, batch.bad_lines)
        for (source, mode), block in batch.blocks.items():
            catalogue.add(source, mode, np.unique(block.records["code"]).tolist())
            held_bytes += block.size_bytes
        held.append(batch)
        if held_bytes >= unit_files.UNIT_BYTES:
            units.append(write_unit(unit_path(folder, len(units)), held))
            held, held_bytes = [], 0
    mine = plan.dealt_inputs()
    if plan.shares_files:
        mine = mine[plan.shard :: plan.shards]
    digests = workers.map(content_digest, [plan.inputs[index] for index in mine])
    inputs = dict(zip(map(str, mine), digests, strict=True))
    return [*units, write_unit(unit_path(folder, len(units)), held, inputs)]


def remaining_batches(
    plan: Preparation, end: tuple[int, int], show_progress: bool
) -> Iterator[LineBatch]:
    """Yield this preparation's batches behind the last finished unit, under a progress bar."""
    mine = plan.dealt_inputs()
    ahead = [index for index in mine if index >= end[0]]
    total_bytes = sum(size_bytes(plan.inputs[index]) for index in mine)
    with progress_bar("tokenise", total_bytes, show_progress) as bar:
        bar.update(total_bytes - sum(size_bytes(plan.inputs[index]) for index in ahead))
        for batch in line_batches([(index, plan.inputs[index]) for index in ahead], bar.update):
            dealt = batch.input_index + batch.number
            is_mine = not plan.shares_files or dealt % plan.shards == plan.shard
            if is_mine and (batch.input_index, batch.numbers[-1]) > end:
                yield batch


def shard_summary(plan: Preparation, units: list[Unit]) -> dict[str, Any]:
    """Return what is known of a shard before the merge."""
    facts = unit_facts(units, [str(path) for path in plan.inputs])
    return {
        "shard": f"{plan.shard}/{plan.shards}",
        "units": len(units),
        "tokens": sum(
            found["tokens"] for unit in units for found in unit.facts["sources"].values()
        ),
        "bad_lines": facts["bad_lines"],
        "first_bad_lines": facts["first_bad_lines"],
        "warnings": [],
    }


def merge(out: Path, workers: int, *, show_progress: bool) -> dict[str, Any]:
    """Join all shards of a target into prepared sources and return the summary.

    Raises DataError when shards are missing, unfinished, at work, or of different plans.
    """
    out = Path(os.path.realpath(out))
    folders = shard_folders(out)
    plan = common_plan(out, folders)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(WorkFolder(out))
        shards = [
            stack.enter_context(WorkFolder(out, folder.name.removeprefix(work_path(out).name)))
            for folder in folders
        ]
        for shard in shards:
            shard.stays = True
        tokenizer = Tokenizer.load(folders[0] / MODEL_FILE)
        continues = work.begin({**plan, "merges": True})
        shutil.copyfile(folders[0] / MODEL_FILE, work.path / MODEL_FILE)
        units = [unit for folder in folders for unit in finished_units(folder)]
        summary = gather_sources(work, plan, units, tokenizer, workers, show_progress=show_progress)
        for shard in shards:
            shard.stays = False
    return {"out": str(out), "shards": len(folders), "continued": continues, **summary}


def shard_folders(out: Path) -> list[Path]:
    """Return the folders of all shards, in order; raise DataError when one is missing."""
    work = work_path(out)
    pattern = re.compile(re.escape(work.name) + r"-(\d+)-of-(\d+)")
    present = work.parent.iterdir() if work.parent.is_dir() else iter(())
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
            f"remove {work}-I-of-N of those that are not meant."
        )
    by_index = {int(match[1]): path for match, path in found}
    missing = [
        index
        for index in range(counts[0])
        if index not in by_index or not are_complete(finished_units(by_index[index]))
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
