"""`megatron-mode generate` continues a prompt, repeatably, and colours on a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import Outcome, Trained

from megatron_mode.commands import generate as generate_command
from megatron_mode.commands.generate import continuation, sample

pytestmark = pytest.mark.usefixtures("alone")  # scoring joins a group of one and never leaves
Call = Callable[..., Outcome]


@pytest.fixture
def generate(verb: Call, trained: Trained) -> Callable[..., dict[str, Any]]:
    """Generate as JSON."""

    def call(*words: str) -> dict[str, Any]:
        given = words if "--prompt" in words else ("--prompt", "The Dead", *words)
        outcome = verb("generate", trained.run, "--json", *given)
        assert (outcome.status, outcome.err) == (0, "")
        found: dict[str, Any] = json.loads(outcome.out)
        return found

    return call


def generated(result: dict[str, Any]) -> list[str]:
    return [token["token"] for token in result["tokens"] if token["generated"]]


def test_a_seed_repeats_and_another_differs(generate: Callable[..., dict[str, Any]]) -> None:
    words = ("--tokens", "12", "--temperature", "1.5", "--top-k", "0")
    first, again, other = (generate(*words, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert generated(first) != generated(other)
    assert 1 <= len(generated(first)) <= 12
    assert first["text"] == "".join(generated(first))
    given = "".join(token["token"] for token in first["tokens"] if not token["generated"])
    assert given == "<|doc|>The Dead"
    assert all(0 < token["mode_probability"] < 1 for token in first["tokens"])


def test_temperature_zero_takes_the_likeliest(
    generate: Callable[..., dict[str, Any]], trained: Trained
) -> None:
    from megatron_mode.score import Scorer

    scorer = Scorer(trained.run)
    result = generate("--tokens", "3", "--temperature", "0", "--seed", "5")
    ids = [scorer.tokenizer.control["<|doc|>"], *scorer.tokenizer.encode("The Dead")]
    for _ in range(len(generated(result))):
        row = torch.tensor([ids])
        heads = scorer.decoder(row, torch.arange(len(ids)).unsqueeze(0))
        logits_V = heads.local_lm_weight_VD @ heads.hidden_TBD[-1, 0]
        ids.append(int(logits_V[: scorer.tokenizer.vocab_size].argmax()))
    assert scorer.tokenizer.pieces(ids) == [token["token"] for token in result["tokens"]]


def test_a_prompt_may_be_empty_a_question_or_longer_than_a_row(
    generate: Callable[..., dict[str, Any]],
) -> None:
    assert generate("--prompt", "", "--tokens", "1")["tokens"][0]["token"] == "<|doc|>"
    pieces = [t["token"] for t in generate("--chat", "--prompt", "Sea?", "--tokens", "1")["tokens"]]
    text = "".join(pieces)
    assert text.startswith("<|doc|><|user|>Sea?<|end|><|assistant|>")
    long = generate("--prompt", "The sea. " * 30, "--tokens", "2")
    assert len(long["tokens"]) > 64
    # A control piece in a prompt is text: it never becomes the piece itself.
    pieces = [t["token"] for t in generate("--prompt", "<|end|>", "--tokens", "1")["tokens"]]
    assert "<|end|>" not in pieces[1:]


def test_colour_is_for_terminals(
    verb: Call, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", trained.run, "--prompt", "The sea", "--tokens", "2")
    plain = verb(*words)
    assert (plain.status, plain.err) == (0, "")
    assert plain.out.startswith("token[p]: p is the probability of Mode 2\n<|doc|>[0.")
    assert "\x1b" not in plain.out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[48;2;" in verb(*words).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert verb(*words).out == plain.out


def test_an_early_end_is_said(
    verb: Call, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_command, "continuation", lambda *_, **__: iter([5]))
    words = ("generate", trained.run, "--prompt", "The sea", "--tokens")
    assert verb(*words, "3").out.endswith("The model ended the document after 1 of 3 tokens.\n")
    assert "ended the document" not in verb(*words, "1").out


class Script:
    """Stand in for a Scorer whose model says a fixed text: ids 3, 4, 5, then the end."""

    tokenizer = SimpleNamespace(control={"<|doc|>": 1, "<|end|>": 2})

    def next_logits(self, ids: list[int]) -> torch.Tensor:
        said = {0: 3, 3: 4, 4: 5, 5: 2}[ids[-1]]
        return torch.full((8,), -9.0).index_fill(0, torch.tensor([said]), 9.0)


@pytest.mark.parametrize(("tokens", "said"), [(1, [3]), (3, [3, 4, 5]), (50, [3, 4, 5])])
def test_generation_stops_at_the_limit_or_at_the_end(tokens: int, said: list[int]) -> None:
    scorer: Any = Script()
    given = [0]
    found = continuation(scorer, given, tokens, temperature=0, top_k=0, seed=0)
    assert list(found) == said
    assert given == [0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1.0, 1e300])
def test_top_k_bounds_what_is_drawn(temperature: float) -> None:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 2.0, -torch.inf])
    drawn = {
        sample(logits_V, temperature, 2, torch.Generator().manual_seed(seed)) for seed in range(40)
    }
    expected = {1} if temperature < 0.01 else {1, 3}
    assert drawn == expected
    everything = {
        sample(logits_V, 1e300, 0, torch.Generator().manual_seed(seed)) for seed in range(80)
    }
    assert everything == {0, 1, 2, 3}
