"""Run `megatron-mode VERB`: the single-process commands around a training run.

A verb's module is imported only when that verb is asked for. It offers `add_arguments(parser)`,
which imports nothing heavy so that `--help` stays instant, and `run(args) -> exit status`.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from megatron_mode import __version__
from megatron_mode.errors import ConfigError, MegatronModeError


class Verb(NamedTuple):
    """Say where a verb lives and what it does."""

    module: str
    summary: str


VERBS = {
    "prepare": Verb(
        "megatron_mode.tokens.prepare_command", "tokenizer and sources from JSON lines"
    ),
    "convert": Verb(
        "megatron_mode.tokens.convert_command", "dialogues of other formats to JSON lines"
    ),
    "pack": Verb("megatron_mode.tokens.pack_command", "row tables of whole documents"),
    "order": Verb("megatron_mode.order_command", "which rows a run takes, and when: plan, query"),
    "merge": Verb("megatron_mode.tokens.merge_command", "join the shards of a preparation"),
    "reshard": Verb(
        "megatron_mode.checkpoint.reshard_command", "rewrite a checkpoint for another layout"
    ),
    "report": Verb("megatron_mode.report.command", "one HTML file with the pictures of runs"),
    "score": Verb("megatron_mode.score_command", "loss and mode probability of each document"),
    "generate": Verb("megatron_mode.generate", "continue a prompt, each token's mode in colour"),
}
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
# What the machine refuses, as opposed to what our code does wrong.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT,
             errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
             errno.EBUSY, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOTEMPTY)  # fmt: skip


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Report a usage error as one sentence that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and leaving."""
        raise ConfigError(f"{message}; `{self.prog} --help` shows what is accepted")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments; raises ConfigError, for a misspelt option with the nearest one."""
        known = [option for action in self._actions for option in action.option_strings]
        given = list(arguments)[: arguments.index("--") if "--" in arguments else None]
        for word in given:
            option = word.partition("=")[0]
            # argparse takes a word with a space for a value, as in --prompt "--- a rule".
            if option.startswith("--") and option not in known and " " not in option:
                self.error(f"{option} is not an option{_suggest(option, known)}")
            if option in known and word == f"{option}=--":
                # Python 3.11 takes the `--` out and hands the option an empty list.
                self.error(f"argument {option}: expected one argument")
        return self.parse_intermixed_args(arguments)


def _suggest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _help_text() -> str:
    lines = [f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: megatron-mode VERB [--help] ...",
            "",
            "Train decoder language models that know, at each token, which mode they are in.",
            "Training itself: deepspeed launch/pretrain.py --config configs/run/tiny.yaml",
            "",
            "verbs:",
            *lines,
            "",
            "options:",
            "  -h, --help  show this text; after a verb: its arguments, defaults and units",
            "  --version   show the version",
        ]
    )


def run_verb(arguments: Sequence[str]) -> int:
    """Run one verb and return its exit status; raises MegatronModeError for a user's mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help_text())
        return 0 if arguments else BAD_INPUT
    name, *rest = arguments
    if name == "--version":
        print(f"megatron-mode {__version__}")
        return 0
    if name not in VERBS:
        near = _suggest(name, list(VERBS)) or "; `megatron-mode --help` explains them"
        raise ConfigError(f"verb is {name!r}: accepted is one of {', '.join(VERBS)}{near}")
    module = importlib.import_module(VERBS[name].module)
    parser = CommandParser(
        prog=f"megatron-mode {name}",
        description=module.__doc__,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse(rest))
    return status


def exit_status(
    program: Callable[[], int], speaks: Callable[[int], bool] = lambda status: True
) -> int:
    """Run a program and return its exit status; a user's mistake is one sentence, no traceback.

    Bad input, a full disk or a read-only target give 2, a stop by a policy of `health` 3, Ctrl-C
    130, a closed pipe 141. Our own bugs keep their traceback. `speaks(status)` is false in a
    process whose peers print the sentence.
    """

    def say(sentence: str, status: int) -> int:
        if speaks(status):
            print(sentence, file=sys.stderr)
        return status

    try:
        status = program()
        sys.stdout.flush()
    except MegatronModeError as error:
        return say(f"error: {error}", error.exit_status)
    except KeyboardInterrupt:
        return say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it a place that accepts the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return say(
            f"error: {error.filename or 'the target'} cannot be used: {error.strerror}; accepted "
            "is a path that exists where it is read and a folder with write permission and room "
            "where it is written",
            BAD_INPUT,
        )
    return status


def main() -> int:
    """Run the verb on the command line."""
    return exit_status(lambda: run_verb(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
