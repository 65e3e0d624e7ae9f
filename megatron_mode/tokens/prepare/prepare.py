"""Prepare a corpus: JSON lines in, one tokenizer and one source per name and purpose out.

[sample lines -> train tokenizer] -> lines -> batches -> units on disk -> buckets -> sources

Everything is in a work folder until it is moved to its place; a unit that is written is not made
again by a run that continues.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.encode import (
    LineBatch,
    check_readable,
    encode_in_worker,
    line_batches,
    sample_texts,
)
from megatron_mode.tokens.prepare.gather import gather_sources, unit_facts
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.request import Preparation, content_digest, stamp
from megatron_mode.tokens.prepare.staging import WorkFolder
from megatron_mode.tokens.prepare.units import Unit, UnitWriter, are_complete, codes
from megatron_mode.tokens.prepare.verdicts import BadLines, Catalogue, silent_warnings
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.read.readers import size_bytes
from megatron_mode.tokens.tokenizer import Tokenizer, train_tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE

UNITS_FOLDER = "units"


def prepare(plan: Preparation, *, show_progress: bool) -> dict[str, Any]:
    """Prepare a corpus as one folder, or one shard, and return its summary.

    Raises DataError on bad input. OSError from the target (full, read-only) passes through after
    everything is removed; what a stopped run finished stays for the next one.
    """
    check_readable(plan.inputs)
    given = None if plan.tokenizer is None else Tokenizer.load(plan.tokenizer)
    suffix = f"-{plan.shard}-of-{plan.shards}" if plan.is_shard else ""
    with WorkFolder(plan.out, suffix) as work, Workers(plan.workers) as workers:
        described = plan.description(given.vocabulary.digest if given else None)
        continues = work.begin(described)
        tokenizer = given or trained_tokenizer(plan, work.path / MODEL_FILE, show_progress)
        if given:
            shutil.copyfile(str(plan.tokenizer), work.path / MODEL_FILE)
        units = tokenise(plan, work.path, workers, show_progress=show_progress)
        for path, before in zip(plan.inputs, described["inputs"], strict=True):
            if not before.items() >= stamp(path).items():
                raise DataError(f"Input {path} changed while it was read; prepare again.")
        if plan.is_shard:
            work.stays = True
            found = shard_summary(plan, units)
        else:
            found = gather_sources(
                work, described, units, tokenizer, workers, show_progress=show_progress
            )
            work.publish()
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
    writer = UnitWriter(folder / UNITS_FOLDER)
    if are_complete(writer.units):
        return writer.units
    catalogue, bad_lines = Catalogue(writer.units), BadLines(plan.max_bad_lines)
    bad_lines.count = sum(sum(unit.facts["bad_lines"].values()) for unit in writer.units)
    encode = functools.partial(encode_in_worker, folder / MODEL_FILE, plan.split)
    for batch in workers.map(encode, remaining_batches(plan, writer.end, show_progress)):
        bad_lines.add(batch.path, batch.bad_lines)
        for (source, mode), block in batch.blocks.items():
            catalogue.add(source, mode, np.unique(codes(block.records)).tolist())
        writer.add(batch)
    mine = plan.dealt_inputs()
    if plan.shares_files:
        mine = mine[plan.shard :: plan.shards]
    digests = workers.map(content_digest, [plan.inputs[index] for index in mine])
    writer.flush(dict(zip(map(str, mine), digests, strict=True)))
    return writer.units


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
        "warnings": silent_warnings(units),
    }
