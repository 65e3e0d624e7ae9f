"""Share one small tokenizer and ways to write input files."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside the tests

from megatron_mode.command_line import CommandParser
from megatron_mode.commands.prepare import add_arguments, run
from megatron_mode.tokens.tokenizer import Tokenizer, train_tokenizer

PROSE = [
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail.\n\n"
    "It is a way I have of driving off the spleen and regulating the circulation.",
    "def sail(ship):\n\treturn ship.go('sea')  # a tab, two spaces\n",
    '{"name":"get_price","parameters":{"type":"object","properties":{}}} what is the price?',
]

RunPrepare = Callable[..., int]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(PROSE, path, 512)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.load(model_path)


@pytest.fixture
def run_prepare(model_path: Path) -> RunPrepare:
    """Run the verb; a tokenizer is given so that only tests of training train."""

    def call(*arguments: str | Path, tokenizer: Path | None = model_path) -> int:
        parser = CommandParser()
        add_arguments(parser)
        given = [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
        return run(parser.parse([*map(str, arguments), *given]))

    return call


def _write_lines(path: Path, lines: list[Any]) -> Path:
    """Write objects as JSON lines, gzip'd when the name ends in .gz."""
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _dialogue(identifier: str, *turns: str, source: str = "chat", **more: Any) -> dict[str, Any]:
    """Return a Mode 2 line whose turns alternate between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"id": identifier, "source": source, "messages": messages, **more}


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Write 200 Mode 1 and 400 Mode 2 documents of two sources."""
    texts = [
        {"id": f"t{i}", "source": "books", "text": f"Passage {i}: the sea, page {i * 7}.\n"}
        for i in range(200)
    ]
    dialogues = [_dialogue(f"d{i}", f"What is {i}?", f"It is {i}.") for i in range(400)]
    return [
        _write_lines(tmp_path / "mode1.jsonl", texts),
        _write_lines(tmp_path / "mode2.jsonl.gz", dialogues),
    ]


@pytest.fixture
def write_lines() -> Callable[[Path, list[Any]], Path]:
    return _write_lines


@pytest.fixture
def dialogue() -> Callable[..., dict[str, Any]]:
    return _dialogue
