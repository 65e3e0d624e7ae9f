"""Gather the units of a preparation, or of all its shards, into prepared sources."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

from megatron_mode.errors import DataError
from megatron_mode.tokens.prepare.assemble import Assembly, assemble_source
from megatron_mode.tokens.prepare.output import progress_bar
from megatron_mode.tokens.prepare.staging import WorkFolder
from megatron_mode.tokens.prepare.units import SHOWN_BAD_LINES, Unit
from megatron_mode.tokens.prepare.verdicts import (
    Catalogue,
    check_sources,
    share_warnings,
    silent_warnings,
)
from megatron_mode.tokens.prepare.workers import Workers
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE

SHARED_INFO = ("seed", "plain_share", "valid_share", "duplicates", "mode_tokens")
SUMMARY_KEYS = (
    "name", "mode", "rendering", "documents", "tokens", "text_bytes", "tokens_per_byte",
    "plain_documents", "repeated_ids", "duplicates_dropped", "held_out_share", "licence",
    "flags", "lengths_log2",
)  # fmt: skip
TOTALS = ("documents", "tokens", "text_bytes", "repeated_ids")


def gather_sources(
    work: WorkFolder,
    plan: dict[str, Any],
    units: list[Unit],
    tokenizer: Tokenizer,
    workers: int,
    *,
    show_progress: bool,
) -> dict[str, Any]:
    """Write all prepared sources and the tokenizer, publish them, and return the summary."""
    check_sources(plan, Catalogue(units).modes)
    facts = unit_facts(units, [entry["name"] for entry in plan["inputs"]])
    if facts["bad_lines"] > plan["max_bad_lines"]:
        raise DataError(
            f"The shards have {facts['bad_lines']} bad lines together and --max-bad-lines is "
            f"{plan['max_bad_lines']}; the first is {facts['first_bad_lines'][0]}; mend them or "
            "raise --max-bad-lines."
        )
    assemblies = assemblies_of(plan, units, facts, work, tokenizer)
    by_source: dict[str, list[dict[str, Any]]] = {}
    total = sum(assembly.total("tokens") for assembly in assemblies)
    # New processes: those that tokenised still hold their tables of words.
    with Workers(workers) as pool, progress_bar("merge", total, show_progress, "tokens") as bar:
        found = pool.map(assemble_source, assemblies)
        for assembly, infos in zip(assemblies, found, strict=True):
            summaries = [{key: info[key] for key in SUMMARY_KEYS} for info in infos]
            by_source[assembly.source] = summaries
            bar.update(sum(summary["tokens"] for summary in summaries))
    shutil.copyfile(work.path / MODEL_FILE, work.result / MODEL_FILE)
    tokenizer.vocabulary.write(work.result)
    work.publish()
    outputs = {source: [s["name"] for s in found] for source, found in by_source.items()}
    sources = [summary for summaries in by_source.values() for summary in summaries]
    return {
        "tokenizer": tokenizer.vocabulary.digest,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.vocabulary.padded_vocab_size,
        **facts,
        "sources": sorted(sources, key=lambda summary: str(summary["name"])),
        "modes": totals_by_mode(by_source),
        "warnings": share_warnings(plan, outputs) + silent_warnings(units),
    }


def assemblies_of(
    plan: dict[str, Any],
    units: list[Unit],
    facts: dict[str, Any],
    work: WorkFolder,
    tokenizer: Tokenizer,
) -> list[Assembly]:
    """Return what is to be assembled, the largest source first."""
    names = [entry["name"] for entry in plan["inputs"]]
    digests = {i: digest for u in units for i, digest in (u.facts["inputs"] or {}).items()}
    info = {
        **{key: plan[key] for key in SHARED_INFO},
        **{key: facts[key] for key in ("bad_lines", "bad_lines_by_input")},
        "inputs": {names[int(index)]: digests[index] for index in sorted(digests, key=int)},
    }
    assemblies = [
        Assembly(
            source=source,
            mode=mode,
            units=[unit for unit in units if source in unit.facts["sources"]],
            result=work.result,
            vocabulary=tokenizer.vocabulary,
            input_names=names,
            refuses_repeated_ids=plan["duplicate_ids"] == "error",
            info={**info, "licence": plan["licences"].get(source, plan["licence"])},
        )
        for source, mode in sorted(Catalogue(units).modes.items())
    ]
    return sorted(assemblies, key=lambda assembly: -assembly.total("documents"))


def unit_facts(units: list[Unit], names: list[str]) -> dict[str, Any]:
    """Add up what units found besides documents; names are those of the inputs."""
    bad_lines, ignored = Counter[str](), Counter[str]()
    for unit in units:
        bad_lines.update(unit.facts["bad_lines"])
        ignored.update(unit.facts["ignored_fields"])
    first = sorted(tuple(line) for unit in units for line in unit.facts["first_bad_lines"])
    return {
        "bad_lines": bad_lines.total(),
        "bad_lines_by_input": {names[int(i)]: bad_lines[i] for i in sorted(bad_lines, key=int)},
        "first_bad_lines": [
            f"{names[i]}:{n}: {reason}" for i, n, reason in first[:SHOWN_BAD_LINES]
        ],
        "ignored_fields": dict(sorted(ignored.items())),
    }


def totals_by_mode(by_source: dict[str, list[dict[str, Any]]]) -> dict[str, Counter[str]]:
    """Add up the sources of each mode."""
    totals: dict[str, Counter[str]] = {}
    for found in by_source.values():
        total = totals.setdefault(f"mode{found[0]['mode']}", Counter())
        for summary in found:
            total.update({key: summary[key] for key in TOTALS})
        total["duplicates_dropped"] += found[0]["duplicates_dropped"]
    return dict(sorted(totals.items()))
