"""Sum per-token results so that one all-reduce merges them, and turn the sums into metrics.

Letters: N tokens, S running sums, B bins of the mode logit, K position buckets.

An AUROC needs the order of all logits, which ranks cannot afford to exchange. A logit's float32 bit
pattern, flipped so that integers sort as floats do, is cut to its top bits instead: the bins are
monotone in the logit, so histograms add up and give the rank sum with ties inside a bin counted as
half. At 12 bits a bin is at most 12.5 % wide relative to the logit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_mode.tokens.flags import CONTROL

Floats = npt.NDArray[np.float64]

DEFAULT_BITS = 12
POSITION_BUCKETS = 16  # the last one starts at token 32,768 of a document and is open
_SUMS = (
    "nll_mode1",
    "nll_mode2",
    "lm_weight_mode1",
    "lm_weight_mode2",
    "bce",
    "mode_weight",
    "valid_tokens",
    "valid_tokens_mode2",
    "blocked_tokens",
    "scored_tokens",
    "correct_tokens",
)
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

    None where a class is absent or a logit was NaN: a diverged head has no AUROC.
    """
    if not mode1_B.sum() or not mode2_B.sum() or _holds_nan(mode1_B) or _holds_nan(mode2_B):
        return None
    below_B = np.cumsum(mode1_B) - mode1_B
    wins = float((mode2_B * (below_B + 0.5 * mode1_B)).sum())
    return wins / (float(mode1_B.sum()) * float(mode2_B.sum()))


def recall_of_counts(mode1_B: Floats, mode2_B: Floats, false_positive_rate: float) -> float | None:
    """Return the share of Mode 2 above the threshold that lets this share of Mode 1 through.

    A threshold that falls inside a bin takes the matching part of it, as the AUROC does with ties.
    """
    if not mode1_B.sum() or not mode2_B.sum() or _holds_nan(mode1_B) or _holds_nan(mode2_B):
        return None
    false_B = np.concatenate([[0.0], np.cumsum(mode1_B[::-1])])
    true_B = np.concatenate([[0.0], np.cumsum(mode2_B[::-1])])
    allowed = false_positive_rate * false_B[-1]
    # 1e-9 tokens of slack: 0.01 * 2900 must admit 29 tokens whatever its last bit is.
    whole = int(np.searchsorted(false_B, allowed + 1e-9, side="right")) - 1
    caught = float(true_B[whole])
    if whole + 1 < len(false_B):
        part = max(allowed - false_B[whole], 0.0) / (false_B[whole + 1] - false_B[whole])
        caught += part * float(true_B[whole + 1] - true_B[whole])
    return caught / float(true_B[-1])


