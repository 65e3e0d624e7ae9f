"""Choose the text that a tokenizer is trained on."""

from __future__ import annotations

import heapq
from itertools import count

from megatron_mode.tokens.documents import Document
from megatron_mode.tokens.prepare.encode import ReportProgress, line_batches, parse_batch
from megatron_mode.tokens.prepare.request import Preparation
from megatron_mode.tokens.prepare.split import draw
from megatron_mode.tokens.prepare.verdicts import BadLines, empty_corpus
from megatron_mode.tokens.template import plain_text

# Training on this much takes 6 s at 32,768 pieces and 0.3 GB; more text changes few pieces.
TOKENIZER_SAMPLE_BYTES = 24 << 20


def sample_texts(plan: Preparation, report_progress: ReportProgress) -> list[str]:
    """Return up to TOKENIZER_SAMPLE_BYTES of text, each document equally likely to be in it.

    Held-out documents are left out unless there is nothing else.
    """
    trained, held_out = TextSample(), TextSample()
    bad_lines = BadLines(plan.max_bad_lines)
    for batch in line_batches(list(enumerate(plan.inputs)), report_progress):
        numbered, found = parse_batch(batch)
        bad_lines.add(batch.path, found)
        for number, document in numbered:
            sample = held_out if plan.split.is_held_out(document) else trained
            sample.add(plan.split.seed, document, number)
    if not trained.texts and not held_out.texts:
        raise empty_corpus(plan.inputs)
    return trained.texts or held_out.texts


class TextSample:
    """Keep the texts with the smallest draws whose sum stays within the byte limit."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._order = count()
        self._bytes = 0

    def add(self, seed: int, document: Document, line_number: int) -> None:
        """Offer a document."""
        text = plain_text(document)
        names = (document.source, document.id, str(line_number))
        heapq.heappush(self._heap, (-draw(seed, "tokenizer", *names), next(self._order), text))
        self._bytes += len(text.encode())
        while self._bytes > TOKENIZER_SAMPLE_BYTES and len(self._heap) > 1:
            self._bytes -= len(heapq.heappop(self._heap)[2].encode())

    @property
    def texts(self) -> list[str]:
        """Return the texts kept, in input order."""
        return [text for _, _, text in sorted(self._heap, key=lambda entry: entry[1])]
