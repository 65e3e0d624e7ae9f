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
    """Hold a document's scores.

    `nll_N[i]` is that of token i after those before it; `nll_N[0]` is nan, since nothing precedes
    the first token.
    """

    nll_N: Tensor
    mode_logit_N: Tensor


class Window(NamedTuple):
    """Take tokens [begin, end) of a document as input, and keep the scores from `keep` on."""

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
        """Load a checkpoint folder, or the newest one of a run folder.

        Raises CheckpointError when it is missing or damaged.
        """
        folder = resolve_folder(path)
        self.decoder, self.config, self.manifest = load_decoder(folder)
        tokenizer = folder / TOKENIZER_NAME
        if TOKENIZER_NAME in self.manifest.files:
            check_files(folder, self.manifest, [TOKENIZER_NAME])
        if not tokenizer.is_file():
            raise CheckpointError(
                f"{folder} lacks {TOKENIZER_NAME}: copy it there from the data folder of the run"
            )
        self.tokenizer = Tokenizer.load(tokenizer)
        if self.tokenizer.padded_vocab_size != self.config.model.vocab_size:
            raise CheckpointError(
                f"{tokenizer} has {self.tokenizer.padded_vocab_size} pieces with padding, the "
                f"model {self.config.model.vocab_size}: copy the run's own tokenizer there"
            )
        self.mode_loss = ModeLoss(LossConfig(), self.tokenizer.vocab_size)

    @property
    def seq_len(self) -> int:
        """Return the row length of the model in tokens."""
        return self.config.model.seq_len

    def score(self, ids: Sequence[int]) -> TokenScores:
        """Score one document's ids, `<|doc|>` first."""
        ids_N = torch.tensor(ids)
        nll_N = torch.full((len(ids),), float("nan"))
        logit_N = torch.zeros(len(ids))
        todo = list(windows(len(ids), self.seq_len))
        for first in range(0, len(todo), BATCH_WINDOWS):
            batch = todo[first : first + BATCH_WINDOWS]
            nll_BT, logit_BT = self._score_windows(ids_N, batch)
            for row, window in enumerate(batch):
                begin, end, keep = window
                logit_N[keep:end] = logit_BT[row, keep - begin : end - begin]
                # The score of predicting token t + 1 stands at position t.
                last = min(end, len(ids) - 1)
                nll_N[keep + 1 : last + 1] = nll_BT[row, keep - begin : last - begin]
        return TokenScores(nll_N, logit_N)

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the LM logits [V] after the ids, unused columns left out."""
        ids_BT = torch.tensor([list(ids[-self.seq_len :])])
        with torch.no_grad():
            heads = self.decoder(ids_BT, torch.arange(ids_BT.shape[1]).unsqueeze(0))
            logits_V: Tensor = heads.local_lm_weight_VD @ heads.hidden_TBD[-1, 0]
        return logits_V[: self.tokenizer.vocab_size]

    def _score_windows(self, ids_N: Tensor, batch: list[Window]) -> tuple[Tensor, Tensor]:
        width = max(window.end - window.begin for window in batch)
        input_BT = torch.zeros(len(batch), width, dtype=torch.int64)
        target_BT = torch.zeros_like(input_BT)
        lm_weight_BT = torch.zeros(len(batch), width)
        mode_weight_BT = torch.zeros_like(lm_weight_BT)
        for row, (begin, end, _) in enumerate(batch):
            input_BT[row, : end - begin] = ids_N[begin:end]
            target_N = ids_N[begin + 1 : end + 1]
            target_BT[row, : len(target_N)] = target_N
            lm_weight_BT[row, : len(target_N)] = 1
            mode_weight_BT[row, : end - begin] = 1
        position_BT = torch.arange(width).expand(len(batch), width)
        with torch.no_grad():
            heads = self.decoder(input_BT, position_BT)
            label_BT = torch.zeros_like(lm_weight_BT)
            targets = Targets(target_BT, lm_weight_BT, label_BT, mode_weight_BT)
            result = self.mode_loss(
                heads.hidden_TBD,
                heads.local_lm_weight_VD,
                heads.mode_weight_D,
                heads.mode_bias,
                targets,
                blocking_active=False,
            )
        return result.nll_BT, result.mode_logit_BT
