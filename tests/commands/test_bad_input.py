"""A mistake is one sentence on stderr and exit status 2; no traceback, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tiny_run import PRETRAIN, Outcome, Trained, before_others, command, refusal, tree, variables

Call = Callable[..., Outcome]

GOOD = '{"id": "a", "text": "The sea."}\n'
TURN = '{"role": "user", "content": "Where?"}'
# An import of torch costs 5 s; a mistake that can be told without it must be.
NO_TORCH = "raise ImportError('torch was imported before the mistake was found')\n"


@pytest.fixture
def refused(trained: Trained, tmp_path: Path, call_program: Call) -> Callable[..., str]:
    """Call the program of training; return the sentence that it ends with before it trains."""

    def call(*words: str, program: Callable[[list[str]], Outcome] | None = None) -> str:
        run = tmp_path / "run"
        given = ["--config", str(trained.config), f"data.root={trained.data}", f"run.dir={run}"]
        outcome = (program or partial(call_program, "pretrain"))([*given, *words])
        assert outcome.out == ""
        assert not run.exists()
        return refusal(outcome)

    return call


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (GOOD + '{"text": "cut\n', "in.jsonl:2: malformed JSON at column"),
        ("", "in.jsonl holds no documents"),
        (GOOD + f'{{"messages": [{TURN.replace("user", "human")}]}}\n',
         'in.jsonl:2: messages[0].role is "human"; accepted are system, developer, user'),
        (GOOD + f'{{"id": "b", "messages": [{TURN}]}}\n', "has lines of Mode 1 (text) and of"),
    ],
)  # fmt: skip
def test_prepare_refuses_bad_lines(verb: Call, tmp_path: Path, text: str, fragment: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    words = ("--out", tmp_path / "data", "--input", tmp_path / "in.jsonl", "--vocab-size", "300")
    sentence = refusal(verb("prepare", *words))
    assert fragment in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        # argparse took the `--` out and handed the verb an empty list.
        (["merge", "--out", "{new}", "--workers=--"], "--workers: expected one argument"),
        (["merge", "--out", "{new}", "--workers=2000"], "use a whole number of 1 to 1024"),
        (["report", "{run}", "--out", ""], "--out . cannot be written (Is a directory)"),
        (["prepare", "--out", "{new}", "--input", "{in}", "--vocab-size", "1" + "0" * 40],
         "use a whole number of 1 to 16777216"),
        (["score", "{run}", "{in}", "--threads", "1" + "0" * 40], "of 0 to 1024"),
        (["score", "{run}", "{in}", "--limit", "1" + "0" * 40], "of 1 or more, below 2**63"),
        # A wrong name behind a right one left the table of the right one.
        (["pack", "{data}", "--seq-len", "48", "--sources", "books,nope"], "nope.idx does not"),
    ],
)  # fmt: skip
def test_verbs_refuse_and_write_nothing(
    verb: Call, trained: Trained, tmp_path: Path, words: list[str], fragment: str
) -> None:
    places = {"run": trained.run, "data": trained.data, "in": trained.input, "new": tmp_path / "n"}
    before = tree(trained.data)
    assert fragment in refusal(verb(*(word.format(**places) for word in words)))
    assert tree(trained.data) == before
    assert not places["new"].exists()


def test_prepare_refuses_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("not json\n")
    words = ("prepare", "--out", tmp_path / "data", "--input", tmp_path / "in.jsonl")
    assert "in.jsonl:1: malformed JSON" in refusal(command("-m", "megatron_mode", *words))
    assert not (tmp_path / "data").exists()


def test_prepare_refuses_a_read_only_target(
    verb: Call, trained: Trained, read_only_disk: Path
) -> None:
    sentence = refusal(verb("prepare", "--out", read_only_disk / "d", "--input", trained.input))
    assert "cannot be written (Read-only file system)" in sentence


def test_prepare_refuses_a_full_disk(verb: Call, tmp_path: Path, small_disk: Path) -> None:
    spleen = "It is a way I have of driving off the spleen. " * 200
    lines = [json.dumps({"text": f"{number} {spleen}"}) for number in range(200)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = ("--out", small_disk / "d", "--input", tmp_path / "in.jsonl", "--vocab-size", "320")
    assert "cannot be written (No space left on device)" in refusal(verb("prepare", *words))
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--cofnig", "x"], "--cofnig is not an option; did you mean --config?"),
        (["--stepz", "4"], "--stepz is not an option; set a key of the run file as in run.steps=4"),
        (["run.stesp=3"], "time_margin_seconds; did you mean steps?"),
        (["parallel.tensor=3"], "parallel.tensor is 3; accepted: a divisor of "
         "model.attention_heads = 2 and of model.kv_heads = 1; use 1"),
        (["parallel.pipeline=2"], "world size is 1; accepted: parallel.tensor * "
         "parallel.pipeline = 2 times a divisor of"),
        (["data.root=nowhere"], "nowhere/tokenizer.json does not exist; data.root must be"),
        (["mix.mode1.sources.0.name=bokos"], "the sources in "),
        (["mix.mode1.sources.0.name=chat", "mix.mode2.sources.0.name=books"],
         "is prepared as Mode 2 but the config lists it as Mode 1"),
        (["model.vocab_size=512"], "model.vocab_size is 512, but the data in"),
        (["mix.mode1.sources.0.epochs_max=0.01"], "within epochs_max"),
        (["model.seq_len=100000"], "at least 1 row of 100000 + 1 tokens is needed"),
    ],
)  # fmt: skip
def test_training_refuses_before_torch_is_imported(
    refused: Callable[..., str], tmp_path: Path, words: list[str], fragment: str
) -> None:
    (tmp_path / "torch.py").write_text(NO_TORCH)

    def program(words: list[str]) -> Outcome:
        return command(PRETRAIN, *words, PYTHONPATH=before_others(tmp_path))

    assert fragment in refused(*words, program=program)


def test_training_needs_a_config() -> None:
    sentence = refusal(command(PRETRAIN))
    assert "required: --config; `pretrain.py --help` shows" in sentence


def test_a_mistake_is_said_once_by_rank_0(trained: Trained, tmp_path: Path) -> None:
    """A launcher ends all processes when the first leaves: rank 0 must have said it by then."""
    world = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    processes = []
    for rank in ("1", "0"):
        environment = variables(RANK=rank, LOCAL_RANK=rank, **world)
        words = [sys.executable, str(PRETRAIN), "--config", str(trained.config)]
        processes.append(
            subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
        )
        time.sleep(0.5)
    while all(process.poll() is None for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.terminate()
    said = [process.communicate()[1] for process in processes]
    assert said[0] == ""
    assert refusal(Outcome(processes[1].returncode, "", said[1])) == (
        "error: world size is 3; accepted: parallel.tensor * parallel.pipeline = 1 times a "
        "divisor of batch.global_rows / batch.micro_rows = 2; start 2 processes, or change the "
        "batch\n"
    )


@pytest.fixture
def copied_data(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.data, tmp_path / "copy"))


@pytest.mark.parametrize("change", [{"digest": -1}, {"padded_vocab_size": "384"}, {"control": 3}])
def test_training_refuses_a_tokenizer_json_of_other_kinds(
    refused: Callable[..., str], copied_data: Path, change: dict[str, object]
) -> None:
    path = copied_data / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert f"{path} cannot be read" in refused(f"data.root={copied_data}")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".flags.bin", ".docs.arrow", ".json"])
def test_training_refuses_truncated_files(
    refused: Callable[..., str], copied_data: Path, suffix: str
) -> None:
    path = copied_data / f"books{suffix}"
    path.write_bytes(path.read_bytes()[:-7])
    assert str(path) in refused(f"data.root={copied_data}")


@pytest.mark.parametrize("missing", [".bin", ".idx", ".flags.bin", ".docs.arrow", ".json"])
def test_training_refuses_missing_files(
    refused: Callable[..., str], copied_data: Path, missing: str
) -> None:
    (copied_data / f"chat{missing}").unlink()
    assert str(copied_data / f"chat{missing}") in refused(f"data.root={copied_data}")


def test_training_refuses_a_tokenizer_that_does_not_match(
    verb: Call,
    refused: Callable[..., str],
    copied_data: Path,
    trained: Trained,
    tmp_path: Path,
) -> None:
    words = ("--out", tmp_path / "other", "--input", trained.input, "--vocab-size", "310")
    assert verb("prepare", *words).status == 0
    shutil.copy(tmp_path / "other" / "tokenizer.model", copied_data)
    assert "but tokenizer.json beside it names" in refused(f"data.root={copied_data}")
    shutil.copy(tmp_path / "other" / "tokenizer.json", copied_data)
    sentence = refused(f"data.root={copied_data}")
    assert f"Source {copied_data / 'books'} was prepared with tokenizer" in sentence


def test_training_refuses_a_read_only_target(
    refused: Callable[..., str], read_only_disk: Path
) -> None:
    for place in (read_only_disk / "run", read_only_disk):
        sentence = refused(f"run.dir={place}")
        assert f"{read_only_disk} cannot be used (Read-only file system)" in sentence


def test_training_refuses_a_file_as_run_folder(
    refused: Callable[..., str], trained: Trained
) -> None:
    for place in (trained.config, trained.config / "run"):
        assert f"{trained.config} cannot be used" in refused(f"run.dir={place}")


def test_an_accelerator_that_was_asked_for_and_is_broken_ends_the_run(
    pretrain: Call, tmp_path: Path
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    sentence = refusal(pretrain("accelerators.attention=flash", paths=(str(tmp_path),)))
    assert "needs flash-attention, here broken (ImportError: libcudart.so.12: no such" in sentence
    assert sentence.endswith("set accelerators.attention=auto\n")
