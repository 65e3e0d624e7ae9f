"""Make the modules beside the tests importable, here and in the workers; prepare a small corpus."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

WORDS = ("the", "a", "sea", "ship", "whale", "sails", "under", "grey", "wind", "and", "far")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """Prepare a small corpus of both modes."""
    from megatron_mode.__main__ import run_verb

    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(5)

    def sentence():
        return " ".join(draw.choices(WORDS, k=12)) + ". "

    with open(folder / "prose.jsonl", "w") as lines:
        for number in range(60):
            text = "".join(sentence() for _ in range(6))
            print(json.dumps({"id": str(number), "text": text}), file=lines)
    with open(folder / "chat.jsonl", "w") as lines:
        for number in range(60):
            messages = [
                {"role": "user", "content": f"say {sentence()}?"},
                {"role": "assistant", "content": sentence()},
            ]
            print(json.dumps({"id": str(number), "messages": messages}), file=lines)
    root = folder / "prepared"
    inputs = [str(folder / "prose.jsonl"), str(folder / "chat.jsonl")]
    arguments = ["--out", str(root), "--vocab-size", "330", "--valid-share", "0.2"]
    assert run_verb(["prepare", "--input", *inputs, *arguments]) == 0
    return root
