"""Offer prepared sources that live in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside the tests

DOC, ROLE_NONE, ASSISTANT, USER = 0, 0, 3, 2


class MemorySource:
    """Hold random documents; each is <|doc|> and then tokens in spans of one role."""

    def __init__(self, name: str, mode: int, tokens: int, seed: int, longest: int = 30) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.mode, self.tokens = name, mode, tokens
        ids: list[int] = []
        flags: list[int] = []
        starts: list[int] = []
        bit = 1 if mode == 2 else 0
        while len(ids) < tokens:
            starts.append(len(ids))
            ids.append(DOC)
            flags.append(bit | 64)
            for _ in range(int(rng.integers(0, 5))):
                span = int(rng.integers(1, longest))
                role = int(rng.choice([USER, ASSISTANT])) if mode == 2 else ROLE_NONE
                extra = int(rng.choice([0, 0, 0, 2, 4, 6]))
                ids.extend(rng.integers(1, 60_000, span).tolist())
                flags.extend([bit | role << 3 | extra] * span)
        self.ids = np.array(ids[:tokens], np.uint16)
        self.flags = np.array(flags[:tokens], np.uint8)
        self.starts = np.array([at for at in starts if at < tokens], np.int64)
        self.fail_at: int | None = None

    def read(
        self, begin_token: int, end_token: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        if self.fail_at is not None and begin_token >= self.fail_at:
            raise OSError("the disk is gone")
        part = slice(begin_token, end_token)
        return self.ids[part].astype(np.int64), self.flags[part]

    def document_starts(self, begin_token: int, end_token: int) -> npt.NDArray[np.int64]:
        low, high = np.searchsorted(self.starts, [begin_token, end_token])
        return self.starts[low:high]


@pytest.fixture
def memory_source() -> Callable[..., MemorySource]:
    """Return the maker of in-memory sources: (name, mode, tokens, seed, longest=30)."""
    return MemorySource
