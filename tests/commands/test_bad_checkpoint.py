"""`score` and `generate` refuse what they cannot read in one sentence, before they print."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from spoilt_checkpoints import seal
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
        (["score", "{run}", "{in}", "--limit", "0"], "use a whole number of 1 or more"),
        (["score", "{run}", "{in}", "--threads", "-1"], "--threads: the value is '-1'"),
        (["score", "{run}", "{in}", "--render", "html"], "invalid choice: 'html'"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere is not a folder"),
        (["generate", "{run}"], "required: --prompt"),
        (["generate", "{run}", "--prompt", "x", "--tokens", "0"], "--tokens: the value is '0'"),
        (["generate", "{run}", "--prompt", "x", "--temperature", "nan"], "is 'nan'; use a number"),
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


def sealed(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return the damage with digests written anew, as someone would who means it."""

    def apply(checkpoint: Path) -> None:
        spoil(checkpoint)
        seal(checkpoint)

    return apply


def rename_layers(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["config"]["model"]["layes"] = manifest["config"]["model"].pop("layers")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


LAYER = "layer_01-model_00-model_states.pt"


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (damage(LAYER, lambda old: old[:2000]), f"{LAYER} has 2000 bytes instead of"),
        (damage(LAYER, lambda old: old[:-1] + b"x"), f"{LAYER} has SHA-256 "),
        (lambda folder: (folder / LAYER).unlink(), f"{LAYER} is missing"),
        (sealed(damage(LAYER, lambda old: old[:2000])), f"{LAYER} cannot be read"),
        (sealed(damage(LAYER, lambda old: b"")), f"{LAYER} cannot be read"),
        (sealed(lambda folder: (folder / LAYER).unlink()), f"{LAYER} is not among those of"),
        (sealed(swap_layers), "its files are of two runs"),
        (damage("manifest.json", lambda old: old[:50]), "is damaged: its SHA"),
        (damage("manifest.json", lambda old: b"\xff\xfe"), "is damaged: its SHA"),
        (damage("manifest.json", lambda old: old.replace(b"1", b"2", 1)), "is damaged: its SHA"),
        (damage("manifest.json.sha256", lambda old: old.upper()), "is damaged: its SHA"),
        (lambda folder: (folder / "manifest.json.sha256").unlink(), "holds no manifest.json.sha"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
        (sealed(damage("manifest.json", lambda old: b'{"files": {}}')), "is not a manifest of"),
        (sealed(damage("manifest.json", lambda old: b'{"files": {}, "format": 2}')), "is damaged"),
        (sealed(rename_layers), "holds no config of this version"),
        (damage("tokenizer.model", lambda old: old[:90]), "tokenizer.model has 90 bytes"),
        (sealed(larger_tokenizer), "512 pieces with padding, the model 384"),
        (sealed(damage("tokenizer.model", lambda old: old[:90])), "is not a SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model is missing"),
        (lambda folder: (folder.parent / "latest").write_bytes(b"\xff\n"), "which is no finished"),
        (lambda folder: (folder.parent / "latest").write_text("step-9"), "names 'step-9', which"),
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
