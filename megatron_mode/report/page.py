"""Build report.html: one self-contained file from one or several run folders.

Sections, top to bottom: head figures, curves, held-out figures by source, heat map, provenance.
The page fetches and executes nothing, so you can mail and archive it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from megatron_mode.report.charts import metric_charts, position_chart, source_charts
from megatron_mode.report.heatmap import LEVELS, level_of, printable
from megatron_mode.report.run_folder import RunFolder, number, read_runs
from megatron_mode.report.svg import CURVE_POINTS, percent, short_number
from megatron_mode.report.theme import style_sheet

_COLUMN_TITLES = {
    "mode": "mode",
    "rendering": "rendering",
    "tokens": "tokens",
    "lm_loss": "LM loss, nats/token",
    "lm_loss_mode1": "LM loss of Mode 1",
    "lm_loss_mode2": "LM loss of Mode 2",
    "mode_loss": "mode loss, nats/token",
    "mode_accuracy": "mode accuracy",
    "mode_auroc": "AUROC a token",
    "mode_auroc_documents": "AUROC a document",
    "mode_recall_at_fpr01": "recall at 1 % FP",
    "mode_recall_at_fpr05": "recall at 5 % FP",
}


@dataclass(frozen=True)
class Figure:
    """Hold one head figure, with what to compare it with."""

    label: str
    value: str
    note: str = ""


def build_page(run_dirs: Sequence[Path]) -> str:
    """Return the page for these run folders; raises ConfigError for one that cannot be read."""
    return render_page(read_runs(run_dirs))


def render_page(runs: Sequence[RunFolder]) -> str:
    """Return the page; what a run lacks is left out and named at the end."""
    title = ", ".join(run.name for run in runs)
    charts = metric_charts(runs)
    if by_position := position_chart(runs):
        charts.append(by_position)
    if len(runs) == 1:
        charts += source_charts(runs[0])
    curve_note = f"A curve of more than {CURVE_POINTS} steps shows means of neighbouring steps"
    if len(runs) == 1:
        curve_note += (
            ", the band their range; the number in a legend is the last point; of sources, dots "
            "are what was taken and dotted lines the plan"
        )
    sections = [
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(_extent(runs))}</p>',
        _head(runs),
        f'<h2>Over the run</h2><p class="note">{curve_note}.</p>',
        f'<div class="grid">{"".join(charts)}</div>',
        *(_source_table(run, len(runs) > 1) for run in runs),
        _heat_maps(runs),
        _provenance(runs),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: training report</title><style>{style_sheet()}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def head_figures(run: RunFolder) -> list[Figure]:
    """Return the numbers of the report's first line; a dash where a run has none."""
    entropy, first = run.summary.get("unigram_entropy"), run.summary.get("lm_loss_first")
    documents = run.summary.get("valid_mode_auroc_documents")
    documents_chat = run.summary.get("valid_mode_auroc_documents_chat")
    planned = _mean(run, "mode2_fraction_planned")
    off_plan = run.summary.get("mode2_rows_planned_minus_realised_max_abs")
    share_note = f"planned {_shown(planned, percent)} over the run"
    if number(off_plan) is not None:
        share_note += f"; at most {_shown(off_plan, '{:.3g}'.format)} rows off"
    return [
        Figure(
            "Held-out LM loss, nats/token",
            _shown(run.last("valid_lm_loss"), "{:.3f}".format),
            f"unigram entropy {_shown(entropy, '{:.3f}'.format)}, "
            f"first step {_shown(first, '{:.3f}'.format)}",
        ),
        Figure(
            "Held-out mode AUROC, plain",
            _shown(run.last("valid_mode_auroc"), "{:.4f}".format),
            f"a token, no role markers; {_shown(documents, '{:.4f}'.format)} a document",
        ),
        Figure(
            "Held-out mode AUROC, chat",
            _shown(run.last("valid_mode_auroc_chat"), "{:.4f}".format),
            f"a token, with markers; {_shown(documents_chat, '{:.4f}'.format)} a document",
        ),
        Figure(
            "Mode 2 share of rows",
            _shown(_mean(run, "mode2_fraction_realised"), percent),
            share_note,
        ),
        Figure(
            "Throughput, tokens/s",
            _shown(run.last("tokens_per_second"), "{:,.0f}".format),
            f"{short_number(run.tokens_seen)} tokens in {run.last_step:,} steps",
        ),
    ]


def _shown(value: Any, form: Any) -> str:
    finite = number(value)
    return "–" if finite is None else str(form(finite))


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return _shown(value, "{:,.0f}".format if isinstance(value, int) else "{:.4f}".format)


def _mean(run: RunFolder, key: str) -> float | None:
    points = run.curve(key)
    return sum(value for _, value in points) / len(points) if points else None


