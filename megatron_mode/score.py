"""Score documents with a checkpoint: loss and mode logit of every token, in one process.

A document longer than a row is read in windows that overlap by half, and each token is scored in
the window that gives it the most context. T row length, B windows, N tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mode.checkpoint.load import load_decoder, resolve_folder
from megatron_mode.checkpoint.manifest import TOKENIZER_NAME, check_files
from megatron_mode.config.fields import LossConfig
from megatron_mode.errors import CheckpointError
from megatron_mode.kernels.mode_loss import Targets
from megatron_mode.loss.mode_loss import ModeLoss
from megatron_mode.tokens.tokenizer import Tokenizer

BATCH_WINDOWS = 8


class TokenScores(NamedTuple):
    """Hold a document's scores; `nll_N[0]` is nan, since nothing precedes the first token."""

    nll_N: Tensor
    mode_logit_N: Tensor


class Window(NamedTuple):
    """Take tokens [begin, end) of a document as input, and keep the scores from token `keep`."""

    begin: int
    end: int
    keep: int


def windows(tokens: int, seq_len: int) -> Iterator[Window]:
    """Cut a document into rows that overlap by half; every token is kept exactly once."""
    begin, kept = 0, 0
    while kept < tokens:
        end = min(begin + seq_len, tokens)
        yield Window(begin, end, kept)
        kept = end
        begin = max(0, end - seq_len // 2) if end < tokens else end


class Scorer:
    """Hold a checkpoint's model and tokenizer."""

    def __init__(self, path: Path) -> None:
        """Load a checkpoint folder, or a run's newest; raises CheckpointError if that fails."""
        folder = resolve_folder(path)
        self.decoder, self.config, self.manifest = load_decoder(folder)
        self.seq_len = self.config.model.seq_len
        if TOKENIZER_NAME in self.manifest.files:
            check_files(folder, self.manifest, [TOKENIZER_NAME])
        tokenizer = folder / TOKENIZER_NAME
        if not tokenizer.is_file():
            raise CheckpointError(
                f"{folder} lacks {TOKENIZER_NAME}: copy it there from the data folder of the run"
            )
        self.tokenizer = Tokenizer.load(tokenizer)
        padded_vocab_size = self.tokenizer.vocabulary.padded_vocab_size
        if padded_vocab_size != self.config.model.vocab_size:
            raise CheckpointError(
                f"{tokenizer} has {padded_vocab_size} pieces with padding, the "
                f"model {self.config.model.vocab_size}: copy the run's own tokenizer there"
            )
        self.mode_loss = ModeLoss(LossConfig(), self.tokenizer.vocab_size)

    def score(self, ids: Sequence[int]) -> TokenScores:
        """Score one document's ids, `<|doc|>` first."""
        ids_N = torch.tensor(ids)
        scores = TokenScores(torch.full((len(ids),), float("nan")), torch.zeros(len(ids)))
        todo = list(windows(len(ids), self.seq_len))
        for first in range(0, len(todo), BATCH_WINDOWS):
            batch = todo[first : first + BATCH_WINDOWS]
            found = self._score_windows(ids_N, batch)
            for (begin, end, keep), nll_T, logit_T in zip(batch, *found, strict=True):
                scores.mode_logit_N[keep:end] = logit_T[keep - begin : end - begin]
                # The score of predicting token t + 1 stands at position t.
                last = min(end, len(ids) - 1)
                scores.nll_N[keep + 1 : last + 1] = nll_T[keep - begin : last - begin]
        return scores

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the LM logits [V] after the ids, unused columns left out."""
        ids_BT = torch.tensor([list(ids[-self.seq_len :])])
        with torch.no_grad():
            heads = self.decoder(ids_BT, torch.arange(ids_BT.shape[1]).unsqueeze(0))
            logits_V: Tensor = heads.local_lm_weight_VD @ heads.hidden_TBD[-1, 0]
        return logits_V[: self.tokenizer.vocab_size]

    def _score_windows(self, ids_N: Tensor, batch: list[Window]) -> tuple[Tensor, Tensor]:
        """Return loss and mode logit [B, T] of windows; what they lack of a row is filled up."""
        begin_B1, end_B1, _ = torch.tensor(batch).T.unsqueeze(-1)
        position_BT = torch.arange(int((end_B1 - begin_B1).max())).expand(len(batch), -1)
        place_BT = begin_B1 + position_BT
        is_input_BT = place_BT < end_B1
        has_target_BT = is_input_BT & (place_BT + 1 < len(ids_N))
        padded_N = torch.cat((ids_N, torch.zeros(self.seq_len + 1, dtype=torch.int64)))
        with torch.no_grad():
            heads = self.decoder(padded_N[place_BT] * is_input_BT, position_BT)
            result = self.mode_loss(
                heads.hidden_TBD,
                heads.local_lm_weight_VD,
                heads.mode_weight_D,
                heads.mode_bias,
                Targets(
                    padded_N[place_BT + 1] * has_target_BT,
                    has_target_BT.float(),
                    torch.zeros(place_BT.shape),
                    is_input_BT.float(),
                ),
                blocking_active=False,
            )
        return result.nll_BT, result.mode_logit_BT
