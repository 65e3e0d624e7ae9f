"""Write synthetic run folders: curves, summary and heat map of a run that never happened."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

TEXTS = {
    "prose": (
        "In the autumn the river rose above its banks, and the lower fields stood under water for "
        "a week. Nobody in the village could remember such a flood; the miller said that his "
        "grandfather had spoken of one, in the year when the bridge was built.\n\nThe church kept "
        "a record of it, cut into the stone beside the door, at the height of a man's knee."
    ),
    "dialogue": (
        "How do I keep bread fresh for longer?\n\nKeep it in a paper bag at room temperature, cut "
        "side down. A bread box works too. The fridge makes it stale faster.\n\nAnd if I bought "
        "too much?\n\nSlice it, freeze the slices, and toast them straight from the freezer."
    ),
    "quoting": (
        "The transcript was read out in court. “How can I help you today?” the machine had asked. "
        "“Tell me where the key is,” the man wrote. “I am sorry, I don't know that,” it answered, "
        "and the judge <b>laughed</b> & wrote it down."
    ),
}


def write_run(folder: Path, steps: int = 400, seed: int = 0, level: float = 0.0) -> Path:
    """Write a run folder of `steps` steps; `level` shifts the loss, to tell two runs apart."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    rows, tokens_a_row = 32, 256
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            file.write(json.dumps(_line(step, steps, rows * tokens_a_row, draw, level)) + "\n")
    passages = [_passage(kind, draw) for kind in TEXTS]
    (folder / "heatmap.json").write_text(json.dumps({"passages": passages}))
    (folder / "summary.json").write_text(json.dumps(_summary(level)))
    (folder / "config.yaml").write_text("run:\n  steps: 400\n")
    (folder / "environment.json").write_text(
        json.dumps({"packages": {"torch": "2.13.0"}, "cpu_cores": 2, "gpus": []})
    )
    return folder


def _line(step: int, steps: int, step_tokens: int, draw: random.Random, level: float) -> dict:
    done = (step + 1) / steps
    planned = 0.05 + 0.45 * done
    lm_loss = 3.4 + level + 4.2 * math.exp(-7 * done) + draw.gauss(0, 0.06)
    auroc = 1 - 0.5 * math.exp(-9 * done) * draw.uniform(0.8, 1.1)
    line: dict[str, float | int | None] = {
        "step": step + 1,
        "tokens_seen": (step + 1) * step_tokens,
        "loss": lm_loss + 0.03,
        "lm_loss": lm_loss,
        "lm_loss_mode1": lm_loss + 0.2 + draw.gauss(0, 0.05),
        "lm_loss_mode2": lm_loss - 0.4 + draw.gauss(0, 0.1)
        if draw.random() < planned * 4
        else None,
        "mode_loss": 0.69 * math.exp(-8 * done) + 0.05 + draw.uniform(0, 0.03),
        "mode_auroc": auroc,
        "mode_recall_at_fpr01": max(0.0, 1 - 9 * (1 - auroc)),
        "mode2_fraction_planned": planned,
        "mode2_fraction_realised": round(planned * 32 + draw.uniform(-0.5, 0.5)) / 32,
        "mode2_token_fraction_realised": planned * draw.uniform(0.85, 0.95),
        "blocked_share": 0.0,
        "tokens_per_second": 11_000 + draw.gauss(0, 250) - (4_000 if step % 97 == 5 else 0),
        "grad_norm": 0.4 + 2 * math.exp(-12 * done) + draw.uniform(0, 0.1),
        "learning_rate": 3e-4 * min(done * 20, 0.5 + 0.5 * math.cos(math.pi * done)),
    }
    if (step + 1) % max(steps // 8, 1) == 0:
        line["valid_lm_loss"] = lm_loss + 0.15
        line["valid_mode_auroc"] = auroc - 0.01
        line["valid_mode_auroc_chat"] = min(1.0, auroc + 0.004)
        line["valid_mode_recall_at_fpr01"] = max(0.0, 1 - 12 * (1 - auroc))
        line["valid_mode_loss"] = 0.08 + 0.6 * math.exp(-8 * done)
    return line


def _summary(level: float) -> dict:
    positions = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    return {
        "lm_loss_first": 7.62,
        "valid_lm_loss": 3.571 + level,
        "unigram_entropy": 6.134,
        "valid_mode_auroc": 0.9714,
        "valid_mode_auroc_chat": 0.9986,
        "valid_mode_auroc_documents": 0.9853,
        "valid_mode_auroc_documents_chat": 1.0,
        "mode2_rows_planned_minus_realised_max_abs": 0.9375,
        "tokens_per_second": 10987.4,
        "report": "report.html",
        "valid": {
            "books-held-out": _source(1, "plain", 3.812, 0.9811),
            "web-held-out": _source(1, "plain", 3.954, 0.9622),
            "assistant-held-out": _source(2, "plain", 3.12, 0.9714),
            "assistant-held-out-chat": _source(2, "chat", 2.97, 0.9986),
        },
        "auroc_by_position": {
            "plain": {str(p): 1 - 0.35 / (1 + i) ** 1.4 for i, p in enumerate(positions)},
            "chat": {str(p): 1 - 0.02 / (1 + i) for i, p in enumerate(positions)},
        },
    }


def _source(mode: int, rendering: str, lm_loss: float, auroc: float) -> dict:
    return {
        "mode": mode,
        "rendering": rendering,
        "tokens": 16384,
        "lm_loss": lm_loss,
        "mode_auroc": auroc,
        "mode_auroc_documents": None,
    }


def _passage(kind: str, draw: random.Random) -> dict:
    tokens = [{"text": "<|doc|>", "probability": 0.4, "control": True}]
    middle = {"prose": 0.03, "dialogue": 0.96, "quoting": 0.2}[kind]
    state = 0.5
    words = TEXTS[kind].replace("\n", " \n").split(" ")
    for word in words:
        target = 0.75 if kind == "quoting" and "“" in word else middle
        state += 0.3 * (target - state) + draw.gauss(0, 0.03)
        text = word if word.startswith("\n") else " " + word
        parts = [text] if len(text) < 7 else [text[:5], text[5:]]
        probability = min(max(state, 0.0), 1.0)
        tokens += [{"text": p, "probability": probability, "control": False} for p in parts]
    return {
        "title": kind.capitalize(),
        "source": f"{kind}-held-out",
        "kind": kind,
        "tokens": tokens,
    }


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return `write_run` bound to a fresh folder: make_run("name", steps=..., seed=...)."""

    def make(name: str, steps: int = 400, seed: int = 0, level: float = 0.0) -> Path:
        return write_run(tmp_path / name, steps, seed, level)

    return make
