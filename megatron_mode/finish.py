"""End a run: evaluate on all held-out sources, colour passages, write summary and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from megatron_mode.atomic import write_whole
from megatron_mode.engine.step import Engine
from megatron_mode.evaluate.held_out import evaluate_source, evaluate_window
from megatron_mode.evaluate.passages import Passage, choose_passages
from megatron_mode.evaluate.valid import valid_summary
from megatron_mode.mix.corpus import Corpus, build_reader
from megatron_mode.process.stopping import Reason
from megatron_mode.report.page import build_page
from megatron_mode.report.run_folder import read_runs
from megatron_mode.report.writers import METRICS_FILE, SUMMARY_FILE, write_json
from megatron_mode.tokens.flags import CONTROL
from megatron_mode.tokens.tokenizer import Tokenizer
from megatron_mode.tokens.vocabulary import MODEL_FILE

FINAL_ROWS_FACTOR = 4


def finish_run(
    engine: Engine, folder: Path, corpus: Corpus, asked_to_stop: Callable[[], Reason]
) -> tuple[dict[str, object], Reason]:
    """Write summary.json, heatmap.json and report.html; every rank takes part, rank 0 writes.

    `asked_to_stop` is asked before each source, the same on all ranks, and ends it there. The last
    evaluation reads `FINAL_ROWS_FACTOR` times the rows of those during the run.
    """
    reader = build_reader(engine.config, corpus, corpus.valid)
    rows = engine.config.run.eval_rows * FINAL_ROWS_FACTOR
    results = []
    for index in range(len(corpus.valid)):
        if stop := asked_to_stop():
            return {}, stop
        results.append(evaluate_source(engine, reader, index, rows, pieces=True))
    model = corpus.root / MODEL_FILE
    coloured = []
    if model.exists():  # a corpus by Megatron's own tools has none
        tokenizer = Tokenizer.load(model)
        passages = choose_passages(corpus.valid, tokenizer, engine.config.model.seq_len)
        coloured = [_coloured(engine, corpus, tokenizer, passage) for passage in passages]
    summary = {**training_summary(folder), **valid_summary(results)} if engine.rank == 0 else {}
    if engine.rank == 0:
        report = folder / "report.html"
        summary["report"] = str(report)
        write_whole(folder / "heatmap.json", json.dumps({"passages": coloured}))
        write_json(folder / SUMMARY_FILE, summary)
        write_whole(report, build_page(read_runs([folder])))
    return summary, Reason.NONE


def training_summary(folder: Path) -> dict[str, object]:
    """Summarise metrics.jsonl: first and last loss, largest distance from the plan, speed."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    if not lines:
        return {}
    last = lines[-1]
    # The first steps warm caches up; the median leaves out steps that wait for a checkpoint.
    speeds = [line["tokens_per_second"] for line in lines[min(5, len(lines) - 1) :]]
    waits = [line["data_wait_seconds"] / line["step_seconds"] for line in lines]
    return {
        "steps": last["step"],
        "tokens_seen": last["tokens_seen"],
        "lm_loss_first": lines[0]["lm_loss"],
        "lm_loss_last": last["lm_loss"],
        "mode2_rows_planned_minus_realised_max_abs": max(
            abs(line["mode2_rows_planned_minus_realised"]) for line in lines
        ),
        "tokens_per_second": median(speeds),
        "data_wait_share_median": median(waits),
        "training_seconds": sum(line["step_seconds"] for line in lines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
    }


def _coloured(
    engine: Engine, corpus: Corpus, tokenizer: Tokenizer, passage: Passage
) -> dict[str, object]:
    """Return a passage with the mode probability of each token, as heatmap.json holds it."""
    index = [source.name for source in corpus.valid].index(passage.source)
    reader = build_reader(engine.config, corpus, corpus.valid)
    begin = passage.begin_token
    logit_T = evaluate_window(engine, reader, index, begin)
    ids_T, flags_T = corpus.valid[index].read(begin, begin + engine.config.model.seq_len)
    pieces = tokenizer.pieces(ids_T.tolist())
    tokens = [
        {"text": text, "probability": probability, "control": bool(flag & CONTROL)}
        for text, probability, flag in zip(pieces, logit_T.sigmoid().tolist(), flags_T, strict=True)
    ]
    about = {"title": passage.title, "source": passage.source, "kind": passage.kind}
    return {**about, "tokens": tokens}
