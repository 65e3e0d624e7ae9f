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

HEATMAP_FILE = "heatmap.json"
CONFIG_FILE = "config.yaml"


class Summary(BaseModel, extra="allow"):
    """State the shape of what the report reads in summary.json, down to its figures."""

    valid: dict[str, dict[str, Any]] | None = None
    auroc_by_position: dict[str, dict[float, Any]] | None = None


class Passage(BaseModel, extra="allow"):
    """State the shape of a passage in heatmap.json."""

    tokens: list[dict[str, Any]]


class HeatMap(BaseModel, extra="allow"):
    """State the shape of heatmap.json."""

    passages: list[Passage] = []


class Environment(BaseModel, extra="allow"):
    """State the shape of what the report reads in environment.json."""

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


def distinct_names(run_dirs: Sequence[Path]) -> list[str]:
    """Name each folder by as few trailing parts of its path as tell it from the others."""
    paths = [run_dir.resolve().parts for run_dir in run_dirs]

    def name(path: tuple[str, ...]) -> str:
        tails = (path[-count:] for count in range(1, len(path) + 1))
        others = set(paths) - {path}
        return str(Path(*next(t for t in tails if all(o[-len(t) :] != t for o in others))))

    return [name(path) for path in paths]


def read_runs(run_dirs: Sequence[Path]) -> list[RunFolder]:
    """Read runs; raises ConfigError for a folder without metrics."""
    return [read_run(*pair) for pair in zip(run_dirs, distinct_names(run_dirs), strict=True)]


def read_run(run_dir: Path, name: str) -> RunFolder:
    """Read one run under a name, also one that still trains or has no held-out data.

    Raises ConfigError where there is no such folder or it has no line of metrics.
    """
    if not run_dir.is_dir():
        raise ConfigError(
            f"RUN {str(run_dir)!r} is not a folder; give the folder a run wrote (its run.dir)."
        )
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ConfigError(
            f"RUN {str(run_dir)!r} has no {METRICS_FILE}; give a run folder whose training began."
        )
    columns, last_step, tokens_seen = _read_metrics(path)
    if not columns:
        raise ConfigError(f"RUN {str(run_dir)!r} has no step in {METRICS_FILE}; train it first.")
    notes: list[str] = []
    summary = _read_object(run_dir / SUMMARY_FILE, Summary, "the final figures are left out", notes)
    heatmap = _read_object(run_dir / HEATMAP_FILE, HeatMap, "the heat map is left out", notes)
    environment = _read_object(
        run_dir / ENVIRONMENT_FILE, Environment, "the machine is not named", notes
    )
    _add_final_evaluation(columns, summary, tokens_seen, notes)
    config = run_dir / CONFIG_FILE
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    return RunFolder(
        name=name,
        columns=columns,
        last_step=last_step,
        tokens_seen=tokens_seen,
        summary=summary,
        environment=environment,
        passages=heatmap.get("passages", []),
        config_digest=digest,
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
            for key, value in _flat(row):
                if (finite := number(value)) is not None:
                    columns.setdefault(key, []).append((tokens_seen, finite))
    return columns, last_step, tokens_seen


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a line; those by source under `key/source`."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _add_final_evaluation(
    columns: dict[str, list[Point]], summary: Mapping[str, Any], tokens_seen: int, notes: list[str]
) -> None:
    """Let held-out curves end in the last evaluation, which only summary.json holds."""
    end = number(summary.get("tokens_seen")) or float(tokens_seen)
    if end < tokens_seen:
        notes.append(f"{SUMMARY_FILE} was written at {end:,.0f} tokens and the run has gone on")
    for key, value in _flat(summary):
        finite = number(value)
        if key.startswith("valid_") and finite is not None:
            points = columns.setdefault(key, [])
            if not points or points[-1][0] < end:
                points.append((end, finite))


def _read_object(
    path: Path, shape: type[BaseModel], consequence: str, notes: list[str]
) -> dict[str, Any]:
    """Return a JSON object of a shape, or {} and a note where the file is missing or damaged."""
    if not path.is_file():
        notes.append(f"no {path.name}: {consequence}")
        return {}
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
        shape.model_validate(value)
        return value
    except (ValueError, RecursionError):  # pydantic's error is a ValueError
        pass
    notes.append(f"{path.name} cannot be read: {consequence}")
    return {}
