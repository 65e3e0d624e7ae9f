"""Decide by seeded draws which documents are held out, which are plain, and their order.

A draw is a pure function of seed, purpose and names, so it does not depend on the order of the
input, the number of workers, or how the work is split.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_mode.tokens.documents import Document
from megatron_mode.tokens.mode_tokens import ModeTokens
from megatron_mode.tokens.template import Rendering

DRAW_RANGE = 1 << 64
RENDERINGS: tuple[Rendering, ...] = ("chat", "plain")
HELD_OUT_CHAT, HELD_OUT_PLAIN = 2, 3


def draw(seed: int, purpose: str, *names: str) -> int:
    """Return a number in [0, 2**64) drawn for these names."""
    text = "\x1f".join((str(seed), purpose, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mode_token_key(seed: int, document: Document) -> int:
    """Return the key by which the places of a document's mode tokens are drawn."""
    return draw(seed, "mode-token", document.source, document.id)


def output_name(source: str, mode: int, code: int) -> str:
    """Return the name of the prepared source that an output code stands for."""
    if code < HELD_OUT_CHAT:
        return source
    return f"{source}-valid" if mode == 1 else f"{source}-valid-{RENDERINGS[code & 1]}"


@dataclass(frozen=True)
class Split:
    """Hold the shares (0 to 1, by document) and the sources that are held out completely."""

    seed: int
    plain_share: float
    valid_share: float
    valid_sources: frozenset[str]
    mode_tokens: ModeTokens = field(default_factory=ModeTokens)
    keeps_copies: bool = False
    """Keep documents whose contents came before in their source."""

    def is_held_out(self, document: Document) -> bool:
        """Tell whether a document is kept from training; equal ids of a source stay together."""
        if document.source in self.valid_sources:
            return True
        value = draw(self.seed, "valid", document.source, document.id)
        return value < self.valid_share * DRAW_RANGE

    def outputs(self, document: Document, line_number: int) -> list[int]:
        """Return the output codes of a document: 2 if it is held out, and 1 if it is plain."""
        if self.is_held_out(document):
            return [HELD_OUT_PLAIN] if document.mode == 1 else [HELD_OUT_PLAIN, HELD_OUT_CHAT]
        if document.mode == 1:
            return [1]
        # The line takes part so that a source whose lines all share one id is still mixed.
        names = (document.source, document.id, str(line_number))
        return [int(draw(self.seed, "plain", *names) < self.plain_share * DRAW_RANGE)]

    def order_digest(self, source: str, position: int, contents: Iterable[bytes]) -> bytes:
        """Return the 16 bytes by which the documents of a source are sorted: the shuffle.

        Copies share them, unless they are kept: then the position takes part.
        """
        digest = hashlib.blake2b(digest_size=16, key=order_key(self.seed, source))
        if self.keeps_copies:
            digest.update(position.to_bytes(8, "little"))
        for content in contents:
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.digest()


@functools.lru_cache(maxsize=1024)
def order_key(seed: int, source: str) -> bytes:
    """Return the key of a source's order."""
    return hashlib.blake2b(f"{seed}\x1forder\x1f{source}".encode(), digest_size=32).digest()
