"""Build report.html: one self-contained file from one or several run folders.

Sections, top to bottom: head figures, curves, held-out figures by source, heat map, provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_mode.report.charts import charts
from megatron_mode.report.heatmap import level_of, printable
from megatron_mode.report.registry import title
from megatron_mode.report.render import render
from megatron_mode.report.run_folder import RunFolder, number
from megatron_mode.report.svg import CURVE_POINTS, percent, short_number


class HeadFigure(NamedTuple):
    """Hold one head figure, with what to compare it with."""

    label: str
    value: str
    note: str


def build_page(runs: Sequence[RunFolder]) -> str:
    """Return the page; what a run lacks is left out and named at the end."""
    return render(
        "page.html",
        title=", ".join(run.name for run in runs),
        runs=runs,
        tokens=short_number(runs[0].tokens_seen),
        head=[head_figures(run) for run in runs],
        charts=charts(runs),
        curve_points=CURVE_POINTS,
        source_table=_source_table,
        describe=_describe,
        token=_token,
        origin=_origin,
    )


def head_figures(run: RunFolder) -> list[HeadFigure]:
    """Return the numbers of the report's first line; a dash where a run has none."""

    def last(key: str, form: str) -> str:
        return _shown(run.last(key), form)

    planned, realised = (_mean(run, f"mode2_fraction_{kind}") for kind in ("planned", "realised"))
    share_note = f"planned {_shown(planned, percent)} over the run"
    off_plan = number(run.summary.get("mode2_rows_planned_minus_realised_max_abs"))
    if off_plan is not None:
        share_note += f"; at most {off_plan:.3g} rows off"
    return [
        HeadFigure(
            "Held-out LM loss, nats/token",
            last("valid_lm_loss", ".3f"),
            f"unigram entropy {last('unigram_entropy', '.3f')}, "
            f"first step {last('lm_loss_first', '.3f')}",
        ),
        HeadFigure(
            "Held-out mode AUROC, plain",
            last("valid_mode_auroc", ".4f"),
            f"a token, no role markers; {last('valid_mode_auroc_documents', '.4f')} a document",
        ),
        HeadFigure(
            "Held-out mode AUROC, chat",
            last("valid_mode_auroc_chat", ".4f"),
            f"a token, with markers; {last('valid_mode_auroc_documents_chat', '.4f')} a document",
        ),
        HeadFigure("Mode 2 share of rows", _shown(realised, percent), share_note),
        HeadFigure(
            "Throughput, tokens/s",
            last("tokens_per_second", ",.0f"),
            f"{short_number(run.tokens_seen)} tokens in {run.last_step:,} steps",
        ),
    ]


def _shown(value: object, form: str | Callable[[float], str]) -> str:
    """Write a number by a format or a function; a dash stands for what is none."""
    finite = number(value)
    if finite is None:
        return "–"
    return format(finite, form) if isinstance(form, str) else form(finite)


def _mean(run: RunFolder, key: str) -> float | None:
    points = run.curve(key)
    return sum(value for _, value in points) / len(points) if points else None


def _source_table(run: RunFolder) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the held-out figures, without the columns that no source has."""
    by_source: Mapping[str, Mapping[str, Any]] = run.summary.get("valid") or {}
    keys = dict.fromkeys(  # in the order in which the evaluation wrote them
        key for values in by_source.values() for key in values if values[key] is not None
    )
    rows = [
        [source, *(_cell(values.get(key)) for key in keys)] for source, values in by_source.items()
    ]
    return ["source", *map(title, keys)], rows


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    return _shown(value, ",.0f" if isinstance(value, int) else ".4f")


def _describe(passage: Mapping[str, Any]) -> str:
    tokens: Sequence[Mapping[str, Any]] = passage["tokens"]
    content = [number(t.get("probability")) for t in tokens if not t.get("control")]
    known = [probability for probability in content if probability is not None]
    mean = f"mean p {sum(known) / len(known):.3f}, " if known else ""
    return f"{mean}{len(tokens)} tokens from {passage.get('source', 'an unnamed source')}"


def _token(token: Mapping[str, Any]) -> dict[str, str]:
    """Return the CSS classes of a token in the heat map, what hovering shows, and its text."""
    text, probability = printable(str(token.get("text", ""))), number(token.get("probability"))
    classes, facts = [], [text.replace("\n", "\u21b5")]
    if probability is not None:
        classes.append(f"p{level_of(probability)}")
        facts.append(f"p {probability:.3f}")
    if token.get("control"):
        classes.append("k")
    if "\n" in text and not text.strip():
        classes.append("n")
    return {"classes": " ".join(classes), "title": " · ".join(facts), "text": text}


def _origin(run: RunFolder) -> str:
    """Name what the figures come from: folder, config, machine."""
    facts = [f"run folder {run.name}"]
    if run.config_digest:
        facts.append(f"config sha256 {run.config_digest[:16]}")
    packages = run.environment.get("packages") or {}
    facts += [f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name)]
    if gpus := run.environment.get("gpus"):
        facts.append(", ".join(map(str, gpus)))
    elif cpu_cores := run.environment.get("cpu_cores"):
        facts.append(f"{cpu_cores} CPU cores")
    return "; ".join(facts)
