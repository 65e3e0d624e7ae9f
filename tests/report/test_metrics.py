from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mode.report.metrics import (
    PositionStatistics,
    TokenStatistics,
    auroc,
    logit_bins,
    recall_of_counts,
)
from megatron_mode.tokens.flags import CONTROL, MODE2

floats32 = st.floats(width=32, allow_nan=False)
# Few values, so that ties are common; wide gaps, so that distinct ones fall in distinct bins.
coarse = st.sampled_from([-30.0, -4.0, -1.0, -0.0, 0.0, 0.5, 2.0, 16.0])
scored = st.lists(st.tuples(coarse, st.booleans()), min_size=1, max_size=30)


def brute_auroc(pairs):
    """Compare every Mode 2 score with every Mode 1 score."""
    high = [score for score, label in pairs if label]
    low = [score for score, label in pairs if not label]
    if not high or not low:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    return wins / (len(high) * len(low))


def brute_recall(pairs, rate):
    """Walk down the thresholds; take part of the tie that crosses the allowed false positives."""
    high = sum(label for _, label in pairs)
    low = len(pairs) - high
    if not high or not low:
        return None
    allowed, caught, passed = rate * low, 0.0, 0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        hits = sum(label for score, label in pairs if score == threshold)
        false = sum(not label for score, label in pairs if score == threshold)
        if passed + false > allowed:
            return (caught + hits * (allowed - passed) / false) / high
        caught, passed = caught + hits, passed + false
    return caught / high


def tokens_of(count, seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)
    label = (torch.rand(count, generator=generator) < 0.4).float()
    fields = {
        "nll_N": torch.rand(count, generator=generator) * 9,
        "bce_N": torch.rand(count, generator=generator),
        "mode_logit_N": torch.randn(count, generator=generator) * 3 + label,
        "blocked_N": torch.rand(count, generator=generator) < 0.1,
        "lm_weight_N": (torch.rand(count, generator=generator) < 0.9).float() * 1.5,
        "mode_label_N": label,
        "mode_weight_N": (torch.rand(count, generator=generator) < 0.8).float() * 0.5,
        "flags_N": ((torch.rand(count, generator=generator) < 0.2) * CONTROL + MODE2).to(
            torch.uint8
        ),
    }
    return {**fields, **changed}


def pairs_of(fields, content_only=True):
    keep = fields["mode_weight_N"] > 0
    if content_only:
        keep &= (fields["flags_N"] & CONTROL) == 0
    logits, labels = fields["mode_logit_N"][keep], fields["mode_label_N"][keep] >= 0.5
    return list(zip(logits.tolist(), labels.tolist(), strict=True))


@given(st.lists(floats32, min_size=2, max_size=20), st.sampled_from([10, 12, 16, 24]))
def test_bins_never_fall_as_the_logit_rises(values, bits):
    ordered = torch.tensor(sorted(values), dtype=torch.float32)
    bins = logit_bins(ordered, bits)
    assert (bins.diff() >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 1 << bits


def test_bins_are_narrow_and_keep_zero_and_nan_apart():
    bins = logit_bins(torch.tensor([-math.inf, -1e-3, -0.0, 0.0, 1e-3, 1.0, 1.13, math.inf]))
    assert bins[2] == bins[3]
    assert len(set(bins.tolist())) == 7
    assert logit_bins(torch.tensor([math.nan]))[0] > bins[-1]
    assert logit_bins(torch.tensor([-math.nan]))[0] > bins[-1]


@given(scored)
def test_exact_auroc_is_the_share_of_won_pairs(pairs):
    scores, labels = zip(*pairs, strict=True)
    assert auroc(scores, labels) == pytest.approx(brute_auroc(pairs), abs=1e-12)


def test_exact_auroc_of_nan_is_none():
    assert auroc([math.nan, 1.0], [0, 1]) is None


@given(scored, st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]))
def test_histograms_give_auroc_and_recall_with_ties(pairs, rate):
    logits, labels = (
        torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True)
    )
    ones = torch.ones(len(pairs))
    statistics = TokenStatistics.of(
        **tokens_of(
            len(pairs),
            mode_logit_N=logits,
            mode_label_N=labels,
            mode_weight_N=ones,
            flags_N=torch.zeros(len(pairs), dtype=torch.uint8),
        )
    )
    assert statistics.auroc() == pytest.approx(brute_auroc(pairs), abs=1e-12)
    assert statistics.recall(rate) == pytest.approx(brute_recall(pairs, rate), abs=1e-9)


def test_continuous_logits_come_within_the_bins_of_the_exact_figures():
    fields = tokens_of(2000, seed=3)
    pairs = pairs_of(fields)
    exact, exact_recall = brute_auroc(pairs), brute_recall(pairs, 0.01)
    coarse12, fine20 = (TokenStatistics.of(**fields, bits=bits) for bits in (12, 20))
    assert coarse12.auroc() == pytest.approx(exact, abs=2e-3)
    assert fine20.auroc() == pytest.approx(exact, abs=1e-5)
    assert fine20.recall(0.01) == pytest.approx(exact_recall, abs=2e-3)
    everything = brute_auroc(pairs_of(fields, content_only=False))
    assert fine20.auroc(with_control=True) == pytest.approx(everything, abs=1e-5)
    assert abs(everything - exact) > 1e-4  # else the line above could not tell


