"""A run remembers its mode tokens, and `score` keeps, strips, swaps or forges them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from forked_pretrain import Server
from tiny_run import Outcome, Trained, refusal

from megatron_mode.score import Scorer

pytestmark = pytest.mark.usefixtures("alone")  # scoring joins a group of one and never leaves
Call = Callable[..., Outcome]
SETTINGS = ("keep", "strip", "swap", "forge")


@pytest.fixture(scope="module")
def run(trained: Trained, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on a corpus with mode tokens at the start."""
    folder = tmp_path_factory.mktemp("mode-tokens")
    tiny_run.prepare(folder / "data", trained.input, "--mode-tokens", "start", "--seed", "5")
    places = (f"data.root={folder / 'data'}", f"run.dir={folder / 'run'}")
    assert server.run("--config", trained.config, *places).status == 0
    return folder / "run"


@pytest.fixture
def scored(verb: Call, trained: Trained) -> Callable[..., list[Any]]:
    """Score the documents and return an object a document."""

    def call(run: Path, *words: str) -> list[Any]:
        outcome = verb("score", run, trained.input, "--json", "--per-token", *words)
        assert (outcome.status, outcome.err) == (0, "")
        return [json.loads(line) for line in outcome.out.splitlines()]

    return call


def shown(result: Any) -> str:
    return "".join(token["token"] for token in result["per_token"])


def test_a_run_remembers_its_mode_tokens(run: Path, trained: Trained) -> None:
    order = Scorer(run).manifest.order
    expected = {"placement": "start", "train": False, "seed": 5}
    assert order["mix.mode1.sources.books.mode_tokens"] == expected
    assert order["mix.mode2.sources.chat.mode_tokens"] == expected
    assert not [key for key in Scorer(trained.run).manifest.order if "mode_tokens" in key]


@pytest.mark.parametrize("rendering", ["plain", "chat"])
def test_settings_share_their_content(
    scored: Callable[..., list[Any]], run: Path, rendering: str
) -> None:
    results = {
        setting: scored(run, "--mode-tokens", setting, "--render", rendering)
        for setting in SETTINGS
    }
    assert results["keep"] == scored(run, "--render", rendering)
    differing = 0
    for keep, strip, swap, forge in zip(*results.values(), strict=True):
        mode = 1 if keep["source"] == "books" else 2
        true, false = f"<|mode{mode}|>", f"<|mode{3 - mode}|>"
        assert shown(keep) == shown(strip).replace("<|doc|>", f"<|doc|>{true}", 1)
        assert shown(swap) == shown(keep).replace(true, false)
        assert shown(forge).replace(false, "") == shown(keep)
        assert shown(forge).count(false) == 1
        for result in (keep, strip, swap, forge):
            tokens = [t for t in result["per_token"][1:] if t["token"] not in (true, false)]
            assert len(tokens) == strip["tokens"] - 1
            content = [token["nll"] for token in tokens if not token["control"]]
            mean = math.fsum(token["nll"] for token in tokens) / len(tokens)
            assert result["nll_mean"] == pytest.approx(mean)
            assert result["nll_content_mean"] == pytest.approx(math.fsum(content) / len(content))
        differing += keep["nll_content_mean"] != swap["nll_content_mean"]
    assert differing > 80


def test_a_given_placement_replaces_that_of_the_run(
    scored: Callable[..., list[Any]], run: Path, trained: Trained
) -> None:
    ends = scored(run, "--mode-token-placement", "end")
    assert all(result["per_token"][-1]["token"].startswith("<|mode") for result in ends)
    words = ("--mode-tokens", "swap", "--mode-token-placement", "sporadic", "--mode-token-rate")
    every = scored(trained.run, *words, "1")
    assert all("<|mode2|>The" in shown(result) for result in every if result["source"] == "books")
    none = scored(run, "--mode-token-placement", "none")
    assert none == scored(run, "--mode-tokens", "strip")


def test_a_run_without_mode_tokens(
    verb: Call, scored: Callable[..., list[Any]], trained: Trained
) -> None:
    assert scored(trained.run) == scored(trained.run, "--mode-tokens", "strip")
    forged = scored(trained.run, "--mode-tokens", "forge")
    assert all(shown(result).count("<|mode") == 1 for result in forged)
    sentence = refusal(verb("score", trained.run, trained.input, "--mode-tokens", "swap"))
    assert "--mode-tokens is swap, but the run's data has no mode tokens" in sentence
    words = ("--mode-token-placement", "sporadic")
    sentence = refusal(verb("score", trained.run, trained.input, *words))
    assert "--mode-token-rate is missing" in sentence