def _extent(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        run = runs[0]
        return f"Training report: {run.last_step:,} steps, {short_number(run.tokens_seen)} tokens."
    return f"Training report of {len(runs)} runs."


def _head(runs: Sequence[RunFolder]) -> str:
    """Return tiles for one run, a table with a column a run for several."""
    if len(runs) == 1:
        tiles = "".join(
            f'<div class="card tile"><span>{escape(figure.label)}</span>'
            f"<b>{escape(figure.value)}</b><small>{escape(figure.note)}</small></div>"
            for figure in head_figures(runs[0])
        )
        return f'<div class="tiles">{tiles}</div>'
    columns = [head_figures(run) for run in runs]
    rows = [
        [figures[0].label, *(figure.value for figure in figures)]
        for figures in zip(*columns, strict=True)
    ]
    return "<h2>Figures</h2>" + _table(["", *(run.name for run in runs)], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="card wide"><table><tr>{head}</tr>{body}</table></div>'


def _source_table(run: RunFolder, named: bool) -> str:
    """Return held-out figures by source, without the columns that no source has."""
    by_source: Mapping[str, Mapping[str, Any]] = run.summary.get("valid") or {}
    present = {
        key for values in by_source.values() for key, value in values.items() if value is not None
    }
    if not present:
        return ""
    known = [key for key in _COLUMN_TITLES if key in present]
    keys = known + sorted(present - set(known))
    rows = [
        [source, *(_cell(values.get(key)) for key in keys)] for source, values in by_source.items()
    ]
    title = f"Held out, by source: {run.name}" if named else "Held out, by source"
    titles = ["source", *(_COLUMN_TITLES.get(key, key) for key in keys)]
    return f"<h2>{escape(title)}</h2>{_table(titles, rows)}"


def _heat_maps(runs: Sequence[RunFolder]) -> str:
    shown = [run for run in runs if run.passages]
    if not shown:
        return ""
    cells = "".join(f'<i class="p{level}"></i>' for level in range(LEVELS))
    parts = [
        "<h2>Mode probability over held-out text</h2>",
        f'<div class="scale">Mode 1, p = 0 <div>{cells}</div> Mode 2, p = 1</div>',
        '<p class="note">Control pieces are outlined. Hover over a token for its figure.</p>',
    ]
    for run in shown:
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        parts.append(f'<div class="grid">{"".join(map(_passage, run.passages))}</div>')
    return "".join(parts)


def _passage(passage: Mapping[str, Any]) -> str:
    tokens: Sequence[Mapping[str, Any]] = passage.get("tokens", [])
    content = [number(t.get("probability")) for t in tokens if not t.get("control")]
    known = [probability for probability in content if probability is not None]
    mean = f"mean p {sum(known) / len(known):.3f}, " if known else ""
    source = f"{mean}{len(tokens)} tokens from {passage.get('source', 'an unnamed source')}"
    return (
        f'<article class="card"><h3>{escape(str(passage.get("title", "")))}</h3>'
        f'<div class="note">{escape(source)}</div>'
        f'<div class="text">{"".join(map(_token, tokens))}</div></article>'
    )


def _token(token: Mapping[str, Any]) -> str:
    text, probability = printable(str(token.get("text", ""))), number(token.get("probability"))
    classes, facts = [], [text.replace("\n", "\u21b5")]
    if probability is not None:
        classes.append(f"p{level_of(probability)}")
        facts.append(f"p {probability:.3f}")
    if token.get("role", "none") != "none":
        facts.append(str(token["role"]))
    if token.get("control"):
        classes.append("k")
    if "\n" in text and not text.strip():
        classes.append("n")
    title = escape(" · ".join(facts), quote=True)
    return f'<span class="{" ".join(classes)}" title="{title}">{escape(text)}</span>'


def _provenance(runs: Sequence[RunFolder]) -> str:
    """Name what the figures come from (folder, config, order, machine) and what is missing."""
    items = []
    for run in runs:
        facts = [f"run folder {run.name}"]
        if run.config_digest:
            facts.append(f"config sha256 {run.config_digest[:16]}")
        if order_digest := run.summary.get("order_digest"):
            facts.append(f"order digest {str(order_digest)[:16]}")
        facts += _machine(run.environment)
        items.append("; ".join(facts) + ".")
        items += [f"{run.name}: {note}." for note in run.notes]
    listed = "".join(f'<p class="note">{escape(item)}</p>' for item in items)
    return f"<h2>Where this comes from</h2>{listed}"


def _machine(environment: Mapping[str, Any]) -> list[str]:
    packages = environment.get("packages") or {}
    facts = [f"{name} {packages[name]}" for name in ("torch", "deepspeed") if packages.get(name)]
    if environment.get("gpus"):
        facts.append(", ".join(map(str, environment["gpus"])))
    elif environment.get("cpu_cores"):
        facts.append(f"{environment['cpu_cores']} CPU cores")
    return facts
