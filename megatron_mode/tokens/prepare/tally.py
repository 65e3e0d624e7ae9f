"""Count what a prepared source holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_mode.tokens.prepare.encoded import RENDERINGS, Records, codes


class Tally:
    """Add up the documents of one prepared source."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.text_bytes = self.plain = self.renamed = 0
        self._lengths = np.zeros(32, np.int64)

    def add(self, records: Records, renamed: int) -> None:
        """Count documents, some of them with a new id."""
        lengths = records["tokens"].astype(np.int64)
        self.documents += len(records)
        self.tokens += int(lengths.sum())
        self.text_bytes += int(records["text_bytes"].sum(dtype=np.int64))
        self.plain += int((codes(records) & 1).sum())
        self.renamed += renamed
        bins = np.log2(lengths).astype(np.int64)
        self._lengths += np.bincount(bins, minlength=len(self._lengths))

    @property
    def rendering(self) -> str:
        """Return the rendering of all documents, or `mixed`."""
        if 0 < self.plain < self.documents:
            return "mixed"
        return RENDERINGS[self.plain > 0]

    def facts(self) -> dict[str, Any]:
        """Return the entries of NAME.json.

        Bin k of lengths_log2 counts the documents of 2**k to 2**(k+1)-1 tokens.
        """
        filled = np.flatnonzero(self._lengths)
        return {
            "rendering": self.rendering,
            "plain_documents": self.plain,
            "repeated_ids": self.renamed,
            "text_bytes": self.text_bytes,
            "tokens_per_byte": round(self.tokens / max(1, self.text_bytes), 6),
            "lengths_log2": self._lengths[: filled[-1] + 1].tolist() if len(filled) else [],
        }
