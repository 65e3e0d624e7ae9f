"""List the metrics: the one place where a metric has its unit, its meaning and its chart.

`step_metrics.metrics_line` and `evaluate.valid` make the values, one line a step holds them, and
this list decides the rest: the writer takes no key that is not here, the report draws the curves.
To add a metric, make its value there and give it an entry here.

Keys that begin with `valid_` come from held-out text and stand only on lines after an evaluation.
A value of a key `..._by_source` is an object with a number a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mode.report.svg import Axis, Dash, percent, short_number

ChartName = Literal[
    "LM loss by mode",
    "Mode AUROC a token",
    "Mode 2 recall at 1 % false positives",
    "Mode 2 share",
    "Mode loss",
    "Throughput",
    "Gradient norm",
    "Learning rate",
    "Blocked tokens",
]

Y_AXES: dict[ChartName, Axis] = {
    "LM loss by mode": Axis("nats per token", short_number),
    "Mode AUROC a token": Axis("AUROC", short_number, high=1),
    "Mode 2 recall at 1 % false positives": Axis("recall", percent, low=0, high=1),
    "Mode 2 share": Axis("share of Mode 2", percent, low=0),
    "Mode loss": Axis("nats per token", short_number, low=0),
    "Throughput": Axis("tokens per second", short_number, low=0),
    "Gradient norm": Axis("global L2 norm before clipping", short_number, low=0),
    "Learning rate": Axis("learning rate", short_number, low=0),
    "Blocked tokens": Axis("share of valid tokens", percent, low=0),
}
"""The charts over tokens seen, in the order of the report."""


@dataclass(frozen=True)
class Curve:
    """Draw a metric in a chart; colour 0 is Mode 1 and 1 is Mode 2, as in the heat map."""

    chart: ChartName
    label: str
    colour: int = 2
    dash: Dash = "solid"


@dataclass(frozen=True)
class Metric:
    """Describe one key of metrics.jsonl."""

    key: str
    unit: str
    meaning: str
    curve: Curve | None = None

    @property
    def is_held_out(self) -> bool:
        """Tell whether the value comes from held-out text."""
        return self.key.startswith("valid_")


_LM: ChartName = "LM loss by mode"
_AUROC: ChartName = "Mode AUROC a token"
_RECALL: ChartName = "Mode 2 recall at 1 % false positives"
_SHARE: ChartName = "Mode 2 share"

_ENTRIES = (
    Metric("step", "steps", "steps finished"),
    Metric("tokens_seen", "tokens", "tokens of all rows since the start"),
    Metric("loss", "nats per token", "LM loss plus weighted mode loss, of the global batch"),
    Metric("lm_loss", "nats per token", "LM loss before blocking, both modes"),
    Metric("lm_loss_mode1", "nats per token", "LM loss of Mode 1", Curve(_LM, "train, Mode 1", 0)),
    Metric("lm_loss_mode2", "nats per token", "LM loss of Mode 2", Curve(_LM, "train, Mode 2", 1)),
    Metric("mode_loss", "nats per token", "mode loss before blocking", Curve("Mode loss", "train")),
    Metric("mode_accuracy", "share", "tokens whose mode is called right at p = 0.5"),
    Metric("mode_auroc", "", "AUROC of the mode logit over tokens", Curve(_AUROC, "train")),
    Metric(
        "mode_recall_at_fpr01",
        "share",
        "Mode 2 tokens found when 1 % of Mode 1 tokens are called Mode 2",
        Curve(_RECALL, "train"),
    ),
    Metric("mode_recall_at_fpr05", "share", "the same at 5 %"),
    Metric(
        "mode2_fraction_realised",
        "share",
        "Mode 2 rows among the rows of the step",
        Curve(_SHARE, "rows, realised", 1),
    ),
    Metric(
        "mode2_token_fraction_realised",
        "share",
        "Mode 2 tokens among the tokens with a loss",
        Curve(_SHARE, "tokens, realised", 3),
    ),
    Metric(
        "mode2_fraction_planned",
        "share",
        "Mode 2 rows that the schedule plans for the step",
        Curve(_SHARE, "rows, planned", 2, "dashed"),
    ),
    Metric("mode2_rows_planned_minus_realised", "rows", "planned minus taken since the start"),
    Metric("mode2_flops_share", "share", "FLOPs spent on Mode 2 rows"),
    Metric("rows_by_source", "rows", "rows taken in the step"),
    Metric("planned_rows_by_source", "rows", "rows that the plan gives each source in the step"),
    Metric("lm_loss_by_source", "nats per token", "LM loss; null where a source gave no token"),
    Metric(
        "blocked_share",
        "share",
        "tokens that blocking took among those with a loss",
        Curve("Blocked tokens", "blocked", 4),
    ),
    Metric(
        "grad_norm",
        "",
        "L2 norm of the gradient before clipping; null where the update was left out",
        Curve("Gradient norm", "all parameters"),
    ),
    Metric("learning_rate", "", "of the step's update", Curve("Learning rate", "AdamW")),
    Metric("tokens_per_second", "tokens/s", "speed of all ranks", Curve("Throughput", "all ranks")),
    Metric("step_seconds", "seconds", "duration of the step, the wait for data included"),
    Metric("data_wait_seconds", "seconds", "time in which the loop had no batch"),
    Metric("checkpoint_stall_seconds", "seconds", "time that saving kept the loop from training"),
    Metric("model_flops_per_second", "FLOP/s", "useful FLOPs of all ranks"),
    Metric("mfu", "share", "of the devices' peak; null on an unknown device"),
    Metric("mode_head_flops_share", "share", "FLOPs of the mode head among all"),
    Metric("peak_memory_bytes", "bytes", "of rank 0: GPU memory, else resident memory"),
    Metric("update_left_out", "", "true where the update was not applied; else absent"),
    Metric("valid_lm_loss", "nats per token", "LM loss, Mode 1 and chat", Curve(_LM, "held out")),
    Metric("valid_lm_loss_mode1", "nats per token", "LM loss of Mode 1"),
    Metric("valid_lm_loss_mode2", "nats per token", "LM loss of Mode 2, chat"),
    Metric("valid_lm_loss_by_source", "nats per token", "LM loss of each held-out source"),
    Metric(
        "valid_mode_loss", "nats per token", "mode loss, plain", Curve("Mode loss", "held out", 3)
    ),
    Metric("valid_mode_auroc", "", "AUROC over tokens, plain", Curve(_AUROC, "held out, plain", 3)),
    Metric(
        "valid_mode_auroc_chat",
        "",
        "AUROC over tokens, chat",
        Curve(_AUROC, "held out, chat", 4, "dashed"),
    ),
    Metric(
        "valid_mode_recall_at_fpr01",
        "share",
        "recall at 1 % false positives, plain",
        Curve(_RECALL, "held out, plain", 3),
    ),
    Metric("valid_mode_recall_at_fpr05", "share", "the same at 5 %"),
)
METRICS = {metric.key: metric for metric in _ENTRIES}
