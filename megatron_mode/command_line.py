"""Hold what all command lines need: parser, number types, text tables, exit status."""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_mode.errors import ConfigError, ExitStatus, MegatronModeError, refusal
from megatron_mode.streams import discard_stdout, open_streams

# What the machine refuses, as opposed to what our code does wrong.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOENT,
             errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
             errno.EBUSY, errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENOTEMPTY)  # fmt: skip
LARGEST, MOST_WORKERS = 2**63 - 1, 1024
Number = TypeVar("Number", int, float)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        return action.help if nothing else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Report a usage error as one sentence that names the nearest option."""

    def __init__(self, **settings: Any) -> None:
        """Begin; options of type Path expand `~`, which the shell leaves in --out=~/data."""
        super().__init__(**settings)
        self.register("type", Path, _path)

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
                near = suggest(option, [name for name in known if name != "--help"])
                is_run = any(action.dest == "overrides" for action in self._actions)
                key = "; set a key of the run file as in run.steps=4" if is_run else ""
                self.error(f"{option} is not an option{near or key}")
            if option in known and word == f"{option}=--":
                # Python 3.11 takes the `--` out and hands the option an empty list.
                self.error(f"argument {option}: expected one argument")
        return self.parse_intermixed_args(arguments)


def suggest(given: str, known: Sequence[str]) -> str:
    """Return the words that name the nearest known name, or nothing."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"the value is {text[:40]!r}, but no user of that name has a home folder; write the "
            "path out"
        ) from None


def whole(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """Return the type of an option that takes whole numbers from `least` to `most`."""
    limit = f"{least} or more, below 2**63" if most == LARGEST else f"{least} to {most}"
    return _number(int, f"a whole number of {limit}", lambda value: least <= value <= most)


def real(least: float) -> Callable[[str], float]:
    """Return the type of an option that takes finite numbers from `least`."""
    return _number(float, f"a number of {least:g} or more", lambda n: least <= n < float("inf"))


def _number(
    read: Callable[[str], Number], kind: str, is_accepted: Callable[[Number], bool]
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            if is_accepted(value := read(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"the value is {text[:40]!r}; use {kind}")

    return parse


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text in columns of equal width, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def run_program(program: Callable[[], int]) -> int:
    """Run a program of one process and return its exit status, also where nobody reads stdout."""
    try:
        status = exit_status(program)
    except BrokenPipeError:
        status = ExitStatus.BROKEN_PIPE
    if status:
        discard_stdout()
    return status


def exit_status(
    program: Callable[[], int], speaks: Callable[[int], bool] = lambda status: True
) -> int:
    """Run a program and return its exit status; a user's mistake is one sentence, no traceback.

    Our own bugs keep their traceback. `speaks(status)` is false in a process whose peers print the
    sentence.
    """
    open_streams()

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
        return say("interrupted", ExitStatus.INTERRUPTED)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        path = Path(error.filename) if isinstance(error.filename, str) else None
        remedy = (
            "start again: a path to read must exist, one to write needs a folder with write "
            "permission and room"
        )
        return say(f"error: {refusal(path, error, remedy, verb='used')}", ExitStatus.MISTAKE)
    return status