def auroc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Return the exact AUROC of `scores` for labels >= 0.5 against the rest, ties as half.

    None where a class is absent or a score is NaN.
    """
    score_N = np.asarray(scores, dtype=np.float64).ravel()
    positive_N = np.asarray(labels, dtype=np.float64).ravel() >= 0.5
    positives = int(positive_N.sum())
    negatives = len(score_N) - positives
    if not positives or not negatives or np.isnan(score_N).any():
        return None
    sorted_negative = np.sort(score_N[~positive_N])
    below = np.searchsorted(sorted_negative, score_N[positive_N], side="left")
    not_above = np.searchsorted(sorted_negative, score_N[positive_N], side="right")
    return float((below + not_above).sum()) / 2 / (positives * negatives)


def _holds_nan(count_B: Floats) -> bool:
    bins = len(count_B)
    return bool(count_B[(0xFF800000 * bins >> 32) + 1 :].any())


def _histogram(index_N: Tensor, keep_N: Tensor, size: int) -> Tensor:
    """Count each index below `size` where `keep_N`; no data-dependent shape, so no GPU stall."""
    index_N = torch.where(keep_N, index_N, size)
    counts = torch.zeros(size + 1, dtype=torch.float64, device=index_N.device)
    counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.float64))
    return counts[:size]


@dataclass(frozen=True)
class TokenStatistics:
    """Hold sums and logit histograms of a set of tokens; add two to merge their sets.

    `sums_S` and `histogram_22B` ([content, control] x [Mode 1, Mode 2] x bin) are float64, exact
    for counts up to 2**53. Losses are those before blocking.
    """

    sums_S: Tensor
    histogram_22B: Tensor

    @classmethod
    def of(
        cls,
        *,
        nll_N: Tensor,
        bce_N: Tensor,
        mode_logit_N: Tensor,
        blocked_N: Tensor,
        lm_weight_N: Tensor,
        mode_label_N: Tensor,
        mode_weight_N: Tensor,
        flags_N: Tensor,
        bits: int = DEFAULT_BITS,
    ) -> TokenStatistics:
        """Sum one micro-batch; tensors of one size and any shape, flags uint8.

        Weights are those before blocking, `blocked_N` is nonzero where a loss lost the token, and
        a token is valid when either weight is positive. Labels >= 0.5 are Mode 2.
        """
        nll_N, bce_N, logit_N = (_flat64(tensor) for tensor in (nll_N, bce_N, mode_logit_N))
        lm_weight_N, mode_weight_N = _flat64(lm_weight_N), _flat64(mode_weight_N)
        mode2_N = mode_label_N.detach().reshape(-1) >= 0.5
        scored_N = mode_weight_N > 0
        valid_N = scored_N | (lm_weight_N > 0)
        weighted_nll_N = nll_N * lm_weight_N
        sums = {
            # where, not a product with the mode: a NaN of one mode must not reach the other.
            "nll_mode1": torch.where(mode2_N, 0.0, weighted_nll_N),
            "nll_mode2": torch.where(mode2_N, weighted_nll_N, 0.0),
            "lm_weight_mode1": torch.where(mode2_N, 0.0, lm_weight_N),
            "lm_weight_mode2": torch.where(mode2_N, lm_weight_N, 0.0),
            "bce": bce_N * mode_weight_N,
            "mode_weight": mode_weight_N,
            "valid_tokens": valid_N,
            "valid_tokens_mode2": valid_N & mode2_N,
            "blocked_tokens": valid_N & (blocked_N.detach().reshape(-1) != 0),
            "scored_tokens": scored_N,
            "correct_tokens": scored_N & ((logit_N > 0) == mode2_N),
        }
        control_N = (flags_N.reshape(-1) & CONTROL) != 0
        group_N = control_N.to(torch.int64) * 2 + mode2_N.to(torch.int64)
        index_N = (group_N << bits) + logit_bins(logit_N, bits)
        return cls(
            torch.stack([sums[name].sum(dtype=torch.float64) for name in _SUMS]),
            _histogram(index_N, scored_N, 4 << bits).view(2, 2, 1 << bits),
        )

    @classmethod
    def zero(cls, bits: int = DEFAULT_BITS, device: str | torch.device = "cpu") -> TokenStatistics:
        """Return the statistics of no tokens, for ranks that hold none."""
        size = len(_SUMS) + (4 << bits)
        return cls.from_vector(torch.zeros(size, dtype=torch.float64, device=device))

    @classmethod
    def from_vector(cls, vector: Tensor) -> TokenStatistics:
        """Undo `vector()`; the number of bins follows from the length."""
        return cls(vector[: len(_SUMS)], vector[len(_SUMS) :].view(2, 2, -1))

    def vector(self) -> Tensor:
        """Return everything as one float64 vector; vectors of equal `bits` may be added."""
        return torch.cat([self.sums_S, self.histogram_22B.reshape(-1)])

    def __add__(self, other: TokenStatistics) -> TokenStatistics:
        return TokenStatistics(self.sums_S + other.sums_S, self.histogram_22B + other.histogram_22B)

    def auroc(self, *, with_control: bool = False) -> float | None:
        """Return the token AUROC of the mode logit, control pieces left out unless asked for."""
        return auroc_of_counts(*self._counts(with_control))

    def recall(self, false_positive_rate: float, *, with_control: bool = False) -> float | None:
        """Return the recall of Mode 2 at a share of Mode 1 tokens called Mode 2."""
        return recall_of_counts(*self._counts(with_control), false_positive_rate)

    def metrics(self) -> dict[str, float | None]:
        """Return the metrics of design.md section 8 that tokens decide; None where undefined."""
        sums = dict(zip(_SUMS, self.sums_S.tolist(), strict=True))
        counts = self._counts(with_control=False)
        nll = sums["nll_mode1"] + sums["nll_mode2"]
        lm_weight = sums["lm_weight_mode1"] + sums["lm_weight_mode2"]
        return {
            "lm_loss": _ratio(nll, lm_weight),
            "lm_loss_mode1": _ratio(sums["nll_mode1"], sums["lm_weight_mode1"]),
            "lm_loss_mode2": _ratio(sums["nll_mode2"], sums["lm_weight_mode2"]),
            "mode_loss": _ratio(sums["bce"], sums["mode_weight"]),
            "mode_accuracy": _ratio(sums["correct_tokens"], sums["scored_tokens"]),
            "mode_auroc": auroc_of_counts(*counts),
            "mode_recall_at_fpr01": recall_of_counts(*counts, 0.01),
            "mode_recall_at_fpr05": recall_of_counts(*counts, 0.05),
            "mode2_token_fraction_realised": _ratio(
                sums["valid_tokens_mode2"], sums["valid_tokens"]
            ),
            "blocked_share": _ratio(sums["blocked_tokens"], sums["valid_tokens"]),
        }

    def _counts(self, with_control: bool) -> tuple[Floats, Floats]:
        chosen_2B = self.histogram_22B.sum(0) if with_control else self.histogram_22B[0]
        mode1_B, mode2_B = chosen_2B.cpu().numpy()
        return mode1_B, mode2_B


@dataclass(frozen=True)
class PositionStatistics:
    """Hold logit histograms of content tokens by position in the document; add two to merge.

    `histogram_K2B` is float64 ([bucket] x [Mode 1, Mode 2] x bin). Bucket k holds positions 2**k to
    2**(k+1) - 1, where `<|doc|>` stands at 0, so that the first token of content is at 1. The
    first token of a row that begins inside a document counts as position 1.
    """

    histogram_K2B: Tensor

    @classmethod
    def of(
        cls,
        *,
        mode_logit_N: Tensor,
        mode_label_N: Tensor,
        mode_weight_N: Tensor,
        flags_N: Tensor,
        position_N: Tensor,
        bits: int = DEFAULT_BITS,
    ) -> PositionStatistics:
        """Count one micro-batch; tensors of one size and any shape, flags uint8."""
        position_N = position_N.reshape(-1).clamp(1, (1 << POSITION_BUCKETS) - 1)
        # frexp is exact for integers in float64: position = m * 2**e with 0.5 <= m < 1.
        bucket_N = torch.frexp(position_N.to(torch.float64)).exponent.to(torch.int64) - 1
        mode2_N = (mode_label_N.reshape(-1) >= 0.5).to(torch.int64)
        content_N = (flags_N.reshape(-1) & CONTROL) == 0
        index_N = (bucket_N * 2 + mode2_N << bits) + logit_bins(mode_logit_N.reshape(-1), bits)
        keep_N = content_N & (mode_weight_N.reshape(-1) > 0)
        size = 2 * POSITION_BUCKETS << bits
        return cls(_histogram(index_N, keep_N, size).view(POSITION_BUCKETS, 2, -1))

    @classmethod
    def zero(cls, bits: int = DEFAULT_BITS) -> PositionStatistics:
        """Return the statistics of no tokens."""
        return cls(torch.zeros(POSITION_BUCKETS, 2, 1 << bits, dtype=torch.float64))

    @classmethod
    def from_vector(cls, vector: Tensor) -> PositionStatistics:
        """Undo `vector()`; the number of bins follows from the length."""
        return cls(vector.view(POSITION_BUCKETS, 2, -1))

    def vector(self) -> Tensor:
        """Return everything as one float64 vector; vectors of equal `bits` may be added."""
        return self.histogram_K2B.reshape(-1)

    def __add__(self, other: PositionStatistics) -> PositionStatistics:
        return PositionStatistics(self.histogram_K2B + other.histogram_K2B)

    def auroc_by_position(self) -> dict[str, float | None]:
        """Return the AUROC under each bucket's first position, for buckets that hold tokens."""
        result = {}
        for bucket, (mode1_B, mode2_B) in enumerate(self.histogram_K2B.cpu().numpy()):
            if mode1_B.any() or mode2_B.any():
                result[str(1 << bucket)] = auroc_of_counts(mode1_B, mode2_B)
        return result


def _flat64(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).to(torch.float64)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
