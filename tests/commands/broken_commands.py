"""Break a command line: options, numbers, names and files that a program must refuse.

Words in braces stand for places of the sandbox, which the test fills in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

ABSENT, EMPTY_FOLDER, EMPTY_FILE, NOISE = "nowhere/at-all", "{empty}", "{void}", "{noise}"
NOT_INTEGERS = (
    "",
    "x",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "0x10",
    "--",
    "½",
    "1 2",
    "[1]",
    "None",
    "9" * 5000,
)
NOT_NUMBERS = ("", "x", "nan", "inf", "-inf", "1,5", "1e400", "½", "0x1p3", "[1]", "None")


class Spec(NamedTuple):
    """Describe a program: words that work, and what each option must refuse."""

    words: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    replaced: dict[str, tuple[str, ...]]
    """Words of the working command line and what may not stand in their place."""
    required: tuple[str, ...] = ()


def integers(least: int, most: int | None = None) -> tuple[str, ...]:
    """Return words that are no whole number in the range."""
    beyond = () if most is None else (str(most + 1), "1" + "0" * 40)
    return (*NOT_INTEGERS, str(least - 1), "-9999999999999999999999", *beyond)


def numbers(least: float, most: float | None = None) -> tuple[str, ...]:
    """Return words that are no number in the range."""
    beyond = () if most is None else (str(most + 0.01), "1e300")
    return (*NOT_NUMBERS, str(least - 0.01), "-1e300", *beyond)


FILES = (ABSENT, EMPTY_FOLDER, EMPTY_FILE, NOISE, "", "{in}/below", "n" * 3000)
FOLDERS = (ABSENT, EMPTY_FOLDER, EMPTY_FILE, NOISE, "{in}/below", "n" * 3000)
CHOICE = ("nope", "", "NONE", "none,start", "☃", "0")
TARGETS = ("{in}/below", "{noise}/x", "t" * 3000)
SEED = 2**63 - 1
LARGEST = 2**63 - 1

SPECS: dict[str, Spec] = {
    "prepare": Spec(
        ("--out", "{new}/d", "--input", "{in}", "--vocab-size", "320"),
        {
            "--plain-share": numbers(0, 1),
            "--valid-share": numbers(0, 1),
            "--seed": NOT_INTEGERS,
            "--mode-tokens": CHOICE,
            "--mode-token-rate": numbers(0, 1),
            "--mode-token-loss": CHOICE,
            "--workers": integers(1, 1024),
            "--max-bad-lines": integers(0, LARGEST),
            "--duplicates": CHOICE,
            "--duplicate-ids": CHOICE,
            "--shard": (
                "",
                "x",
                "1",
                "1/1",
                "2/1",
                "-1/2",
                "0/0",
                "0/2",
                "a/b",
                "0/99999999",
            ),
            "--licence": ("\udcff",),
            "--tokenizer": FILES,
            "--sample": ("x",),
        },
        {"{in}": (*FILES, "{bad}", "{two-modes}"), "{new}/d": TARGETS, "320": integers(1, 2**24)},
        ("--out", "--input"),
    ),
    "convert": Spec(
        ("{dialogues}", "--from", "openai", "--out", "{new}/c.jsonl"),
        {
            "--source": ("", "a/b", "..", "☃", "x" * 101, " "),
            "--max-bad-lines": integers(0, LARGEST),
        },
        {
            "{dialogues}": (*FILES, "{bad}", "{in}"),
            "openai": (*CHOICE, "OpenAI", "open-ai"),
            "{new}/c.jsonl": ("{new}/c.txt", "{new}/c", "", "{in}/below.jsonl"),
        },
        ("--from", "--out"),
    ),
    "pack": Spec(
        ("{data}", "--seq-len", "32"),
        {"--sources": ("nope", "../data", "books,nope", "☃", "a/b", "books-vali")},
        {"{data}": FOLDERS, "32": integers(1, 2**20)},
        ("--seq-len",),
    ),
    "merge": Spec(
        ("--out", "{new}/m"),
        {"--workers": integers(1, 1024)},
        {"{new}/m": (ABSENT, EMPTY_FOLDER, EMPTY_FILE, "{data}", "{in}/below", "n" * 3000)},
        ("--out",),
    ),
    "order": Spec(
        ("{config}", "data.root={data}"),
        {
            "--rows": (
                "",
                "x",
                "5",
                "5:2",
                "-1:2",
                "0:99999999",
                "0:1e3",
                "½:3",
                "::",
                f"0:{'9' * 18}",
                f"0:{'9' * 5000}",
            ),
            "--step": integers(0, 2),
            "--document": (
                "",
                "x",
                "books",
                "books/",
                "/x",
                "nope/x",
                "books/nope",
                "books/\udcff",
                "☃/☃",
            ),
            "--verify": (*FOLDERS, "{data}"),
            "--export": ("{new}/x.txt", "{new}/x", "", "{in}/below.json", "{nowhere}/x.json"),
            "--plot": ("{in}/below.html", "{nowhere}/x.html", "{empty}"),
        },
        {"{config}": (*FILES, "{noise}.json", "{order-json}", "{data}")},
        ("{config}",),
    ),
    "report": Spec(
        ("{run}", "--out", "{new}/r.html"),
        {},
        {
            "{run}": (*FOLDERS, "{data}", "{broken-run}"),
            "{new}/r.html": ("{in}/below", "{nowhere}/x.html", "{empty}", ""),
        },
        ("{run}",),
    ),
    "score": Spec(
        ("{run}", "{in}"),
        {
            "--render": CHOICE,
            "--mode-tokens": CHOICE,
            "--mode-token-placement": CHOICE,
            "--mode-token-rate": numbers(0, 1),
            "--limit": integers(1, LARGEST),
            "--threads": integers(0, 1024),
        },
        {"{run}": (*FOLDERS, "{data}", "{broken-run}"), "{in}": (*FILES, "{bad}")},
        ("{run}", "{in}"),
    ),
    "generate": Spec(
        ("{run}", "--prompt", "The sea"),
        {
            "--tokens": integers(1, LARGEST),
            "--temperature": numbers(0),
            "--top-k": integers(0, LARGEST),
            "--seed": integers(0, SEED),
            "--threads": integers(0, 1024),
        },
        {"{run}": (*FOLDERS, "{data}", "{broken-run}"), "The sea": ("\udcff", "a\udc80b")},
        ("{run}", "--prompt"),
    ),
    "pretrain": Spec(
        ("--config", "{config}", "data.root={data}", "run.dir={new}/run"),
        {"--local_rank": NOT_INTEGERS, "--local-rank": NOT_INTEGERS},
        {
            "{config}": (*FILES, "{data}"),
            "data.root={data}": tuple(f"data.root={place}" for place in (*FOLDERS, "'a\\tb'")),
            "run.dir={new}/run": ("run.dir={in}", "run.dir={in}/below", "run.dir=", "run.dir=''"),
        },
        ("--config",),
    ),
}
OVERRIDES = (
    "x", "=", "==", "=3", "a.=1", ".a=1", "a..b=1", "run=3", "run.steps", "run.steps=",
    "run.steps=x", "run.steps=[", "run.steps.x=3", "run..steps=3", "run.stesp=3", "model=nope",
    "model=[]", "model=", "mix=../mix/tiny", "parallel=tp8", "parallel.tensor=0",
    "mix.mode1.sources.9.name=x", "x.y.z=1", "mix.mode1.sources.-1.name=x",
    "mix.mode1.sources.x=3", "mix.mode1.sources.0=3", "☃=1", "\udcff=1", "run.steps=\udcff",
    'run.dir="a\\0b"', "run.steps=!!python/name:os.system", "run.steps=&a [*a]",
    "run.steps=" + "[" * 9999, "run.steps=" + "9" * 9999, "loss=3", "loss.blocking=none",
    "data=data", "run.steps=1\nrun.seed=2", "run.steps=*x", "run.steps=? [x]",
    "run.steps={steps: 3}", "--=3", "-=3", "optimizer.schedule=WSD", "checkpoint.keep=0",
    "batch={global_rows: 8, micro_rows: 3}", "model.=3", "mix.edits.drop=books/x",
    "mix.edits.drop=[books/x]", "mix.mode2_fraction=0.5", "run.steps=1e309",
)  # fmt: skip
STRANGE_FLAGS = ("--nope", "--cofnig", "--outt", "-x", "-", "--json=1", "--help=3", "--=3", "--☃",
                 "---", "--Json", "--no-json", "--\udcff")  # fmt: skip


class Command(NamedTuple):
    """Hold a broken command line and what was done to it."""

    program: str
    words: list[str]
    done: str


def broken_option(rng: random.Random, program: str, spec: Spec) -> Command:
    """Give an option a value that it must refuse, or none at all."""
    name = rng.choice(list(spec.options))
    value = rng.choice(spec.options[name])
    words = [*spec.words, name] if rng.random() < 0.1 else [*spec.words, f"{name}={value}"]
    if name == "--sample":
        words = [*spec.words, name]  # beside --input
    return Command(program, words, f"{words[-1]}"[:80])


def broken_word(rng: random.Random, program: str, spec: Spec) -> Command:
    """Put something else in the place of a word."""
    name = rng.choice(list(spec.replaced))
    value = rng.choice(spec.replaced[name])
    words = [value if word == name else word for word in spec.words]
    return Command(program, words, f"{name} -> {value}"[:80])


def missing_word(rng: random.Random, program: str, spec: Spec) -> Command:
    """Leave out a word that is needed, an option with its value."""
    name = rng.choice(spec.required)
    at = spec.words.index(name)
    cut = 2 if name.startswith("--") else 1
    return Command(program, [*spec.words[:at], *spec.words[at + cut :]], f"without {name}")


def strange_flag(rng: random.Random, program: str, spec: Spec) -> Command:
    """Add an option that does not exist."""
    flag = rng.choice(STRANGE_FLAGS)
    at = rng.randrange(len(spec.words) + 1) if program not in ("prepare", "pretrain") else 0
    return Command(program, [*spec.words[:at], flag, *spec.words[at:]], f"{flag} at {at}")


def broken_override(rng: random.Random, program: str, spec: Spec) -> Command:
    """Add an override that cannot be."""
    override = rng.choice(OVERRIDES)
    return Command(
        program,
        [*spec.words, "--", override] if override[0] == "-" else [*spec.words, override],
        override[:80],
    )


def no_verb(rng: random.Random) -> Command:
    """Name a verb that does not exist."""
    verb = rng.choice(
        ["", "nope", "prepar", "PREPARE", "--json", "-v", "☃", "\udcff", "--", "../order", "plna"]
    )
    return Command(verb, ["--out", "{new}/d"], f"verb {verb}")


def broken_commands(rng: random.Random) -> Iterator[Command]:
    """Draw broken command lines for ever."""
    kinds = (broken_option, broken_word, missing_word, strange_flag, broken_override)
    while True:
        if rng.random() < 0.02:
            yield no_verb(rng)
            continue
        program, spec = rng.choice(list(SPECS.items()))
        takes_overrides = program in ("order", "pretrain")
        weights = (40 if spec.options else 0, 30, 8, 12, 60 if takes_overrides else 0)
        yield rng.choices(kinds, weights)[0](rng, program, spec)
