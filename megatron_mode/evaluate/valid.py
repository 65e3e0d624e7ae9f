"""Turn the results of held-out sources into the `valid_` metrics.

Mode 2 documents are held out in two renderings. `plain` has no role markers and gives the primary
AUROC; that of `chat` is reported beside it. The LM loss counts each document once: Mode 1 and
`chat`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_mode.evaluate.held_out import EVALUATION_BITS, SourceResult
from megatron_mode.report.metrics import PositionStatistics, TokenStatistics, auroc


def valid_metrics(results: Sequence[SourceResult]) -> dict[str, object]:
    """Return the flat `valid_` keys of a metrics line; None where a class is absent."""
    plain, chat = with_rendering(results, "plain"), with_rendering(results, "chat")
    lm = tokens_of(chat if any(r.mode == 2 for r in chat) else plain).metrics()
    mode = tokens_of(plain).metrics()
    return {
        "valid_lm_loss": lm["lm_loss"],
        "valid_lm_loss_mode1": lm["lm_loss_mode1"],
        "valid_lm_loss_mode2": lm["lm_loss_mode2"],
        "valid_mode_loss": mode["mode_loss"],
        "valid_mode_auroc": mode["mode_auroc"],
        "valid_mode_auroc_chat": tokens_of(chat).auroc(),
        "valid_mode_recall_at_fpr01": mode["mode_recall_at_fpr01"],
        "valid_mode_recall_at_fpr05": mode["mode_recall_at_fpr05"],
        "valid_lm_loss_by_source": {r.name: r.tokens.metrics()["lm_loss"] for r in results},
    }


def valid_summary(results: Sequence[SourceResult]) -> dict[str, object]:
    """Return what only the last evaluation reports: by source, document, window and position."""
    plain, chat = with_rendering(results, "plain"), with_rendering(results, "chat")
    lm_results = chat if any(r.mode == 2 for r in chat) else plain
    summary: dict[str, object] = dict(valid_metrics(results))
    summary["unigram_entropy"] = unigram_entropy(lm_results)
    for suffix, group in (("", plain), ("_chat", chat)):
        summary[f"valid_mode_auroc_documents{suffix}"] = piece_auroc(group, from_start=True)
        summary[f"valid_mode_auroc_window_means{suffix}"] = piece_auroc(group, from_start=False)
        windows = sum((r.windows for r in group), TokenStatistics.zero(EVALUATION_BITS))
        summary[f"valid_mode_auroc_windows{suffix}"] = windows.auroc()
    summary["auroc_by_position"] = {
        "plain": positions_of(plain).auroc_by_position() if plain else {},
        "chat": positions_of(chat).auroc_by_position() if chat else {},
    }
    summary["valid"] = {result.name: source_summary(result, results) for result in results}
    return summary


def source_summary(result: SourceResult, results: Sequence[SourceResult]) -> dict[str, object]:
    """Return one source's figures; its AUROC is against all sources of the other mode."""
    group = with_rendering(results, result.rendering if result.mode == 2 else "plain")
    against = [result, *(other for other in group if other.mode != result.mode)]
    metrics = result.tokens.metrics()
    return {
        "mode": result.mode,
        "rendering": result.rendering,
        "tokens": sum(result.target_counts.values()),
        "lm_loss": metrics["lm_loss"],
        "mode_loss": metrics["mode_loss"],
        "mode_accuracy": metrics["mode_accuracy"],
        "mode_auroc": tokens_of(against).auroc(),
        "mode_auroc_documents": piece_auroc(against, from_start=True),
    }


def with_rendering(results: Sequence[SourceResult], rendering: str) -> list[SourceResult]:
    """Return Mode 1 and the Mode 2 sources of a rendering ("plain" or anything else)."""
    return [
        result
        for result in results
        if result.mode == 1 or (result.rendering == "plain") == (rendering == "plain")
    ]


def tokens_of(results: Sequence[SourceResult]) -> TokenStatistics:
    """Merge the token statistics of sources."""
    return sum((result.tokens for result in results), TokenStatistics.zero(EVALUATION_BITS))


def positions_of(results: Sequence[SourceResult]) -> PositionStatistics:
    """Merge the position statistics of at least one source."""
    first, *rest = results
    return sum((result.positions for result in rest), first.positions)


def piece_auroc(results: Sequence[SourceResult], *, from_start: bool) -> float | None:
    """Return the AUROC of mean logits of document pieces, from a start or cut from the middle."""
    pieces = [p for result in results for p in result.pieces if p.from_start == from_start]
    return auroc([piece.mean_logit for piece in pieces], [piece.mode2 for piece in pieces])


def unigram_entropy(results: Sequence[SourceResult]) -> float | None:
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
