"""Held-out figures are grouped by rendering, and each dialogue counts once in the LM loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mode.errors import DataError
from megatron_mode.evaluate.held_out import EVALUATION_BITS, Piece, SourceResult, rendering_of
from megatron_mode.evaluate.valid import valid_summary
from megatron_mode.report.metrics import position_histogram, token_sums


def result(name, mode, rendering, *logits, nll=1.0):
    """Return a source whose documents have these mean mode logits, and one token of a loss."""
    tokens_S = token_sums([], EVALUATION_BITS)
    tokens_S[mode - 1], tokens_S[mode + 1] = nll, 1.0  # the sums of loss and of weight
    pieces = [Piece(mode == 2, from_start=True, mean_logit=logit) for logit in logits]
    nothing = token_sums([], EVALUATION_BITS)
    return SourceResult(
        name, mode, rendering, tokens_S, nothing, position_histogram([]), pieces, Counter({mode: 1})
    )


BOOKS = result("books", 1, "plain", 0.0, 2.0, nll=5.0)
PLAIN = result("talk-plain", 2, "plain", 1.0, nll=4.0)


@pytest.mark.parametrize("rendering", ["chat", "mixed"])
def test_dialogues_with_markers_are_a_group_of_their_own(rendering):
    chat = result("talk", 2, rendering, 3.0, nll=3.0)
    summary = valid_summary([BOOKS, PLAIN, chat])
    assert summary["valid_mode_auroc_documents"] == 0.5
    assert summary["valid_mode_auroc_documents_chat"] == 1.0
    assert summary["valid_lm_loss"] == 4.0, "books and the dialogues with markers"
    assert summary["valid"]["talk"]["rendering"] == rendering
    assert summary["valid"]["talk-plain"]["mode_auroc_documents"] == 0.5


def test_without_markers_the_loss_is_of_the_plain_dialogues():
    summary = valid_summary([BOOKS, PLAIN])
    assert summary["valid_lm_loss"] == 4.5
    assert summary["valid_mode_auroc_documents_chat"] is None
    assert summary["unigram_entropy"] == pytest.approx(0.6931, abs=1e-4)


def test_an_unknown_rendering_is_one_sentence():
    source = SimpleNamespace(root=Path("data"), name="talk", info={"rendering": "sung"})
    with pytest.raises(DataError, match=r"data/talk\.json: rendering is 'sung', .* plain, chat"):
        rendering_of(source)
    assert rendering_of(SimpleNamespace(info={})) == "plain"
