"""Prepare a corpus: JSON lines in, one tokenizer and one source per name and purpose out.

[sample lines -> train tokenizer] -> lines -> batches -> units on disk -> merged sources

Everything lies in a work folder until it is renamed to its place; a unit that is written is not
made again by a run that continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mode.atomic import write_whole
from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.encode import (
    LineBatch,
    check_readable,
    encoded_batches,
    line_batches,
)
from megatron_mode.tokens.prepare.gathering import Tokenised, gather_sources
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.records import codes
from megatron_mode.tokens.prepare.request import Preparation, content_digest, deal_files, stamp
from megatron_mode.tokens.prepare.staging import WorkFolder
from megatron_mode.tokens.prepare.training_sample import sample_texts
from megatron_mode.tokens.prepare.units import UnitWriter
from megatron_mode.tokens.prepare.verdicts import BadLines, Catalogue
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.read.readers import size_bytes
from megatron_mode.tokens.tokenizer import Tokenizer, train_tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE

UNITS_FOLDER = "units"
TOKENISED_FILE = "tokenised.json"


def prepare(plan: Preparation, *, show_progress: bool) -> dict[str, Any]:
    """Prepare a corpus as one atomic folder, or one shard, and return its summary.

    Raises DataError on bad input. OSError from the target (full, read-only) passes through after
    everything is removed; what a stopped run finished stays for the next one.
    """
    check_readable(plan.inputs)
    given = None if plan.tokenizer is None else Tokenizer.load(plan.tokenizer)
    suffix = f"-{plan.shard.index}-of-{plan.shard.count}" if plan.shard else ""
    with WorkFolder(plan.out, suffix) as work, Workers(plan.workers) as workers:
        described = plan.description(given.digest if given else None)
        continues = work.begin(described)
        tokenizer = given or trained_tokenizer(plan, work.path / MODEL_FILE, show_progress)
        if given:
            shutil.copyfile(str(plan.tokenizer), work.path / MODEL_FILE)
        tokenised = tokenise(plan, work.path, tokenizer, workers, show_progress=show_progress)
        check_unchanged(plan, described)
        if plan.shard:
            work.keep()
            return shard_summary(plan, tokenised, continues)
        summary = gather_sources(
            work, described, tokenised, tokenizer, workers, show_progress=show_progress
        )
        work.publish()
    return {"out": str(plan.out), "continued": continues, **summary}


def tokenise(
    plan: Preparation, folder: Path, tokenizer: Tokenizer, workers: Workers, *, show_progress: bool
) -> Tokenised:
    """Write the units that are not there yet; return what all of them hold."""
    units = UnitWriter(folder / UNITS_FOLDER, tokenizer.vocabulary.token_dtype)
    done = folder / TOKENISED_FILE
    if (known := input_digests(done, len(units.units))) is not None:
        return Tokenised(units.units, known)
    catalogue, bad_lines = Catalogue(), BadLines(plan.max_bad_lines)
    for unit in units.units:
        bad_lines.count += sum(unit.facts["bad_lines"].values())
        for source, span in unit.sources.items():
            catalogue.add(source, span.mode, span.codes)
    batches = remaining_batches(plan, units, show_progress)
    for batch in encoded_batches(batches, folder / MODEL_FILE, plan.split, workers):
        bad_lines.add(batch.path, batch.bad_lines)
        for (source, mode), block in batch.blocks.items():
            catalogue.add(source, mode, np.unique(codes(block.records)).tolist())
        units.add(batch)
    units.flush()
    mine = dealt_inputs(plan)
    if plan.shard and len(plan.inputs) < plan.shard.count:
        mine = [index for index in mine if index % plan.shard.count == plan.shard.index]
    digests = workers.map(content_digest, [plan.inputs[index] for index in mine])
    inputs = dict(zip(map(str, mine), digests, strict=True))
    write_whole(done, json.dumps({"units": len(units.units), "inputs": inputs}))
    return Tokenised(units.units, inputs)


def input_digests(mark: Path, units: int) -> dict[str, str] | None:
    """Read the mark of a finished tokenisation; None without it or where units are missing."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    digests: dict[str, str] = found["inputs"]
    return digests if found["units"] == units else None


def dealt_inputs(plan: Preparation) -> list[int]:
    """Return the inputs that this preparation reads; fewer inputs than shards are shared by all."""
    if plan.shard is None or len(plan.inputs) < plan.shard.count:
        return list(range(len(plan.inputs)))
    return deal_files([size_bytes(path) for path in plan.inputs], plan.shard)


def remaining_batches(
    plan: Preparation, units: UnitWriter, show_progress: bool
) -> Iterator[LineBatch]:
    """Yield this preparation's batches behind the last finished unit, under a progress bar."""
    mine = dealt_inputs(plan)
    ahead = [index for index in mine if index >= units.end.input_index]
    shares_files = plan.shard is not None and len(plan.inputs) < plan.shard.count
    with progress_bar(
        "tokenise", sum(size_bytes(plan.inputs[i]) for i in mine), show_progress
    ) as bar:
        bar.update(sum(size_bytes(plan.inputs[i]) for i in mine if i not in ahead))
        for batch in line_batches([(index, plan.inputs[index]) for index in ahead], bar.update):
            if plan.shard and shares_files:
                dealt_to = (batch.input_index + batch.number) % plan.shard.count
                if dealt_to != plan.shard.index:
                    continue
            if (batch.input_index, batch.numbers[-1]) > units.end:
                yield batch


def trained_tokenizer(plan: Preparation, model: Path, show_progress: bool) -> Tokenizer:
    """Train a tokenizer on a sample of the documents, unless an earlier run did."""
    if model.exists():
        return Tokenizer.from_bytes(model.read_bytes(), str(model))
    total_bytes = sum(map(size_bytes, plan.inputs))
    with progress_bar("sample", total_bytes, show_progress) as bar:
        texts = sample_texts(plan, bar.update)
    partial = model.with_name(f"{model.name}.partial")
    tokenizer = train_tokenizer(texts, partial, plan.vocab_size)
    os.replace(partial, model)
    return tokenizer


def check_unchanged(plan: Preparation, described: dict[str, Any]) -> None:
    """Raise DataError when an input changed while it was read."""
    for path, before in zip(plan.inputs, described["inputs"], strict=True):
        now = stamp(path)
        if any(before[key] != value for key, value in now.items()):
            raise DataError(f"Input {path} changed while it was read; prepare again.")


def shard_summary(plan: Preparation, tokenised: Tokenised, continues: bool) -> dict[str, Any]:
    """Return what is known of a shard before the merge."""
    return {
        "out": str(plan.out),
        "shard": str(plan.shard),
        "continued": continues,
        "units": len(tokenised.units),
        "tokens": tokenised.tokens,
        "bad_lines": sum(tokenised.bad_lines.values()),
        "first_bad_lines": tokenised.first_bad_lines([str(path) for path in plan.inputs]),
        "warnings": [],
    }
