"""Gather the units of a preparation, or of all its shards, into prepared sources."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.assemble import Assembly, assemble_source
from megatron_mode.tokens.prepare.buckets import Buckets
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.staging import WorkFolder
from megatron_mode.tokens.prepare.units import Unit
from megatron_mode.tokens.prepare.verdicts import (
    SHOWN_BAD_LINES,
    Catalogue,
    check_sources,
    split_warnings,
)
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE

SHARED_INFO = ("seed", "plain_share", "valid_share", "duplicates", "mode_tokens")
TOTALS = ("documents", "tokens", "text_bytes", "repeated_ids")


@dataclass
class Tokenised:
    """Hold the units of a preparation and the digests of its inputs, by index as text."""

    units: list[Unit]
    input_digests: dict[str, str]

    @property
    def tokens(self) -> int:
        """Return the tokens in all units."""
        return sum(unit.tokens for unit in self.units)

    @property
    def bad_lines(self) -> Counter[str]:
        """Return the bad lines by input index as text."""
        counts: Counter[str] = Counter()
        for unit in self.units:
            counts.update(unit.facts["bad_lines"])
        return counts

    @property
    def ignored_fields(self) -> dict[str, int]:
        """Count the fields of turns that change no text, by name."""
        found = sum((Counter(u.facts["ignored_fields"]) for u in self.units), Counter[str]())
        return dict(sorted(found.items()))

    def first_bad_lines(self, names: list[str]) -> list[str]:
        """Describe the first bad lines."""
        found = sorted(tuple(line) for unit in self.units for line in unit.facts["first_bad_lines"])
        shown = found[:SHOWN_BAD_LINES]
        return [f"{names[index]}:{number}: {reason}" for index, number, reason in shown]


def gather_sources(
    work: WorkFolder,
    plan: dict[str, Any],
    tokenised: Tokenised,
    tokenizer: Tokenizer,
    workers: Workers,
    *,
    show_progress: bool,
) -> dict[str, Any]:
    """Write all prepared sources and the tokenizer into the result; return the summary."""
    catalogue = Catalogue()
    for unit in tokenised.units:
        for source, span in unit.sources.items():
            catalogue.add(source, span.mode, span.codes)
    names = [entry["name"] for entry in plan["inputs"]]
    check_sources(
        [entry["path"] for entry in plan["inputs"]], plan["valid_sources"], catalogue.modes
    )
    check_bad_lines(plan, tokenised, names)
    assemblies = plan_assemblies(work, plan, tokenised, tokenizer, catalogue)
    by_source: dict[str, list[dict[str, Any]]] = {}
    with progress_bar("merge", tokenised.tokens, show_progress, "tokens") as bar:
        for assembly, found in zip(
            assemblies, workers.map(assemble_source, assemblies), strict=True
        ):
            by_source[assembly.source] = found
            bar.update(sum(summary["tokens"] for summary in found))
    shutil.copyfile(work.path / MODEL_FILE, work.result / MODEL_FILE)
    tokenizer.vocabulary.write(work.result)
    sources = [summary for found in by_source.values() for summary in found]
    outputs = {source: [s["name"] for s in by_source[source]] for source in sorted(by_source)}
    bad_lines = tokenised.bad_lines
    return {
        "tokenizer": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "bad_lines": sum(bad_lines.values()),
        "bad_lines_by_input": named(bad_lines, names),
        "first_bad_lines": tokenised.first_bad_lines(names),
        "ignored_fields": tokenised.ignored_fields,
        "sources": sorted(sources, key=lambda summary: str(summary["name"])),
        "modes": totals_by_mode(by_source),
        "warnings": split_warnings(plan, outputs),
    }


def check_bad_lines(plan: dict[str, Any], tokenised: Tokenised, names: list[str]) -> None:
    """Raise DataError when all shards together have more bad lines than are allowed."""
    count, allowed = sum(tokenised.bad_lines.values()), plan["max_bad_lines"]
    if count > allowed:
        raise DataError(
            f"The shards have {count} bad lines together and --max-bad-lines is {allowed}; the "
            f"first is {tokenised.first_bad_lines(names)[0]}; mend them or raise --max-bad-lines."
        )


def plan_assemblies(
    work: WorkFolder,
    plan: dict[str, Any],
    tokenised: Tokenised,
    tokenizer: Tokenizer,
    catalogue: Catalogue,
) -> list[Assembly]:
    """Return what is to be assembled, the largest source first."""
    names = [entry["name"] for entry in plan["inputs"]]
    digests = tokenised.input_digests
    info = {
        **{key: plan[key] for key in SHARED_INFO},
        "bad_lines": sum(tokenised.bad_lines.values()),
        "bad_lines_by_input": named(tokenised.bad_lines, names),
        "inputs": {names[int(index)]: digests[index] for index in sorted(digests, key=int)},
    }
    token_bytes = np.dtype(tokenizer.vocabulary.token_dtype).itemsize
    assemblies = []
    for source, mode in sorted(catalogue.modes.items()):
        licence = plan["licences"].get(source, plan["licence"])
        assemblies.append(
            Assembly(
                source=source,
                mode=mode,
                buckets=Buckets(tokenised.units, source, token_bytes),
                result=work.result,
                vocabulary=tokenizer.vocabulary,
                input_names=names,
                refuses_repeated_ids=plan["duplicate_ids"] == "error",
                info={**info, "licence": licence},
            )
        )
    return sorted(assemblies, key=lambda a: -a.buckets.documents)


def named(counts: Counter[str], names: list[str]) -> dict[str, int]:
    """Return counts by input name, in input order."""
    return {names[int(index)]: counts[index] for index in sorted(counts, key=int)}


def totals_by_mode(by_source: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Add up the sources of each mode."""
    totals: dict[str, dict[str, Any]] = {}
    for found in by_source.values():
        for summary in found:
            total = totals.setdefault(f"mode{summary['mode']}", dict.fromkeys(TOTALS, 0))
            for key in TOTALS:
                total[key] += summary[key]
        duplicates = found[0]["duplicates_dropped"]
        mode = totals[f"mode{found[0]['mode']}"]
        mode["duplicates_dropped"] = mode.get("duplicates_dropped", 0) + duplicates
    return dict(sorted(totals.items()))
