"""Turn the results of held-out sources into the `valid_` metrics.

Mode 2 documents are held out in two renderings. `plain` has no role markers and gives the primary
AUROC; that of `chat` is reported beside it, and sources that mix both count with `chat`. The LM
loss counts each document once: Mode 1 and `chat`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import assert_never

import numpy as np

from megatron_mode.evaluate.held_out import EVALUATION_BITS, SourceResult
from megatron_mode.report.metrics import (
    auroc,
    auroc_by_position,
    position_histogram,
    token_metrics,
    token_sums,
)
from megatron_mode.tokens.template import Rendering

Results = Sequence[SourceResult]


def valid_metrics(results: Results) -> dict[str, object]:
    """Return the flat `valid_` keys of a metrics line; None where a class is absent."""
    lm = _merged_metrics(_lm_results(results))
    plain = _merged_metrics(_rendered(results, "plain"))
    return {
        **{f"valid_{key}": lm[key] for key in ("lm_loss", "lm_loss_mode1", "lm_loss_mode2")},
        "valid_mode_loss": plain["mode_loss"],
        "valid_mode_auroc": plain["mode_auroc"],
        "valid_mode_auroc_chat": _merged_metrics(_rendered(results, "chat"))["mode_auroc"],
        "valid_mode_recall_at_fpr01": plain["mode_recall_at_fpr01"],
        "valid_mode_recall_at_fpr05": plain["mode_recall_at_fpr05"],
        "valid_lm_loss_by_source": {r.name: token_metrics(r.tokens_S)["lm_loss"] for r in results},
    }


def valid_summary(results: Results) -> dict[str, object]:
    """Return what only the last evaluation reports: by source, document, window and position."""
    plain, chat = _rendered(results, "plain"), _rendered(results, "chat")
    summary = valid_metrics(results)
    summary["unigram_entropy"] = _unigram_entropy(_lm_results(results))
    for suffix, group in (("", plain), ("_chat", chat)):
        windows_S = sum((r.windows_S for r in group), token_sums([], EVALUATION_BITS))
        summary[f"valid_mode_auroc_documents{suffix}"] = _piece_auroc(group, from_start=True)
        summary[f"valid_mode_auroc_window_means{suffix}"] = _piece_auroc(group, from_start=False)
        summary[f"valid_mode_auroc_windows{suffix}"] = token_metrics(windows_S)["mode_auroc"]
    summary["auroc_by_position"] = {
        name: auroc_by_position(sum((r.positions_K2B for r in group), position_histogram([])))
        for name, group in (("plain", plain), ("chat", chat))
    }
    summary["valid"] = {result.name: _source_summary(result, results) for result in results}
    return summary


def _source_summary(result: SourceResult, results: Results) -> dict[str, object]:
    """Return one source's figures; its AUROC is against all sources of the other mode."""
    same = _rendered(results, _group_of(result) if result.mode == 2 else "plain")
    against = [result, *(other for other in same if other.mode != result.mode)]
    metrics = token_metrics(result.tokens_S)
    return {
        "mode": result.mode,
        "rendering": result.rendering,
        "tokens": result.target_counts.total(),
        **{key: metrics[key] for key in ("lm_loss", "mode_loss", "mode_accuracy")},
        "mode_auroc": _merged_metrics(against)["mode_auroc"],
        "mode_auroc_documents": _piece_auroc(against, from_start=True),
    }


def _group_of(result: SourceResult) -> Rendering:
    match result.rendering:
        case "plain":
            return "plain"
        case "chat" | "mixed":
            return "chat"
        case unknown:
            assert_never(unknown)


def _rendered(results: Results, group: Rendering) -> list[SourceResult]:
    """Return Mode 1 and the Mode 2 sources of a group."""
    return [result for result in results if result.mode == 1 or _group_of(result) == group]


def _lm_results(results: Results) -> list[SourceResult]:
    """Return the sources of the LM loss: with Mode 2 in `chat`, where it is held out so."""
    chat = _rendered(results, "chat")
    return chat if any(r.mode == 2 for r in chat) else _rendered(results, "plain")


def _merged_metrics(results: Results) -> dict[str, float | None]:
    return token_metrics(sum((r.tokens_S for r in results), token_sums([], EVALUATION_BITS)))


def _piece_auroc(results: Results, *, from_start: bool) -> float | None:
    """Return the AUROC of mean logits of document pieces, from a start or cut from the middle."""
    pieces = [p for result in results for p in result.pieces if p.from_start == from_start]
    return auroc([piece.mean_logit for piece in pieces], [piece.mode2 for piece in pieces])


def _unigram_entropy(results: Results) -> float | None:
    """Return the entropy in nats of the evaluated target tokens.

    It is the loss of the best possible unigram model of exactly these tokens, a harder mark than
    one fitted on the training data.
    """
    counts = sum((result.target_counts for result in results), Counter[int]())
    if not counts:
        return None
    probability = np.array(list(counts.values()), dtype=np.float64)
    probability /= probability.sum()
    return float(-(probability * np.log(probability)).sum())
