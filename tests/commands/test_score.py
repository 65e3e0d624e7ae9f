"""`megatron-mode score` gives the numbers that the model gives when asked token by token."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_pretrain import Server
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import Outcome, Trained, command, write_jsonl

from megatron_mode.score import Scorer, windows
from megatron_mode.tokens.documents import read_documents
from megatron_mode.tokens.template import render

pytestmark = pytest.mark.usefixtures("alone")  # scoring joins a group of one and never leaves
Call = Callable[..., Outcome]
KEYS = {
    "id",
    "source",
    "tokens",
    "nll_mean",
    "nll_content_mean",
    "mode_logit_mean",
    "mode_probability_mean",
}
TOKEN_KEYS = {"token", "nll", "mode_logit", "mode_probability", "control"}


@pytest.fixture(scope="module")
def scorer(trained: Trained) -> Scorer:
    return Scorer(trained.run)


@given(st.integers(1, 400), st.integers(1, 70))
def test_windows_keep_every_token_once_with_half_a_row_of_context(
    tokens: int, seq_len: int
) -> None:
    kept: list[int] = []
    for begin, end, keep in windows(tokens, seq_len):
        assert 0 <= begin <= keep < end <= tokens
        assert end - begin <= seq_len
        assert keep == 0 or keep - begin >= seq_len // 2
        kept += range(keep, end)
    assert kept == list(range(tokens))


def by_hand(scorer: Scorer, ids: list[int], token: int) -> tuple[float | None, float]:
    """Return nll and mode logit of one token from rows cut for it alone, T//2 tokens apart."""
    seq_len = scorer.seq_len

    def heads(last: int) -> tuple[torch.Tensor, Any]:
        stride = seq_len - seq_len // 2
        begin = stride * max(0, math.ceil((last + 1 - seq_len) / stride))
        row = torch.tensor([ids[begin : last + 1]])
        with torch.no_grad():
            found = scorer.decoder(row, torch.arange(row.shape[1]).unsqueeze(0))
        return found.hidden_TBD[-1, 0].double(), found

    last_D, found = heads(token)
    logit = float(last_D @ found.mode_weight_D.detach().double() + found.mode_bias.detach()[0])
    if token == 0:
        return None, logit
    last_D, found = heads(token - 1)
    weight_VD = found.local_lm_weight_VD.detach().double()[: scorer.tokenizer.vocab_size]
    return -float((weight_VD @ last_D).log_softmax(0)[ids[token]]), logit


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 48, 49, 101])
def test_scores_are_those_of_the_model(scorer: Scorer, tokens: int) -> None:
    ids = torch.randint(0, 320, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    scores = scorer.score(ids)
    expected = [by_hand(scorer, ids, token) for token in range(tokens)]
    assert math.isnan(scores.nll_N[0])
    nll = torch.tensor([nll for nll, _ in expected[1:]])
    torch.testing.assert_close(scores.nll_N[1:], nll, rtol=1e-5, atol=1e-5)
    logit = torch.tensor([logit for _, logit in expected])
    torch.testing.assert_close(scores.mode_logit_N, logit, rtol=1e-5, atol=1e-5)


def test_a_row_of_one_token_still_predicts(
    pretrain: Call, verb: Call, trained: Trained, tmp_path: Path
) -> None:
    assert pretrain("model.seq_len=1", "run.steps=1").status == 0
    scorer = Scorer(tmp_path / "run")
    ids = [5, 9, 300]
    nll = [by_hand(scorer, ids, token)[0] for token in (1, 2)]
    torch.testing.assert_close(scorer.score(ids).nll_N[1:], torch.tensor(nll))


@pytest.mark.parametrize("rendering", ["plain", "chat"])
def test_json_has_an_object_a_document(
    verb: Call, scorer: Scorer, trained: Trained, rendering: str
) -> None:
    outcome = verb("score", trained.run, trained.input, "--json", "--render", rendering)
    assert (outcome.status, outcome.err) == (0, "")
    results = [json.loads(line) for line in outcome.out.splitlines()]
    documents = list(read_documents(trained.input))
    for document, result in zip(documents, results, strict=True):
        assert result.keys() == KEYS
        assert (result["id"], result["source"]) == (document.id, document.source)
        ids, flags = render(document, scorer.tokenizer, rendering)
        assert result["tokens"] == len(ids)
        scores = scorer.score(ids)
        # Bit 6 marks control pieces: role markers would give the mode away.
        logit = scores.mode_logit_N[[not flag & 64 for flag in flags]].double()
        assert result["nll_mean"] == pytest.approx(float(scores.nll_N[1:].double().mean()))
        assert result["mode_logit_mean"] == pytest.approx(float(logit.mean()))
        probability = 1 / (1 + (-logit).exp())
        assert result["mode_probability_mean"] == pytest.approx(float(probability.mean()))


def test_per_token_flags_control_pieces(verb: Call, trained: Trained, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Sea? ü"}, {"role": "assistant", "content": "Blue."}]
    path = write_jsonl(tmp_path / "one.jsonl", [{"id": 7, "messages": messages}])
    texts = {}
    for rendering in ("plain", "chat"):
        words = ("score", trained.run, path, "--json", "--per-token", "--render", rendering)
        (result,) = map(json.loads, verb(*words).out.splitlines())
        assert result.keys() == KEYS | {"per_token"}
        assert (result["id"], result["source"]) == ("7", "one")
        tokens = result["per_token"]
        assert len(tokens) == result["tokens"]
        assert all(token.keys() == TOKEN_KEYS for token in tokens)
        assert [token["nll"] is None for token in tokens] == [True] + [False] * (len(tokens) - 1)
        losses = [token["nll"] for token in tokens[1:]]
        assert result["nll_mean"] == pytest.approx(sum(losses) / len(losses))
        content = [token["mode_logit"] for token in tokens if not token["control"]]
        assert result["mode_logit_mean"] == pytest.approx(sum(content) / len(content))
        texts[rendering] = "".join(token["token"] for token in tokens)
        pieces = [token["token"] for token in tokens if token["control"]]
        assert pieces == [p for p in ("<|doc|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>")
                          if rendering == "chat" or p == "<|doc|>"]  # fmt: skip
    assert texts["plain"] == "<|doc|>Sea? ü\n\nBlue."
    assert texts["chat"] == "<|doc|><|user|>Sea? ü<|end|><|assistant|>Blue.<|end|>"


def test_turns_that_are_not_to_be_learnt_have_no_part_in_the_loss(
    verb: Call, trained: Trained, scorer: Scorer, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Sea?"}, {"role": "assistant", "content": "Red."}]
    found = []
    for unlearnt in ((), (1,), (0, 1)):
        marked = [{**turn, "weight": int(n not in unlearnt)} for n, turn in enumerate(turns)]
        path = write_jsonl(tmp_path / "one.jsonl", [{"messages": marked}])
        words = ("score", trained.run, path, "--per-token", "--json")
        (result,) = map(json.loads, verb(*words).out.splitlines())
        nll = [token["nll"] for token in result["per_token"]]
        found.append((result["nll_mean"], nll, result["mode_logit_mean"]))
    assert found[0][1:] == found[1][1:] == found[2][1:]
    user_tokens = len(scorer.tokenizer.encode("Sea?\n\n"))
    assert found[1][0] == pytest.approx(sum(found[1][1][1 : user_tokens + 1]) / user_tokens)
    assert found[2][0] is None
    assert verb("score", trained.run, path).out.splitlines()[1].split()[-3] == "-"


def test_the_table_is_coloured_on_a_terminal_only(
    verb: Call, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("score", trained.run, trained.input, "--per-token", "--limit", "1")
    head, row, tokens = verb(*words).out.splitlines()
    assert head.split() == ["id", "source", "tokens", "nll", "mode", "logit", "p"]
    assert row.split()[:2] == ["t0", "books"]
    assert "\x1b" not in tokens
    assert "The[0." in tokens
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[48;2;" in verb(*words).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in verb(*words).out


def test_the_program_prints_nothing_else(trained: Trained) -> None:
    """Importing torch, DeepSpeed and megatron-core must leave stdout to the objects."""
    words = ("score", trained.run / "checkpoints", trained.input, "--json", "--limit", "2")
    outcome = command("-m", "megatron_mode", *words, "--threads", "1")
    assert (outcome.status, outcome.err) == (0, "")
    assert [json.loads(line)["id"] for line in outcome.out.splitlines()] == ["t0", "t1"]


@pytest.mark.parametrize("layout", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_split_checkpoint_scores_like_a_whole_one(
    server: Server, verb: Call, trained: Trained, tmp_path: Path, layout: str
) -> None:
    results = []
    for world_size, split in ((1, "parallel.tensor=1"), (2, f"parallel.{layout}=2")):
        run = tmp_path / str(world_size)
        places = (f"data.root={trained.data}", f"run.dir={run}")
        words = ("--config", trained.config, *places, "model.kv_heads=2", split)
        outcomes = server.run_world(world_size, *words)
        assert [outcome.status for outcome in outcomes] == [0] * world_size, outcomes
        lines = verb("score", run, trained.input, "--json").out.splitlines()
        results.append([json.loads(line) for line in lines])
    for whole, split_up in zip(*results, strict=True):
        for key in ("nll_mean", "mode_logit_mean"):
            assert split_up[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-4)
