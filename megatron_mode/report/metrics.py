"""Sum per-token results so that one all-reduce merges them, and turn the sums into metrics.

Letters: B rows of T tokens, N tokens in any shape, K position buckets; in counts B is bins.

An AUROC needs the order of all logits, which ranks cannot afford to exchange. A logit's float32 bit
pattern, flipped so that integers sort as floats do, is cut to its top bits instead: the bins are
monotone in the logit, so histograms add up and give the rank sum with ties inside a bin counted as
half. At 12 bits a bin is at most 12.5 % wide relative to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_mode.engine.step import TokenOutputs
from megatron_mode.tokens.flags import CONTROL

Floats = npt.NDArray[np.float64]
Value = TypeVar("Value")

DEFAULT_BITS = 12
POSITION_BUCKETS = 16  # the last one starts at token 32,768 of a document and is open
_CANONICAL_NAN = 0x7FC00000


def logit_bins(mode_logit_N: Tensor, bits: int = DEFAULT_BITS) -> Tensor:
    """Map logits to int64 bins 0 .. 2**bits - 1 that never fall as the logit rises.

    `bits` is 10 to 24: below 10 the top bin would hold +inf and NaN alike. Any NaN goes to one bin
    above that of +inf; -0.0 and 0.0 share a bin.
    """
    logit_N = mode_logit_N.detach().to(torch.float32) + 0.0  # + 0.0 turns -0.0 into 0.0
    pattern_N = logit_N.view(torch.int32).to(torch.int64)
    pattern_N = torch.where(torch.isnan(logit_N), _CANONICAL_NAN, pattern_N)
    # Negative floats sort backwards by pattern: the complement mirrors them below the positive.
    ordered_N = torch.where(pattern_N < 0, ~pattern_N, pattern_N + 2**31)
    return ordered_N >> (32 - bits)


def auroc_of_counts(mode1_B: Floats, mode2_B: Floats) -> float | None:
    """Return the AUROC of Mode 2 against Mode 1 from counts by ascending bin, ties as half.

    None where a class is absent.
    """
    pairs = float(mode1_B.sum()) * float(mode2_B.sum())
    below_B = np.cumsum(mode1_B) - mode1_B
    return _ratio(float((mode2_B * (below_B + 0.5 * mode1_B)).sum()), pairs)


def recall_of_counts(mode1_B: Floats, mode2_B: Floats, false_positive_rate: float) -> float | None:
    """Return the share of Mode 2 above the threshold that lets this share of Mode 1 through.

    A threshold that falls inside a bin takes the matching part of it, as the AUROC does with ties.
    None where a class is absent.
    """
    if not mode1_B.any() or not mode2_B.any():
        return None
    false_B = np.concatenate([[0.0], np.cumsum(mode1_B[::-1])])
    true_B = np.concatenate([[0.0], np.cumsum(mode2_B[::-1])])
    allowed = false_positive_rate * false_B[-1]
    # 1e-9 tokens of slack: 0.01 * 2900 must admit 29 tokens whatever its last bit is.
    complete = int(np.searchsorted(false_B, allowed + 1e-9, side="right")) - 1
    caught = float(true_B[complete])
    if complete + 1 < len(false_B):
        part = max(allowed - false_B[complete], 0.0) / (false_B[complete + 1] - false_B[complete])
        caught += part * float(true_B[complete + 1] - true_B[complete])
    return caught / float(true_B[-1])


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float | None:
    """Return the exact AUROC of `scores` for true labels against false ones, ties as half.

    None where a class is absent or a score is NaN.
    """
    if np.isnan(scores).any():
        return None
    values, bin_N = np.unique(scores, return_inverse=True)
    label_N = np.asarray(labels, dtype=bool)
    mode1_B, mode2_B = (
        np.bincount(bin_N[chosen_N], minlength=len(values)).astype(np.float64)
        for chosen_N in (~label_N, label_N)
    )
    return auroc_of_counts(mode1_B, mode2_B)


def _counts(histogram_2B: Tensor) -> tuple[Floats, Floats]:
    """Return the counts of Mode 1 and Mode 2; zeros if a logit is NaN, so figures are undefined."""
    bins = histogram_2B.shape[1]
    has_nan = bool(histogram_2B[:, (0xFF800000 * bins >> 32) + 1 :].any())
    mode1_B, mode2_B = (histogram_2B * (not has_nan)).numpy()
    return mode1_B, mode2_B


def _histogram(output: TokenOutputs, bits: int, group_BT: Tensor | int, groups: int) -> Tensor:
    """Count scored content tokens as [group, mode, bin], flat, without a GPU-stalling shape."""
    batch = output.batch
    keep_BT = (batch.mode_weight_BT > 0) & ((batch.flags_BT & CONTROL) == 0)
    mode2_BT = (batch.mode_label_BT >= 0.5).to(torch.int64)
    index_BT = (group_BT * 2 + mode2_BT << bits) + logit_bins(output.loss.mode_logit_BT, bits)
    size = 2 * groups << bits
    index_N = torch.where(keep_BT, index_BT, size).reshape(-1)
    counts = torch.zeros(size + 1, dtype=torch.float64, device=index_N.device)
    counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.float64))
    return counts[:size]


class _Sums(NamedTuple, Generic[Value]):
    """Name the sums over tokens; losses are those before blocking."""

    nll_mode1: Value
    nll_mode2: Value
    lm_weight_mode1: Value
    lm_weight_mode2: Value
    bce: Value
    mode_weight: Value
    valid_tokens: Value
    valid_tokens_mode2: Value
    blocked_tokens: Value
    scored_tokens: Value
    correct_tokens: Value


_SUMS = len(_Sums._fields)


def token_sums(outputs: Sequence[TokenOutputs], bits: int = DEFAULT_BITS) -> Tensor:
    """Sum micro-batches into a float64 vector, exact for counts up to 2**53; vectors add up.

    It holds `_Sums`, then the histogram of content tokens as [mode, bin]. Weights are those before
    blocking, a token is valid when either weight is positive, and labels >= 0.5 are Mode 2.
    """
    total = torch.zeros(_SUMS + (2 << bits), dtype=torch.float64)
    for output in outputs:
        parts = torch.stack(_sums_of(output)), _histogram(output, bits, group_BT=0, groups=1)
        total += torch.cat(parts).cpu()
    return total


def token_metrics(vector: Tensor) -> dict[str, float | None]:
    """Turn `token_sums` into the metrics that tokens decide, by key; None where undefined."""
    sums = _Sums(*vector[:_SUMS].tolist())
    counts = _counts(vector[_SUMS:].view(2, -1))
    nll = sums.nll_mode1 + sums.nll_mode2
    return {
        "lm_loss": _ratio(nll, sums.lm_weight_mode1 + sums.lm_weight_mode2),
        "lm_loss_mode1": _ratio(sums.nll_mode1, sums.lm_weight_mode1),
        "lm_loss_mode2": _ratio(sums.nll_mode2, sums.lm_weight_mode2),
        "mode_loss": _ratio(sums.bce, sums.mode_weight),
        "mode_accuracy": _ratio(sums.correct_tokens, sums.scored_tokens),
        "mode_auroc": auroc_of_counts(*counts),
        "mode_recall_at_fpr01": recall_of_counts(*counts, 0.01),
        "mode_recall_at_fpr05": recall_of_counts(*counts, 0.05),
        "mode2_token_fraction_realised": _ratio(sums.valid_tokens_mode2, sums.valid_tokens),
        "blocked_share": _ratio(sums.blocked_tokens, sums.valid_tokens),
    }


def _sums_of(output: TokenOutputs) -> _Sums[Tensor]:
    batch, loss = output
    of_loss = (loss.nll_BT, loss.bce_BT, loss.mode_logit_BT)
    # Flat, so that a sum takes the tokens in one order whatever the strides are.
    nll_N, bce_N, logit_N, lm_weight_N, mode_weight_N = (
        tensor.detach().reshape(-1).to(torch.float64)
        for tensor in (*of_loss, batch.lm_weight_BT, batch.mode_weight_BT)
    )
    mode2_N = batch.mode_label_BT.reshape(-1) >= 0.5
    scored_N = mode_weight_N > 0
    valid_N = scored_N | (lm_weight_N > 0)
    weighted_nll_N = nll_N * lm_weight_N
    by_token = _Sums(
        # where, not a product with the mode: a NaN of one mode must not reach the other.
        nll_mode1=torch.where(mode2_N, 0.0, weighted_nll_N),
        nll_mode2=torch.where(mode2_N, weighted_nll_N, 0.0),
        lm_weight_mode1=torch.where(mode2_N, 0.0, lm_weight_N),
        lm_weight_mode2=torch.where(mode2_N, lm_weight_N, 0.0),
        bce=bce_N * mode_weight_N,
        mode_weight=mode_weight_N,
        valid_tokens=valid_N,
        valid_tokens_mode2=valid_N & mode2_N,
        blocked_tokens=valid_N & (loss.blocked_BT.reshape(-1) != 0),
        scored_tokens=scored_N,
        correct_tokens=scored_N & ((logit_N > 0) == mode2_N),
    )
    return _Sums(*(tensor.sum(dtype=torch.float64) for tensor in by_token))


def position_histogram(outputs: Sequence[TokenOutputs], bits: int = DEFAULT_BITS) -> Tensor:
    """Count content tokens by position in their document: float64 [K, 2, bins], which add up.

    Bucket k of K holds positions 2**k to 2**(k+1) - 1, where `<|doc|>` stands at 0, so that the
    first token of content is at 1. The first token of a row that begins inside a document counts
    as position 1.
    """
    total = torch.zeros(2 * POSITION_BUCKETS << bits, dtype=torch.float64)
    for output in outputs:
        position_BT = output.batch.position_BT.clamp(1, (1 << POSITION_BUCKETS) - 1)
        # frexp is exact for integers in float64: position = m * 2**e with 0.5 <= m < 1.
        bucket_BT = torch.frexp(position_BT.to(torch.float64)).exponent.to(torch.int64) - 1
        total += _histogram(output, bits, bucket_BT, POSITION_BUCKETS).cpu()
    return total.view(POSITION_BUCKETS, 2, -1)


def auroc_by_position(histogram_K2B: Tensor) -> dict[str, float | None]:
    """Return the AUROC under each bucket's first position, for buckets that hold tokens."""
    return {
        str(1 << bucket): auroc_of_counts(*_counts(histogram_2B))
        for bucket, histogram_2B in enumerate(histogram_K2B)
        if histogram_2B.any()
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
