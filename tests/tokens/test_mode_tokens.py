"""Mode tokens stand where they should, change nothing else, and depend on the document alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mode.errors import ConfigError
from megatron_mode.tokens.documents import Document, Message
from megatron_mode.tokens.flags import CONTROL, MODE2, NO_LM_LOSS, NO_MODE_LOSS, ROLE_MASK
from megatron_mode.tokens.mode_tokens import (
    ModeTokens,
    Placement,
    Rendered,
    Setting,
    checked,
    read_order,
    rearrange,
)
from megatron_mode.tokens.prepare.request import draw
from megatron_mode.tokens.source.shards import Source
from megatron_mode.tokens.template import render
from megatron_mode.tokens.tokenizer import Tokenizer

RunPrepare = Callable[..., int]
TURNS = (Message("user", "Where is the sea?"), Message("assistant", "There."), Message("tool", ""))
DOCUMENTS = {
    1: Document("t", "books", 1, text="Call me Ishmael. Some years ago."),
    2: Document("d", "chat", 2, messages=TURNS),
}
CASES = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from(["chat", "plain"]),
    st.sampled_from(get_args(Placement)),
    st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 2**64 - 1),
)
Case = tuple[int, Any, Placement, float, bool, int]


def by_hand(rendered: Rendered, tokens: ModeTokens, pieces: dict[int, int], key: int) -> Rendered:
    """Insert token by token, as the docstring says."""
    ids, flags = rendered
    mode = 2 if flags[0] & MODE2 else 1
    raw = np.random.PCG64(key)
    out: list[tuple[int, int]] = []

    def add(neighbour: int) -> None:
        taken = neighbour & (MODE2 | ROLE_MASK)
        loss = 0 if tokens.train else NO_LM_LOSS
        out.append((pieces[mode], taken | CONTROL | NO_MODE_LOSS | loss))

    for index, (token, flag) in enumerate(zip(ids, flags, strict=True)):
        sporadic = tokens.placement == "sporadic" and not flag & CONTROL
        if sporadic and (int(raw.random_raw()) >> 11) / 2**53 < tokens.rate:
            add(flag)
        out.append((token, flag))
        if tokens.placement == "start" and index == 0:
            add(flag)
    if tokens.placement == "end":
        add(flags[-1])
    return [token for token, _ in out], bytes(flag for _, flag in out)


def without(rendered: Rendered, pieces: dict[int, int]) -> Rendered:
    kept = [pair for pair in zip(*rendered, strict=True) if pair[0] not in pieces.values()]
    return [token for token, _ in kept], bytes(flag for _, flag in kept)


@pytest.fixture(scope="module")
def pieces(tokenizer: Tokenizer) -> dict[int, int]:
    return {mode: tokenizer.control[f"<|mode{mode}|>"] for mode in (1, 2)}


@given(case=CASES)
def test_insertion_is_that_by_hand(
    tokenizer: Tokenizer, pieces: dict[int, int], case: Case
) -> None:
    mode, rendering, placement, rate, train, key = case
    rendered = render(DOCUMENTS[mode], tokenizer, rendering)
    tokens = ModeTokens(placement, rate, train)
    found = tokens.insert(rendered, tokenizer.control, key)
    assert found == by_hand(rendered, tokens, pieces, key)
    assert without(found, pieces) == rendered


@pytest.mark.parametrize("rendering", ["chat", "plain"])
def test_places_read_as_text(tokenizer: Tokenizer, rendering: Any) -> None:
    rendered = render(DOCUMENTS[2], tokenizer, rendering)
    text = "".join(tokenizer.pieces(rendered[0]))

    def shown(placement: Placement) -> str:
        ids, _ = ModeTokens(placement).insert(rendered, tokenizer.control, 0)
        return "".join(tokenizer.pieces(ids))

    assert shown("none") == text
    assert shown("start") == text.replace("<|doc|>", "<|doc|><|mode2|>")
    assert shown("end") == f"{text}<|mode2|>"


@given(case=CASES)
def test_settings_of_scoring(tokenizer: Tokenizer, pieces: dict[int, int], case: Case) -> None:
    mode, rendering, placement, rate, train, key = case
    rendered = render(DOCUMENTS[mode], tokenizer, rendering)
    tokens = ModeTokens(placement, rate, train)
    found = {
        setting: rearrange(rendered, setting, tokens, tokenizer.control, (key, key // 3))
        for setting in get_args(Setting)
    }
    assert {str(without(one, pieces)) for one in found.values()} == {str(rendered)}
    assert found["keep"] == tokens.insert(rendered, tokenizer.control, key)
    assert found["strip"] == rendered
    true, false = pieces[mode], pieces[3 - mode]
    swapped = [false if token == true else token for token in found["keep"][0]]
    assert found["swap"] == (swapped, found["keep"][1])
    forged = found["forge"][0]
    assert forged.count(false) == 1
    place = forged.index(false)
    assert [*forged[:place], *forged[place + 1 :]] == found["keep"][0]
    content = [not flag & CONTROL for flag in found["forge"][1]]
    share = sum(content[:place]) / sum(content)
    assert 0.2 <= share <= 0.8
    assert content[place + 1] or forged[place + 1] == true


def test_rates_are_realised() -> None:
    flags = bytes([CONTROL]) + bytes(20_000)
    for rate in (0.001, 0.1, 0.5, 1.0):
        counts = [
            len(ModeTokens("sporadic", rate).places(flags, draw(1, str(i)))) for i in range(5)
        ]
        expected, spread = 100_000 * rate, (100_000 * rate * (1 - rate)) ** 0.5
        assert abs(sum(counts) - expected) <= 5 * spread
        assert rate == 1.0 or len(set(counts)) > 1


def stored(root: Path, name: str) -> dict[str, tuple[list[int], bytes, str]]:
    source = Source.open(root, name)
    rows = (source.document(index) for index in range(source.documents))
    return {row[2]: (row[0].tolist(), row[1].tobytes(), row[4]) for row in rows}


@pytest.mark.parametrize(
    "words",
    [("start",), ("end", "--mode-token-loss", "on"), ("sporadic", "--mode-token-rate", "0.3")],
)
def test_prepared_documents(
    tmp_path: Path,
    corpus: list[Path],
    run_prepare: RunPrepare,
    pieces: dict[int, int],
    words: tuple[str, ...],
) -> None:
    common = ("--input", *corpus, "--valid-share", "0.1")
    run_prepare("--out", tmp_path / "without", *common)
    run_prepare("--out", tmp_path / "one", *common, "--workers", "1", "--mode-tokens", *words)
    backwards = [corpus[0], tmp_path / "backwards.jsonl"]
    lines = corpus[0].read_bytes().splitlines(keepends=True)
    backwards[1].write_bytes(b"".join(reversed(lines)))
    run_prepare("--out", tmp_path / "two", *common, "--workers", "2", "--mode-tokens", *words)
    both = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert both[0] == both[1]
    counted = 0
    for name in ("books", "chat", "chat-valid-plain", "chat-valid-chat"):
        info = Source.open(tmp_path / "one", name).info
        expected = {"placement": words[0], "train": "on" in words, "seed": 1234}
        rate = {"rate": 0.3} if words[0] == "sporadic" else {}
        assert info["mode_tokens"] == {**expected, **rate}
        assert Source.open(tmp_path / "without", name).mode_tokens is None
        plain, found = stored(tmp_path / "without", name), stored(tmp_path / "one", name)
        assert plain.keys() == found.keys()
        true = pieces[info["mode"]]
        for identifier, (ids, flags, rendering) in found.items():
            counted += ids.count(true)
            assert pieces[3 - info["mode"]] not in ids
            kept = without((ids, flags), pieces)
            assert (*kept, rendering) == plain[identifier]
        assert info["flags"]["no_mode_loss"] == sum(ids.count(true) for ids, _, _ in found.values())
        assert info["flags"]["no_lm_loss"] == (
            0 if "on" in words else info["flags"]["no_mode_loss"]
        )
    run_prepare("--out", tmp_path / "back", "--input", backwards[1], "--mode-tokens", *words)
    run_prepare("--out", tmp_path / "forth", "--input", corpus[0], "--mode-tokens", *words)
    assert stored(tmp_path / "back", "books") == stored(tmp_path / "forth", "books")
    assert counted > 500


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["sporadic"], "--mode-token-rate is missing; with sporadic give a share"),
        (["sporadic", "--mode-token-rate", "1.5"], "--mode-token-rate is 1.5; with sporadic"),
        (["sporadic", "--mode-token-rate", "0"], "--mode-token-rate is 0.0; with sporadic"),
        (["start", "--mode-token-rate", "0.5"], "is 0.5 but the placement is start"),
    ],
)
def test_rates_are_checked(
    tmp_path: Path, corpus: list[Path], run_prepare: RunPrepare, words: list[str], fragment: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(fragment)):
        run_prepare("--out", tmp_path / "o", "--input", *corpus, "--mode-tokens", *words)
    assert not (tmp_path / "o").exists()


def test_a_run_that_differs_in_itself_is_refused() -> None:
    start = {"placement": "start", "train": False, "seed": 7}
    order = {
        "mix.mode1.sources": ["books"],
        "mix.mode2.sources": ["chat"],
        "mix.mode2.sources.chat.mode_tokens": start,
    }
    with pytest.raises(ConfigError, match=r"books: none, chat: start\); give --mode-token-pla"):
        read_order(order, 1)
    order["mix.mode1.sources.books.mode_tokens"] = json.loads(json.dumps(start))
    assert read_order(order, 1) == (ModeTokens("start"), 7)
    assert read_order({}, 1) == (ModeTokens(), 1)
    assert checked("sporadic", 0.5, train=True) == ModeTokens("sporadic", 0.5, True)
