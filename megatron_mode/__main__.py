"""Run `megatron-mode VERB`: the single-process commands around a training run.

A verb's module is imported only when that verb is asked for. It offers `add_arguments(parser)`,
which imports nothing heavy so that `--help` stays instant, and `run(args) -> exit status`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_mode import __version__
from megatron_mode.command_line import CommandParser, Formatter, run_program, suggest
from megatron_mode.errors import ConfigError, ExitStatus

# Each is a module of `commands`.
VERBS = {
    "train": "train, or resume, a run",
    "prepare": "tokenizer and sources from JSON lines",
    "convert": "dialogues of other formats to JSON lines",
    "pack": "row tables of complete documents",
    "order": "which rows a run takes, and when: plan, query",
    "merge": "join the shards of a preparation",
    "reshard": "rewrite a checkpoint for another layout",
    "report": "one HTML file with the pictures of runs",
    "score": "loss and mode probability of each document",
    "generate": "continue a prompt, each token's mode in colour",
}


def _help_text() -> str:
    lines = [f"  {name:<10} {summary}" for name, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: megatron-mode VERB [--help] ...",
            "",
            "Train decoder language models that know, at each token, which mode they are in.",
            "On several processes: deepspeed launch/pretrain.py --config configs/run/tiny.yaml",
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
        return ExitStatus.DONE if arguments else ExitStatus.MISTAKE
    name, *rest = arguments
    if name == "--version":
        print(f"megatron-mode {__version__}")
        return 0
    if name not in VERBS:
        near = suggest(name, list(VERBS)) or "; `megatron-mode --help` explains them"
        raise ConfigError(f"verb is {name!r}: use one of {', '.join(VERBS)}{near}")
    module = importlib.import_module(f"megatron_mode.commands.{name}")
    parser = CommandParser(
        prog=f"megatron-mode {name}",
        description=module.__doc__,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse(rest))
    return status


def main() -> int:
    """Run the verb on the command line."""
    return run_program(lambda: run_verb(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
