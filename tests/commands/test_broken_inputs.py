"""A thousand broken configs and command lines: each is one sentence, exit status 2, and no trace.

What is broken is known by how it was made; what is fine, likewise, and is accepted.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import broken_commands
import broken_configs
import config_limits
import pytest
import yaml
from tiny_run import PRETRAIN, RUN_FILE, Outcome, Trained, before_others, command

CONFIGS, COMMANDS, PROGRAMS = 600, 400, 24
BROKEN = "broken.yaml"
MOST_MISTAKES = 16  # of one file; each has a line
NO_TORCH = "raise ImportError('torch was imported before the mistake was found')\n"
Run = Callable[[str, list[str]], Outcome]


class Case(NamedTuple):
    """Hold what is called, and what was broken about it."""

    program: str
    words: list[str]
    done: str
    mistakes: int


class Box(NamedTuple):
    """Hold the folder in which everything is called, and the names of places in it."""

    folder: Path
    places: dict[str, str]
    tree: dict[str, Any]

    def fill(self, words: list[str]) -> list[str]:
        """Put the places' paths for their names in braces."""
        return [re.sub(r"\{([a-z-]+)\}", lambda name: self.places[name[1]], word) for word in words]

    def state(self) -> dict[str, tuple[int, int]]:
        """Return every path below the folder, and of files size and time of change."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.name == BROKEN:  # written for each case
                continue
            status = path.stat()
            # A file that came and went changes its folder's time, and is nothing left behind.
            times = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
            found[str(path)] = times
        return found


@pytest.fixture(scope="module")
def box(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Box:
    folder = tmp_path_factory.mktemp("box")
    for name, source in (("data", trained.data), ("run", trained.run), ("broken-run", trained.run)):
        shutil.copytree(source, folder / name)
    for name in ("new", "empty"):
        (folder / name).mkdir()
    for path in (folder / "broken-run").rglob("*.json*"):
        path.write_bytes(b"\xff" + path.read_bytes()[:100])
    (folder / "broken-run" / "config.yaml").write_text("x: [")
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    lines = [json.dumps({"id": "a", "text": "A"}), json.dumps({"id": "b", "messages": turns})]
    contents = {
        "in": trained.input.read_bytes(),
        "run.yaml": trained.config.read_bytes(),
        "void": b"",
        "noise": random.Random(3).randbytes(3000),
        "noise.json": b'{"a": [1, "\xff',
        "bad": b'{"text": 3}\n{"text": "cut\n',
        "two-modes": "\n".join(lines).encode(),
        "order-json": b'{"format": 1}',
        "dialogues": lines[1].encode(),
    }
    files = {name: name if "." in name else f"{name}.json" for name in contents}
    files |= {name: f"{name}.jsonl" for name in ("in", "bad", "two-modes", "dialogues")}
    files |= {"void": "void", "noise": "noise"}
    for name, content in contents.items():
        (folder / files[name]).write_bytes(content)
    files |= {"config": "run.yaml", "nowhere": "nowhere/at-all"}
    files |= {name: name for name in ("data", "run", "broken-run", "new", "empty")}
    tree = yaml.safe_load(RUN_FILE.replace("1e-3", "0.001"))  # PyYAML reads 1e-3 as text
    tree["data"] = {"root": "data"}
    tree["run"]["dir"] = "new/run"
    return Box(folder, {name: str(folder / file) for name, file in files.items()}, tree)


@pytest.fixture
def run(box: Box, call_program: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call a program in the box, up to where training would begin."""
    monkeypatch.chdir(box.folder)
    return call_program


def config_cases(box: Box, seed: int, count: int) -> Iterator[Case]:
    """Write broken run files, one after the other in the same place, and name who reads them."""
    path = box.folder / BROKEN
    drawn = broken_configs.broken_files(random.Random(seed), box.tree)
    for index, (done, content) in enumerate(islice(drawn, count)):
        path.write_bytes(content)
        trains = index % 3 > 0 or done.startswith("only pretrain")
        words = ["--config", path.name] if trains else [path.name]
        yield Case("pretrain" if trains else "order", words, done, MOST_MISTAKES)


