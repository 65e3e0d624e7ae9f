"""Break a run file: one mutation each, wrong by its kind and not by what the program says of it.

What a key accepts is written down here anew, so that the program is judged by another list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml
from broken_yaml import broken_text
from config_limits import CONTRADICTIONS, COUNT, SIZE, TRAINED_ONLY

Tree = dict[str, Any]

# key: (least, most) of its integers
INTEGERS: dict[str, tuple[int, int]] = {
    "run.steps": (1, COUNT),
    "run.seed": (0, 2**63 - 1),
    "run.eval_every_steps": (0, COUNT),
    "run.eval_rows": (1, SIZE),
    "run.threads": (0, 1024),
    "model.layers": (1, 10_000),
    "model.hidden_size": (1, SIZE),
    "model.ffn_hidden_size": (1, SIZE),
    "model.attention_heads": (1, SIZE),
    "model.kv_heads": (1, SIZE),
    "model.seq_len": (1, SIZE),
    "data.workers": (1, 1024),
    "data.prefetch_steps": (1, SIZE),
    "mix.mode1.sources.0.onset_tokens": (0, COUNT),
    "mix.mode2.sources.0.ramp_tokens": (0, COUNT),
    "mix.mode2_fraction.begin_tokens": (0, COUNT),
    "loss.keep_logits_bytes": (0, COUNT),
    "loss.blocking.warmup_tokens": (0, COUNT),
    "parallel.tensor": (1, COUNT),
    "parallel.pipeline": (1, COUNT),
    "batch.global_rows": (1, SIZE),
    "batch.micro_rows": (1, SIZE),
    "optimizer.warmup_steps": (0, COUNT),
    "optimizer.decay_steps": (0, COUNT),
    "checkpoint.every_steps": (0, COUNT),
    "checkpoint.keep": (1, COUNT),
    "checkpoint.permanent_every_steps": (0, COUNT),
    "health.spike_window_steps": (1, COUNT),
    "health.rollback_steps": (1, COUNT),
    "health.max_skips": (0, COUNT),
    "health.max_skips_window_steps": (1, COUNT),
}
# key: numbers that it must refuse
NUMBERS: dict[str, tuple[float, ...]] = {
    "model.rope_base": (0, -1, -1e300),
    "model.norm_epsilon": (0, -1e-9),
    "model.init_std": (0, -0.02),
    "mix.mode1.sources.0.weight": (0, -1, -1e-300),
    "mix.mode2.sources.0.epochs_max": (0, -0.5),
    "mix.mode2_fraction.start": (-0.1, 1.1, 1e300),
    "loss.mode_weight": (-0.1, -1e300),
    "loss.z_weight": (-1e-300, -1),
    "loss.blocking.tau": (0.5, 1, 0, -1, 2),
    "loss.blocking.cap": (-0.01, 1.01),
    "optimizer.learning_rate": (0, -1e-3),
    "optimizer.min_learning_rate": (-1e-9, -1),
    "optimizer.beta1": (1, -0.1, 1.5),
    "optimizer.beta2": (1, -0.1, 2),
    "optimizer.epsilon": (0, -1e-8),
    "optimizer.weight_decay": (-0.1,),
    "optimizer.clip_grad_norm": (-1, -1e-300),
    "run.time_limit_seconds": (0, -1, 1e-300, 60),  # at most the margin
    "run.time_margin_seconds": (-1e-9, -60),
    "health.spike_factor": (0, -1),
    "health.stall_seconds": (-1e-300, -1),
    "health.start_stall_seconds": (0, -1),
}
CHOICES = (
    "run.precision",
    "mix.mode1.sources.0.when_dry",
    "mix.mode2.sources.0.packing",
    "mix.valid.sources.0.mode",
    "mix.mode2_fraction.shape",
    "mix.mode2_lm_loss",
    "loss.implementation",
    "loss.reduce_dtype",
    "loss.blocking.policy",
    "loss.blocking.direction",
    "parallel.activation_checkpointing",
    "parallel.zero_stage",
    "optimizer.schedule",
    "checkpoint.reshard",
    "health.non_finite",
    "health.spike",
    "parallel.schedule",
    "accelerators.attention",
    "accelerators.norm",
    "accelerators.adamw",
)
TEXTS = ("run.dir", "data.root", "model.name", "mix.mode1.sources.0.name")
FLAGS = ("model.tied_embeddings", "mix.reset_at_documents", "loss.check_targets",
         "loss.blocking.renormalise", "checkpoint.asynchronous", "checkpoint.fallback",
         "parallel.sequence_parallel")  # fmt: skip
LISTS = ("mix.mode1.sources", "mix.mode2.sources", "mix.mode2_fraction.points", "mix.edits.inject",
         "mix.edits.cohorts", "mix.edits.replace", "mix.mode1.sources.0.weight_points",
         "health.leave_out_steps")  # fmt: skip
SECTIONS = ("run", "data", "loss", "loss.blocking", "optimizer", "checkpoint", "mix.mode1",
            "mix.mode2_fraction", "mix.edits", "mix.role_weights", "health", "parallel",
            "accelerators")  # fmt: skip
REQUIRED = ("run", "model", "mix", "model.name", "model.layers", "model.hidden_size",
            "model.ffn_hidden_size", "model.attention_heads", "model.kv_heads", "model.seq_len",
            "mix.mode1.sources.0.name", "mix.valid.sources.0.name")  # fmt: skip

ODD_TEXTS = ("abc", "", "12", "1.5", "ten", "½", "١٢", "0x1F", "1_000", "𝟙𝟚", "NaN", ".nan",
             "-.inf", "null ", "☃" * 50, "a\u202eb", "x" * 2000, "{{steps}}", "$(id)",
             "%s%n")  # fmt: skip
NOT_A_SCALAR: tuple[Any, ...] = ([], {}, [1], {"a": 1}, [[[]]], {"": None})


def wrong_integer(rng: random.Random, key: str) -> Any:
    least, most = INTEGERS[key]
    beyond = (least - 1, -(10**30), most + 1, 10**40, 10**300, least + 0.5, 1e-300)
    return rng.choice([*beyond, True, False, None, rng.choice(ODD_TEXTS), *NOT_A_SCALAR])


def wrong_number(rng: random.Random, key: str) -> Any:
    others = (True, rng.choice(ODD_TEXTS), *NOT_A_SCALAR)
    return rng.choice([*NUMBERS[key] * 3, *others])


def wrong_choice(rng: random.Random, key: str) -> Any:
    return rng.choice(["nope", "", "None", 7, -1, 0.5, True, *ODD_TEXTS, *NOT_A_SCALAR])


def wrong_text(rng: random.Random, key: str) -> Any:
    return rng.choice([12, 1.5, True, None, "", " ", "a\tb", "a\x00b", "a\nb", *NOT_A_SCALAR])


def wrong_flag(rng: random.Random, key: str) -> Any:
    return rng.choice(["yes", "no", "on", 0, 1, None, *ODD_TEXTS, *NOT_A_SCALAR])


def wrong_list(rng: random.Random, key: str) -> Any:
    if key == "health.leave_out_steps":  # a list of numbers is what it takes
        return rng.choice(["x", True, None, {}, [None], ["x"], [[]], [{}], [-1], [0.5], [True]])
    return rng.choice(["x", 3, True, None, {}, {"0": 1}, [1], [None], ["x"], [[]], [[[]]], [{}],
                       [{"name": 3}], [{"nam": "books"}], [{"name": "books"}, 4]])  # fmt: skip


def wrong_section(rng: random.Random, key: str) -> Any:
    return rng.choice([3, 0.5, "x", True, None, [], [{}], ["dir"], "☃"])


KINDS: list[tuple[tuple[str, ...], Callable[[random.Random, str], Any]]] = [
    (tuple(INTEGERS), wrong_integer),
    (tuple(NUMBERS), wrong_number),
    (CHOICES, wrong_choice),
    (TEXTS, wrong_text),
    (FLAGS, wrong_flag),
    (LISTS, wrong_list),
    (SECTIONS, wrong_section),
]


class Change(NamedTuple):
    """Hold a broken value at a key; `value` DELETED takes the key out."""

    key: str
    value: Any


DELETED = object()


def changes(rng: random.Random) -> Change:
    """Draw a key and a value that it must refuse."""
    keys, wrong = rng.choice(KINDS)
    key = rng.choice(keys)
    return Change(key, wrong(rng, key))


def unknown_key(rng: random.Random) -> Change:
    """Draw a key that does not exist: a misspelling of one that does, or a strange one."""
    path, _, last = rng.choice([*INTEGERS, *NUMBERS, *CHOICES, *FLAGS]).rpartition(".")
    at = rng.randrange(len(last))
    misspelt = [last[:at] + last[at + 1 :], last[:at] + last[at] * 2 + last[at + 1 :],
                last.upper(), last + "s_", "_" + last, last.replace("_", "-") + "-"]  # fmt: skip
    odd = ["", " ", "ключ", "key with spaces", "x" * 300, "a\u200bb", "🦜", "__class__", "0"]
    return Change(f"{path}.{rng.choice(misspelt * 2 + odd)}", rng.choice([1, "x", None, {}, []]))


def missing_key(rng: random.Random) -> Change:
    """Draw a key that cannot be left out."""
    return Change(rng.choice(REQUIRED), DELETED)


def apply(tree: Tree, change: Change) -> Tree:
    """Return a copy of a tree with the change made."""
    tree = json.loads(json.dumps(tree))
    *path, last = change.key.split(".")
    here: Any = tree
    for part in path:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if change.value is DELETED:
        del here[last]
    else:
        here[int(last) if isinstance(here, list) else last] = change.value
    return tree


def contradiction(rng: random.Random, tree: Tree) -> tuple[str, Tree]:
    """Draw keys that are fine alone and cannot stand together, or do not fit the data."""
    wanted = rng.choice(CONTRADICTIONS)
    for key, value in wanted.items():
        tree = apply(tree, Change(key, value))
    kind = "only pretrain" if wanted in TRAINED_ONLY else "contradiction"
    return f"{kind} {wanted}"[:200], tree


def broken_files(rng: random.Random, tree: Tree) -> Iterator[tuple[str, bytes]]:
    """Draw broken run files for ever: (what was done, content).

    Those whose name begins with "only pretrain" are fine for a program that trains nothing.
    """
    while True:
        kind = rng.choices(("value", "unknown", "missing", "contradiction", "text"),
                           (45, 10, 5, 20, 20))[0]  # fmt: skip
        if kind == "text":
            yield broken_text(rng, tree)
            continue
        if kind == "contradiction":
            name, broken = contradiction(rng, tree)
        else:
            draw = {"value": changes, "unknown": unknown_key, "missing": missing_key}[kind]
            change = draw(rng)
            value = "deleted" if change.value is DELETED else change.value
            name = f"{kind} {change.key} = {value!r}"[:200]
            broken = apply(tree, change)
        as_json = rng.random() < 0.3  # flow style, every text in quotes
        text = json.dumps(broken) if as_json else yaml.safe_dump(broken, allow_unicode=True)
        yield name, text.encode()
