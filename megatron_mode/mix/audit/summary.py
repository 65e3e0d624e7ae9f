"""Sum a run up by source, with everything that will happen to one: `megatron-mode order CONFIG`."""

from __future__ import annotations

from typing import Any

from megatron_mode.mix.audit.forecast import forecast, milestones, warnings
from megatron_mode.mix.audit.order_document import OrderDocument


def plan(document: OrderDocument) -> dict[str, Any]:
    """Return the plan as JSON: rows, tokens and epochs by source, events and notes."""
    order = document.order
    total = max(order.total_rows, 1)
    sources = [
        {
            **found._asdict(),
            "tokens": found.rows * order.seq_len,
            "share": round(found.rows / total, 6),
            "padding_share": described.get("padding_share", 0.0),
        }
        for found, described in zip(forecast(order), document.sources, strict=True)
    ]
    return {
        "rows": order.total_rows,
        "steps": document.steps,
        "seq_len": order.seq_len,
        "tokens": order.total_rows * order.seq_len,
        "mode2_rows": order.integral.mode_rows(2, order.total_rows),
        "sources": sources,
        "events": [
            {"source": order.source_names[m.source], "row": m.row, "what": m.what}
            for m in milestones(order)
        ],
        "notes": warnings(order),
    }


def table(plan: dict[str, Any]) -> str:
    """Lay a plan out for a terminal."""
    rows = max(plan["rows"], 1)
    lines = [
        f"{plan['steps']:,} steps of {plan['rows'] // max(plan['steps'], 1):,} rows of "
        f"{plan['seq_len']:,} tokens, Mode 2 share {plan['mode2_rows'] / rows:.4f}",
        f"{'source':<24} mode {'share':>7} {'rows':>14} {'tokens':>16} {'it has':>9} {'epochs':>7} "
        f"{'padding':>7}",
    ]
    lines += [
        f"{s['name'][:24]:<24} {s['mode']:>4} {s['share']:>7.4f} {s['rows']:>14,} "
        f"{s['tokens']:>16,} {s['rows_available']:>9,} {s['epochs']:>7.3f} "
        f"{s['padding_share']:>7.2%}"
        for s in plan["sources"]
    ]
    return "\n".join(lines + [f"note: {note}" for note in plan["notes"]])