def command_cases(box: Box, seed: int, count: int) -> Iterator[Case]:
    """Draw broken command lines."""
    for drawn in islice(broken_commands.broken_commands(random.Random(seed)), count):
        yield Case(drawn.program, box.fill(drawn.words), drawn.done, 1)


def fault(case: Case, outcome: Outcome) -> str | None:
    """Say what is wrong with how a case was refused."""
    lines = outcome.err.removeprefix("error: ").splitlines()
    is_said = outcome.err.startswith("error: ") and outcome.err.endswith("\n")
    if outcome.status != 2:
        return f"status {outcome.status}"
    if not is_said or "Traceback" in outcome.err or not all(map(str.strip, lines)):
        return "no sentence"
    if len(lines) > case.mistakes:
        return f"{len(lines)} lines"
    if outcome.out:
        return "something on stdout"
    return None


def check_refused(box: Box, run: Run, cases: Iterator[Case]) -> None:
    """Call every case; fail with all that were not refused in a sentence or left a trace."""
    faults: list[str] = []
    before = box.state()
    for case in cases:
        try:
            outcome = run(case.program, case.words)
            found = fault(case, outcome)
        except BaseException as error:
            outcome, found = Outcome(1, "", ""), f"raised {error!r}"
        if (after := box.state()) != before:
            found = found or f"wrote {sorted(set(after.items()) ^ set(before.items()))[0]}"
            before = after
        if found:
            faults.append(ascii(f"{case.program} {case.done}: {found}: {outcome.err[:200]}"))
    assert faults == []


@pytest.mark.usefixtures("alone")
def test_a_thousand_broken_inputs_are_refused(box: Box, run: Run) -> None:
    check_refused(box, run, config_cases(box, 0, CONFIGS))
    check_refused(box, run, command_cases(box, 0, COMMANDS))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("alone")
def test_ten_thousand_more_are_refused(box: Box, run: Run) -> None:
    check_refused(box, run, config_cases(box, 1, 10 * CONFIGS))
    check_refused(box, run, command_cases(box, 1, 10 * COMMANDS))


@pytest.mark.parametrize("program", ["pretrain", "order"])
def test_what_is_fine_is_accepted(box: Box, run: Run, program: str) -> None:
    """The tables of what is broken stand on one that is not, and limits are accepted themselves."""
    for wanted in config_limits.FINE:
        tree = box.tree
        for key, value in wanted.items():
            tree = broken_configs.apply(tree, broken_configs.Change(key, value))
        (box.folder / "fine.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True))
        words = ["--config", "fine.yaml"] if program == "pretrain" else ["fine.yaml"]
        outcome = run(program, words)
        assert (outcome.status, outcome.err) == (0, ""), (wanted, outcome)
        assert not (box.folder / "new" / "run").exists()


def test_programs_refuse_as_processes(box: Box, tmp_path: Path) -> None:
    """A sample goes through real processes; training's, where torch cannot be imported."""
    (tmp_path / "torch.py").write_text(NO_TORCH)
    before = box.state()

    def call(case: Case) -> str | None:
        trains = case.program == "pretrain"
        program = [PRETRAIN] if trains else ["-m", "megatron_mode", case.program]
        more = {"PYTHONPATH": before_others(tmp_path)} if trains else {}
        found = fault(case, command(*program, *case.words, **more))
        return found and ascii(f"{case.program} {case.done}: {found}")

    drawn = [case for case in command_cases(box, 2, 8 * PROGRAMS) if case.program != "score"]
    with ThreadPoolExecutor(2) as pool:
        assert [found for found in pool.map(call, drawn[:PROGRAMS]) if found] == []
    assert box.state() == before
