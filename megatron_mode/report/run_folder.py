"""Read a run folder for the report: metrics by column, summary, heat map, digests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_mode.errors import ConfigError
from megatron_mode.report.svg import Point
from megatron_mode.report.writers import ENVIRONMENT_FILE, METRICS_FILE, SUMMARY_FILE


# The shapes of what the report reads, down to its figures.
class _Summary(BaseModel, extra="allow"):
    valid: dict[str, dict[str, Any]] | None = None
    auroc_by_position: dict[str, dict[float, Any]] | None = None


class _Passage(BaseModel, extra="allow"):
    tokens: list[dict[str, Any]]


class _HeatMap(BaseModel, extra="allow"):
    passages: list[_Passage] = []


class _Environment(BaseModel, extra="allow"):
    packages: dict[str, Any] | None = None
    gpus: list[Any] | None = None


@dataclass(frozen=True)
class RunFolder:
    """Hold what the report shows of one run; `notes` name what is missing and what that costs."""

    name: str
    columns: Mapping[str, list[Point]]
    last_step: int
    tokens_seen: int
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    passages: list[Mapping[str, Any]]
    config_digest: str | None
    notes: list[str]

    def curve(self, key: str) -> list[Point]:
        """Return (tokens seen, value) of each line that has a number under `key`."""
        return self.columns.get(key, [])

    def last(self, key: str) -> float | None:
        """Return the summary's value of `key`, else the newest in metrics.jsonl, else None."""
        value = number(self.summary.get(key))
        points = self.curve(key)
        return points[-1][1] if value is None and points else value


def number(value: object) -> float | None:
    """Return a finite number as float, and None for anything else JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any length
        return None


def read_runs(run_dirs: Sequence[Path]) -> list[RunFolder]:
    """Read runs, each named by as few trailing parts of its path as no other run has.

    Raises ConfigError for a folder without metrics.
    """
    paths = {run_dir: run_dir.resolve().parts for run_dir in run_dirs}

    def name(path: tuple[str, ...]) -> str:
        tails = (path[-count:] for count in range(1, len(path) + 1))
        others = set(paths.values()) - {path}
        return str(Path(*next(t for t in tails if all(o[-len(t) :] != t for o in others))))

    return [read_run(run_dir, name(paths[run_dir])) for run_dir in run_dirs]


def read_run(run_dir: Path, name: str) -> RunFolder:
    """Read one run under a name, also one that still trains or has no held-out data.

    Raises ConfigError if there is no such folder or it has no line of metrics.
    """
    path = run_dir / METRICS_FILE
    if not run_dir.is_dir():
        fault = "is not a folder; give the folder a run wrote (its run.dir)"
    elif not path.is_file():
        fault = f"has no {METRICS_FILE}; give a run folder whose training began"
    else:
        columns, last_step, tokens_seen = _read_metrics(path)
        fault = "" if columns else f"has no step in {METRICS_FILE}; train it first"
    if fault:
        raise ConfigError(f"RUN {str(run_dir)!r} {fault}.")
    notes: list[str] = []

    def read(name: str, shape: type[BaseModel], consequence: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((run_dir / name).read_bytes())
            shape.model_validate(value)
            return value
        except FileNotFoundError:
            notes.append(f"no {name}: {consequence}")
        except (OSError, ValueError, RecursionError):  # pydantic's error is a ValueError
            notes.append(f"{name} cannot be read: {consequence}")
        return {}

    summary = read(SUMMARY_FILE, _Summary, "the final figures are left out")
    heatmap = read("heatmap.json", _HeatMap, "the heat map is left out")
    environment = read(ENVIRONMENT_FILE, _Environment, "the machine is not named")
    _add_final_evaluation(columns, summary, tokens_seen, notes)
    config = run_dir / "config.yaml"
    return RunFolder(
        name=name,
        columns=columns,
        last_step=last_step,
        tokens_seen=tokens_seen,
        summary=summary,
        environment=environment,
        passages=heatmap.get("passages", []),
        config_digest=hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        notes=notes,
    )


def _read_metrics(path: Path) -> tuple[dict[str, list[Point]], int, int]:
    """Return the columns, the last step and its tokens; a torn last line is passed over."""
    columns: dict[str, list[Point]] = {}
    last_step, tokens_seen = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                float(row["tokens_seen"])  # integers beyond a float's range are no tokens
                last_step, tokens_seen = int(row["step"]), int(row["tokens_seen"])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            for key, value in _numbers(row):
                columns.setdefault(key, []).append((tokens_seen, value))
    return columns, last_step, tokens_seen


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a line; those by source under `key/source`."""
    for key, value in row.items():
        nested = value if isinstance(value, dict) else {}
        values = {f"{key}/{name}": inner for name, inner in nested.items()} or {key: value}
        for name, inner in values.items():
            if (finite := number(inner)) is not None:
                yield name, finite


def _add_final_evaluation(
    columns: dict[str, list[Point]], summary: Mapping[str, Any], tokens_seen: int, notes: list[str]
) -> None:
    """Let held-out curves end in the last evaluation, which only summary.json holds."""
    end = number(summary.get("tokens_seen")) or float(tokens_seen)
    if end < tokens_seen:
        notes.append(f"{SUMMARY_FILE} was written at {end:,.0f} tokens, before the run continued")
    for key, value in _numbers(summary):
        if key.startswith("valid_"):
            points = columns.setdefault(key, [])
            if not points or points[-1][0] < end:
                points.append((end, value))
