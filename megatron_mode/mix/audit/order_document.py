"""Write an order as one portable JSON document, and build the order again from it alone.

The document holds what the formula needs: seed, sizes, the mix, the rows of each source and the
documents that edits name, by number. It names no path of any machine; the digests of the sources
say which data it speaks of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mode.config import Config
from megatron_mode.config.mix import MixConfig
from megatron_mode.errors import DataError
from megatron_mode.mix.corpus import Corpus, order_settings, packed_sources
from megatron_mode.mix.digest import OrderDigest
from megatron_mode.mix.edits.overrides import ChangedDocument, EditStream, plan_edits
from megatron_mode.mix.order import Order
from megatron_mode.mix.schedule import Integral

FORMAT = 1
FORMULA = (
    "row i of the run is Mode 2 iff floor(F(i+1)) > floor(F(i)), F the integral of "
    "mix.mode2_fraction over rows; inside a mode each source takes floor(planned) of the rows that "
    "those before it leave; row j of a source is P(j mod R) of epoch j div R, P a Feistel "
    "permutation keyed by (seed, source, epoch); edits take places of their mode; digest d_s = "
    "SHA-256(d_(s-1) || int64 LE (row, source, source row, mode) of step s, then (row, source, "
    "document, -1 dropped or -2 replaced) of changed documents read in it, then (row, source, "
    "source row, -3) of its rows if a health policy left its update out), d_(-1) 32 zero bytes"
)
# Hashing more than this takes longer than a minute.
DIGESTED_ROWS = 20_000_000


@dataclass(frozen=True)
class OrderDocument:
    """Hold an order with what its questions are asked in.

    `settings` is `corpus.order_settings`, `sources` one description each.
    """

    order: Order
    global_rows: int
    steps: int
    settings: dict[str, Any]
    sources: list[dict[str, Any]]

    @property
    def packed_whole(self) -> set[str]:
        """Name the sources that are read by their row tables."""
        mixed = {str(s["name"]) for s in self.sources if s["packing"] == "whole"}
        return mixed | {s.name for s in self.order.edits.streams if s.packing == "whole"}


def describe(config: Config, corpus: Corpus, order: Order) -> OrderDocument:
    """Collect the document of an opened run."""
    sources = [
        {
            "name": entry.source.name,
            "mode": entry.source.mode,
            "packing": entry.packing,
            "rows": entry.rows,
            "tokens": entry.source.tokens,
            "documents": entry.source.documents,
            "padding_share": entry.padding_share,
            "files": dict(sorted(entry.source.content_digests.items())),
        }
        for entry in packed_sources(config, corpus)[: len(order.configs)]
    ]
    settings = order_settings(config, corpus, order)
    return OrderDocument(order, config.batch.global_rows, config.run.steps, settings, sources)


def export(document: OrderDocument, mix: MixConfig) -> dict[str, Any]:
    """Return the document as JSON."""
    order, global_rows, steps = document.order, document.global_rows, document.steps
    digest = OrderDigest()
    is_short = order.total_rows <= DIGESTED_ROWS
    for rows in order.steps(0, steps if is_short else 0, global_rows):
        digest.update(rows, order.edits)
    return {
        "format": FORMAT,
        "formula": FORMULA,
        "seed": order.seed,
        "seq_len": order.seq_len,
        "global_rows": global_rows,
        "steps": steps,
        "mix": mix.model_dump(mode="json"),
        "sources": document.sources,
        "edit_streams": [stream._asdict() for stream in order.edits.streams],
        "injected": dict(order.edits.documents),
        "changed": [change._asdict() for change in order.edits.changed],
        "settings": document.settings,
        "order_digest": digest.hex if is_short else None,
    }


def read_document(path: Path) -> OrderDocument:
    """Build the order that an exported file describes; DataError where it is none of ours."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise KeyError(f"format {fields['format']}")
        return _rebuild(fields)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); name a run file, a run folder or an "
            "exported order"
        ) from None
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(
            f"{path} is not an order that `megatron-mode order --export` wrote with format "
            f"{FORMAT} ({str(error).splitlines()[0]}); export it again"
        ) from None


def _rebuild(fields: Mapping[str, Any]) -> OrderDocument:
    mix = MixConfig.model_validate(fields["mix"])
    seed, seq_len = int(fields["seed"]), int(fields["seq_len"])
    global_rows, steps = int(fields["global_rows"]), int(fields["steps"])
    if min(seq_len, global_rows, steps) < 1 or seed < 0:
        raise ValueError("seed, seq_len, global_rows and steps are not integers, the last above 0")
    edits = plan_edits(
        mix,
        Integral(mix.mode2_fraction, seq_len, steps * global_rows),
        [EditStream(**stream) for stream in fields["edit_streams"]],
        fields["injected"],
        [ChangedDocument(**{**c, "rows": tuple(c["rows"])}) for c in fields["changed"]],
        global_rows=global_rows,
        seed=seed,
    )
    rows = {source["name"]: int(source["rows"]) for source in fields["sources"]}
    for source in fields["sources"]:
        source["padding_share"] = float(source["padding_share"])
    order = Order(mix, seq_len, steps * global_rows, seed, rows, edits=edits)
    return OrderDocument(order, global_rows, steps, fields["settings"], fields["sources"])
