"""Write <|mode1|> or <|mode2|> into a rendered document: the alternative to the mode logit.

    start      right after <|doc|>
    end        last in the document
    sporadic   before each content token with probability `rate`, at seeded places

The token is that of the document's mode and takes the role of its place. It gives the mode away,
so it never carries mode loss itself; the tokens after it see it, which is what it is for, and a
mode loss on them measures little but that the token was read. Whether predicting it is trained is
`train`. Places are a pure function of seed, source and id: workers, shards and order do not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from megatron_mode.errors import ConfigError
from megatron_mode.tokens.flags import CONTROL, MODE2, NO_LM_LOSS, NO_MODE_LOSS, ROLE_MASK

Placement = Literal["none", "start", "end", "sporadic"]
Setting = Literal["keep", "strip", "swap", "forge"]
MODE_PIECES = ("<|mode1|>", "<|mode2|>")

Rendered = tuple[list[int], bytes]


@dataclass(frozen=True)
class ModeTokens:
    """Say where mode tokens stand and whether predicting them is trained."""

    placement: Placement = "none"
    rate: float = 0.0
    """Probability, for `sporadic` only."""
    train: bool = False

    def places(self, flags: bytes, key: int) -> list[int]:
        """Return the positions before which a token goes, in order; len(flags) is the end."""
        match self.placement:
            case "none":
                return []
            case "start":
                return [1]
            case "end":
                return [len(flags)]
            case "sporadic":
                content = content_positions(flags)
                # The raw stream is fixed for good, which that of a Generator's methods is not.
                raw = np.random.PCG64(key).random_raw(len(content))
                return list(content[(raw >> np.uint64(11)) * 2.0**-53 < self.rate].tolist())
        assert_never(self.placement)

    def insert(self, rendered: Rendered, control: Mapping[str, int], key: int) -> Rendered:
        """Return (ids, flags) with the true tokens of a rendered document, <|doc|> first."""
        flags = rendered[1]
        piece = control[MODE_PIECES[true_mode(flags) - 1]]
        bits = 0 if self.train else NO_LM_LOSS
        # Before a content token it takes that one's role, at the start and the end its left one's.
        side = 0 if self.placement == "sporadic" else -1
        return with_piece(rendered, self.places(flags, key), piece, bits, side)

    def record(self, seed: int) -> dict[str, Any] | None:
        """Return what NAME.json says of them; None where there are none."""
        if self.placement == "none":
            return None
        found: dict[str, Any] = {"placement": self.placement, "train": self.train, "seed": seed}
        return {**found, "rate": self.rate} if self.placement == "sporadic" else found


def content_positions(flags: bytes) -> NDArray[np.int64]:
    """Return the positions of the tokens that are no control piece."""
    return np.flatnonzero((np.frombuffer(flags, np.uint8) & CONTROL) == 0)


def true_mode(flags: bytes) -> int:
    """Return the mode of a document, 1 or 2, by its first token."""
    return 2 if flags[0] & MODE2 else 1


def with_piece(
    rendered: Rendered, places: Sequence[int], piece: int, bits: int, side: int
) -> Rendered:
    """Insert a mode piece before each of these positions; mode and role are those at its side.

    In a turn that is not trained it has no role, by which rows know where the flag comes from.
    bits are added to the flags of a mode piece; side is 0 (right) or -1 (left).
    """
    ids, flags = rendered
    new_ids: list[int] = []
    new_flags = bytearray()
    for begin, place in itertools.pairwise([0, *places]):
        taken = flags[place + side] & (MODE2 | ROLE_MASK)
        if flags[place + side] & NO_LM_LOSS:  # a turn that is not trained
            taken = taken & MODE2 | NO_LM_LOSS
        new_ids += [*ids[begin:place], piece]
        new_flags += flags[begin:place]
        new_flags.append(CONTROL | NO_MODE_LOSS | bits | taken)
    end = places[-1] if places else 0
    return [*new_ids, *ids[end:]], bytes(new_flags + flags[end:])


def rearrange(
    rendered: Rendered, setting: Setting, tokens: ModeTokens, control: Mapping[str, int],
    keys: tuple[int, int],
) -> Rendered:  # fmt: skip
    """Return a document with its true tokens, none, the other mode's, or one false one more.

    keys are those of the true places and of the false one, which falls into the middle half of the
    content.
    """
    if setting == "strip":
        return rendered
    mode = true_mode(rendered[1])
    false_piece = control[MODE_PIECES[2 - mode]]
    if setting == "swap":
        return tokens.insert(rendered, {**control, MODE_PIECES[mode - 1]: false_piece}, keys[0])
    kept = tokens.insert(rendered, control, keys[0])
    content = content_positions(kept[1])
    if setting == "keep" or not len(content):
        return kept
    begin = len(content) // 4
    middle = content[begin : max(begin + 1, len(content) * 3 // 4)]
    place = int(middle[keys[1] % len(middle)])
    return with_piece(kept, [place], false_piece, NO_LM_LOSS, 0)


def read_order(order: Mapping[str, Any], default_seed: int) -> tuple[ModeTokens, int]:
    """Return the mode tokens and their seed in a run's training sources, by its manifest's `order`.

    Raises ConfigError when they differ, since a document does not show which of them it is like.
    """
    found = {}
    for mode in (1, 2):
        for name in order.get(f"mix.mode{mode}.sources", ()):
            record = order.get(f"mix.mode{mode}.sources.{name}.mode_tokens") or {}
            given = {key: record[key] for key in ("placement", "rate", "train") if key in record}
            found[name] = ModeTokens(**given), record.get("seed", default_seed)
    if len({(tokens.placement, tokens.rate) for tokens, _ in found.values()}) > 1:
        named = ", ".join(f"{name}: {tokens.placement}" for name, (tokens, _) in found.items())
        raise ConfigError(
            f"the sources of the run differ in their mode tokens ({named}); give "
            "--mode-token-placement"
        )
    return next(iter(found.values()), (ModeTokens(), default_seed))


def checked(placement: Placement, rate: float | None, *, train: bool = False) -> ModeTokens:
    """Build the settings from options; ConfigError for a rate that is missing or too much."""
    if placement == "sporadic" and not (rate is not None and 0 < rate <= 1):
        given = "missing" if rate is None else rate
        raise ConfigError(
            f"--mode-token-rate is {given}; with sporadic give a share of the tokens above 0, up "
            "to 1"
        )
    if placement != "sporadic" and rate is not None:
        raise ConfigError(
            f"--mode-token-rate is {rate} but the placement is {placement}; it is for sporadic "
            "only, so drop it or choose sporadic"
        )
    return ModeTokens(placement, rate or 0.0, train)
