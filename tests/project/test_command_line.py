"""`megatron-mode` starts at once and answers mistakes with one sentence and status 2."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mode.__main__ import VERBS, run_verb
from megatron_mode.command_line import CommandParser, exit_status
from megatron_mode.errors import ConfigError, DataError

HELP_SECONDS = 0.5


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "megatron_mode", *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_instant(verb):
    begin = os.times()
    done = run(*([verb, "--help"] if verb else ["--help"]))
    end = os.times()
    assert done.returncode == 0, done.stderr
    assert "usage: megatron-mode" in done.stdout
    # Processor time of the child: a busy machine makes only the clock on the wall run longer.
    used = end.children_user - begin.children_user + end.children_system - begin.children_system
    assert used < HELP_SECONDS


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_imports_no_torch(verb):
    script = (
        "import sys\n"
        "from megatron_mode.__main__ import run_verb\n"
        "try:\n    run_verb([sys.argv[1], '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, verb], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_option_says_what_it_does(verb, capsys):
    with pytest.raises(SystemExit):
        run_verb([verb, "--help"])
    # An option without help is the last thing on its line and followed by no indented text.
    text = capsys.readouterr().out
    bare = re.findall(r"^  (--?\S+(?: \S+)?)\n(?!\s{8,}\S)", text, flags=re.M)
    assert bare == []


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["scoer"], "verb is 'scoer': use one of train, prepare, "),
        (["scoer"], "; did you mean score?"),
        (["prepare", "--vocab-sise", "3"], "did you mean --vocab-size?"),
        (["prepare", "--vocab-size", "many"], "the value is 'many'; use a whole"),
        (["report"], "`megatron-mode report --help` shows what is accepted"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_sentence(arguments, fragment):
    done = run(*arguments)
    assert done.returncode == 2
    assert fragment in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_nothing_asked_shows_the_verbs():
    done = run()
    assert done.returncode == 2
    assert all(f"  {verb}" in done.stdout for verb in VERBS)


def raise_error(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "fragment"),
    [
        (ConfigError("run.steps is 0: accepted is 1"), 2, "error: run.steps is 0: accepted is 1"),
        (DataError("a.jsonl line 3"), 2, "error: a.jsonl line 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(30, "Read-only file system", "/mnt"), 2, "error: /mnt cannot be used (Read-only"),
        (OSError(28, "No space left on device"), 2, "error: the target cannot be used (No space"),
    ],
)
def test_mistakes_and_refusals_become_a_status(error, status, fragment, capsys):
    assert exit_status(lambda: raise_error(error)) == status
    message = capsys.readouterr().err
    assert message.startswith(fragment)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(9, "Bad file descriptor")])
def test_our_own_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        exit_status(lambda: raise_error(error))


def test_a_closed_pipe_is_quiet():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mode", "--help"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_the_terminal_cannot_encode_is_escaped_as_json_does(encoding):
    text = "é “Ж” 😀"
    script = (
        "import json, sys\nfrom megatron_mode.command_line import CommandParser, exit_status\n"
        "sys.exit(exit_status(lambda: print(json.dumps(sys.argv[1], ensure_ascii=False)) or 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, text],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode(encoding)) == text


@pytest.mark.parametrize(
    ("redirection", "status"), [(">&-", 0), (">&- 2>&-", 0), ("2>&-", 0), (">/dev/full", 2)]
)
def test_output_that_is_closed_or_full_is_no_traceback(redirection, status):
    command = f"{shlex.quote(sys.executable)} -m megatron_mode --help {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_closed_stderr_does_not_put_messages_into_the_answer():
    command = f"{shlex.quote(sys.executable)} -m megatron_mode scoer 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch, tmp_path):
    """The shell leaves it alone in --out=~/data."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = CommandParser()
    parser.add_mutually_exclusive_group().add_argument("--out", type=Path, nargs="+")
    assert parser.parse(["--out", "~/a", "b/~"]).out == [tmp_path / "a", Path("b/~")]
    assert parser.parse(["--out=~"]).out == [tmp_path]
    with pytest.raises(ConfigError, match="'~no-such-user/a', but no user of that name"):
        parser.parse(["--out=~no-such-user/a"])
