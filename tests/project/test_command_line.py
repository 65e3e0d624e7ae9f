"""`megatron-mode` starts at once and answers mistakes with one sentence and status 2."""

import os
import re
import subprocess
import sys

import pytest

from megatron_mode.__main__ import VERBS, run_verb
from megatron_mode.command_line import exit_status
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
        (["scoer"], "verb is 'scoer': accepted is one of train, prepare, "),
        (["scoer"], "; did you mean score?"),
        (["prepare", "--vocab-sise", "3"], "did you mean --vocab-size?"),
        (["prepare", "--vocab-size", "many"], "the value is 'many', accepted is a whole"),
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
        (OSError(30, "Read-only file system", "/mnt"), 2, "error: /mnt cannot be used: Read-only"),
        (OSError(28, "No space left on device"), 2, "error: the target cannot be used: No space"),
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
