"""`score` and `generate` refuse what they cannot read in one sentence, before they print."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import Outcome, Trained, refusal

from megatron_mode.tokens.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("alone")  # scoring joins a group of one and never leaves
Call = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["score", "nowhere", "{in}"], "nowhere is not a folder: name a checkpoint folder"),
        (["score", "{empty}", "{in}"], "holds no manifest.json: name a finished checkpoint"),
        (
            ["score", "{run}", "{empty}"],
            "{empty} cannot be read (it is a folder",
        ),
        (["score", "{run}", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["score", "{run}", "{void}"], "{void} holds no documents"),
        (["score", "{run}", "{bad}", "--json"], "bad.jsonl:1: malformed JSON"),
        (["score", "{run}", "{in}", "--limit", "0"], "accepted is a whole number of 1 or more"),
        (["score", "{run}", "{in}", "--threads", "-1"], "--threads: the value is '-1'"),
        (["score", "{run}", "{in}", "--render", "html"], "invalid choice: 'html'"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not a folder"),
        (["generate", "{run}"], "required: --prompt"),
        (["generate", "{run}", "--prompt", "x", "--tokens", "0"], "--tokens: the value is '0'"),
        (["generate", "{run}", "--prompt", "x", "--temperature", "nan"], "is 'nan', accepted is"),
        (["generate", "{run}", "--prompt", "x", "--top-k", "-1"], "--top-k: the value is '-1'"),
        (["generate", "{run}", "--prompt", "x", "--seed", "-1"], "--seed: the value is '-1'"),
        (["generate", "{run}", "--prompt", "\udcff"], "--prompt holds bytes that are not UTF-8"),
    ],
)
def test_score_and_generate_refuse(
    verb: Call, trained: Trained, tmp_path: Path, words: list[str], fragment: str
) -> None:
    places = {"run": trained.run, "in": trained.input, "empty": tmp_path / "empty"}
    places |= {name: tmp_path / f"{name}.jsonl" for name in ("bad", "void")}
    places["empty"].mkdir()
    places["bad"].write_text("{\n")
    places["void"].write_text("\n")
    sentence = refusal(verb(*(word.format(**places) for word in words)))
    assert fragment.format(**places) in sentence


SYLLABLES = ("sea", "foam", "whale", "ship", "wind", "gull", "rope", "mast")


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return what replaces a file's bytes."""

    def apply(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))

    return apply


def swap_layers(checkpoint: Path) -> None:
    shutil.copy(
        checkpoint / "layer_00-model_00-model_states.pt",
        checkpoint / "layer_01-model_00-model_states.pt",
    )


def larger_tokenizer(checkpoint: Path) -> None:
    words = [f"{a}{b}{c}" for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
    train_tokenizer([" ".join(words)], checkpoint / "tokenizer.model", 450)


LAYER = "layer_01-model_00-model_states.pt"


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (damage(LAYER, lambda old: old[:2000]), "cannot be read"),
        (damage(LAYER, lambda old: b""), "cannot be read"),
        (lambda folder: (folder / LAYER).unlink(), f"{LAYER} is missing"),
        (swap_layers, "its files are of two runs"),
        (damage("manifest.json", lambda old: old[:50]), "manifest.json cannot be read"),
        (damage("manifest.json", lambda old: b"{}"), "is not a manifest of format 1"),
        (damage("manifest.json", lambda old: b'{"format": 1}'), "is damaged"),
        (damage("manifest.json", lambda old: b"\xff\xfe"), "manifest.json cannot be read"),
        (damage("manifest.json", lambda old: old.replace(b'"layers"', b'"layes"')),
         "holds no config of this version"),
        (larger_tokenizer, "512 pieces with padding, the model 384"),
        (damage("tokenizer.model", lambda old: old[:90]), "is not a SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "lacks tokenizer.model"),
        (lambda folder: (folder.parent / "latest").write_bytes(b"\xff\n"), "is not a folder"),
        (lambda folder: (folder.parent / "latest").write_text("step-9\n"), "step-9 is not a "),
    ],
)  # fmt: skip
def test_score_refuses_a_damaged_checkpoint(
    verb: Call, trained: Trained, tmp_path: Path, spoil: Callable[[Path], object], fragment: str
) -> None:
    run = shutil.copytree(trained.run, tmp_path / "run")
    spoil(run / "checkpoints" / "step-00000003")
    outcome = verb("score", run, trained.input, "--json")
    assert fragment in refusal(outcome)
    assert outcome.out == ""