def test_losses_and_shares_match_a_loop_over_tokens():
    fields = tokens_of(300, seed=1)
    sums = dict.fromkeys(("nll1", "w1", "nll2", "w2", "bce", "c", "valid", "mode2", "blocked"), 0.0)
    correct = total = 0
    rows = zip(*(fields[name].tolist() for name in fields), strict=True)
    for nll, bce, logit, blocked, a, label, c, _ in rows:
        mode = 2 if label >= 0.5 else 1
        sums[f"nll{mode}"] += a * nll
        sums[f"w{mode}"] += a
        sums["bce"] += c * bce
        sums["c"] += c
        if a > 0 or c > 0:
            sums["valid"] += 1
            sums["mode2"] += mode == 2
            sums["blocked"] += blocked
        if c > 0:
            total += 1
            correct += (logit > 0) == (mode == 2)
    metrics = TokenStatistics.of(**fields).metrics()
    expected = {
        "lm_loss": (sums["nll1"] + sums["nll2"]) / (sums["w1"] + sums["w2"]),
        "lm_loss_mode1": sums["nll1"] / sums["w1"],
        "lm_loss_mode2": sums["nll2"] / sums["w2"],
        "mode_loss": sums["bce"] / sums["c"],
        "mode_accuracy": correct / total,
        "mode2_token_fraction_realised": sums["mode2"] / sums["valid"],
        "blocked_share": sums["blocked"] / sums["valid"],
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(0, 5), st.data())
def test_merged_parts_equal_the_whole(count, seed, data):
    cut = data.draw(st.integers(0, count))
    fields = tokens_of(count, seed)
    parts = [
        TokenStatistics.of(**{name: value[part] for name, value in fields.items()})
        for part in (slice(0, cut), slice(cut, count))
    ]
    whole = TokenStatistics.of(**fields)
    reduced = TokenStatistics.from_vector(parts[0].vector() + parts[1].vector())
    added = parts[0] + parts[1] + TokenStatistics.zero()
    torch.testing.assert_close(reduced.vector(), whole.vector(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(added.vector(), whole.vector(), rtol=1e-12, atol=1e-12)
    assert whole.vector().dtype == torch.float64
    for name, value in whole.metrics().items():
        merged = reduced.metrics()[name]
        assert merged is value is None or merged == pytest.approx(value, rel=1e-12), name


def test_shape_does_not_matter():
    fields = tokens_of(24)
    square = {name: value.view(4, 6) for name, value in fields.items()}
    assert torch.equal(TokenStatistics.of(**fields).vector(), TokenStatistics.of(**square).vector())


def test_absent_class_and_no_tokens_give_none():
    only_mode1 = TokenStatistics.of(**tokens_of(50, mode_label_N=torch.zeros(50))).metrics()
    assert only_mode1["lm_loss_mode1"] == only_mode1["lm_loss"]
    for name in ("lm_loss_mode2", "mode_auroc", "mode_recall_at_fpr01", "mode_recall_at_fpr05"):
        assert only_mode1[name] is None
    assert only_mode1["mode2_token_fraction_realised"] == 0
    assert set(TokenStatistics.zero().metrics().values()) == {None}


def test_nan_in_one_mode_leaves_the_other_and_unsets_the_auroc():
    fields = tokens_of(200)
    mode2 = fields["mode_label_N"] >= 0.5
    fields["nll_N"] = torch.where(mode2, math.nan, fields["nll_N"])
    fields["mode_logit_N"] = torch.where(mode2, math.nan, fields["mode_logit_N"])
    metrics = TokenStatistics.of(**fields).metrics()
    assert math.isfinite(metrics["lm_loss_mode1"])
    assert math.isnan(metrics["lm_loss_mode2"])
    assert metrics["mode_auroc"] is None
    assert metrics["mode_recall_at_fpr01"] is None


def test_recall_of_a_separating_head_is_one():
    assert recall_of_counts(np.array([100.0, 0, 0]), np.array([0.0, 0, 7]), 0.01) == 1
    assert recall_of_counts(np.array([0.0, 0, 100]), np.array([7.0, 0, 0]), 0.01) == 0


def test_positions_are_bucketed_by_powers_of_two():
    fields = tokens_of(3000, seed=2, flags_N=torch.zeros(3000, dtype=torch.uint8))
    fields["flags_N"][::7] = CONTROL
    kept = ("mode_logit_N", "mode_label_N", "mode_weight_N", "flags_N")
    chosen = {name: fields[name] for name in kept}
    position = torch.arange(3000) % 40
    statistics = PositionStatistics.of(**chosen, position_N=position, bits=20)
    result = statistics.auroc_by_position()
    assert list(result) == ["1", "2", "4", "8", "16", "32"]
    for first, value in result.items():
        low, high = (0 if first == "1" else int(first)), 2 * int(first)
        inside = (position >= low) & (position < high)
        pairs = pairs_of({name: tensor[inside] for name, tensor in chosen.items()})
        assert value == pytest.approx(brute_auroc(pairs), abs=1e-3)
    halves = [
        PositionStatistics.of(
            **{name: tensor[half] for name, tensor in chosen.items()}, position_N=position[half]
        ).vector()
        for half in (slice(0, 1000), slice(1000, 3000))
    ]
    whole = PositionStatistics.of(**chosen, position_N=position)
    assert torch.equal(halves[0] + halves[1], whole.vector())
    assert torch.equal((whole + PositionStatistics.zero()).vector(), whole.vector())
    again = PositionStatistics.from_vector(whole.vector()).auroc_by_position()
    assert again == whole.auroc_by_position()


def test_a_position_beyond_the_last_bucket_counts_there():
    fields = tokens_of(2, mode_weight_N=torch.ones(2), flags_N=torch.zeros(2, dtype=torch.uint8))
    kept = ("mode_logit_N", "mode_label_N", "mode_weight_N", "flags_N")
    far = torch.tensor([10**9, 2**15])
    statistics = PositionStatistics.of(**{name: fields[name] for name in kept}, position_N=far)
    assert list(statistics.auroc_by_position()) == [str(2**15)]
