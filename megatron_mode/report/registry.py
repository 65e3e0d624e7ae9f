"""List the metrics: the one place where a metric has its unit, its meaning and its chart.

`step_metrics.metrics_line` and `evaluate.valid` make the values, one line a step holds them, and
this list decides the rest: the writer takes no key that is not here, the report draws the curves,
and `make docs` renews the table in docs/look-at-a-model.md. To add a metric, make its value there
and give it an entry here.

Keys that begin with `valid_` come from held-out text and stand only on lines after an evaluation.
A value of a key `..._by_source` is an object with a number a source.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mode.report.svg import Axis, Dash, percent, short_number


@dataclass(frozen=True)
class Chart:
    """Describe a chart over tokens seen."""

    title: str
    y_axis: Axis


@dataclass(frozen=True)
class Metric:
    """Describe a key of metrics.jsonl and its curve; colour 0 is Mode 1 and 1 is Mode 2."""

    key: str
    unit: str
    meaning: str
    chart: Chart | None = None
    label: str = ""
    colour: int = 2
    dash: Dash = "solid"

    @property
    def is_held_out(self) -> bool:
        """Tell whether the value comes from held-out text."""
        return self.key.startswith("valid_")


NATS = "nats/token"
LM_LOSS = Chart("LM loss by mode", Axis(NATS, short_number))
AUROC = Chart("Mode AUROC a token", Axis("AUROC", short_number, high=1))
RECALL = Chart("Mode 2 recall at 1 % false positives", Axis("recall", percent, low=0, high=1))
SHARE = Chart("Mode 2 share", Axis("share of Mode 2", percent, low=0))
MODE_LOSS = Chart("Mode loss", Axis(NATS, short_number, low=0))
SPEED = Chart("Throughput", Axis("tokens per second", short_number, low=0))
GRADIENT = Chart("Gradient norm", Axis("global L2 norm before clipping", short_number, low=0))
LEARNING_RATE = Chart("Learning rate", Axis("learning rate", short_number, low=0))
BLOCKED = Chart("Blocked tokens", Axis("share of valid tokens", percent, low=0))
CHARTS = (LM_LOSS, AUROC, RECALL, SHARE, MODE_LOSS, SPEED, GRADIENT, LEARNING_RATE, BLOCKED)
"""In the order of the report."""

_ENTRIES = (
    Metric("step", "steps", "steps finished"),
    Metric("tokens_seen", "tokens", "tokens of all rows since the start"),
    Metric("loss", NATS, "LM loss plus weighted mode loss, of the global batch"),
    Metric("lm_loss", NATS, "LM loss before blocking, both modes"),
    Metric("lm_loss_mode1", NATS, "LM loss of Mode 1", LM_LOSS, "train, Mode 1", 0),
    Metric("lm_loss_mode2", NATS, "LM loss of Mode 2", LM_LOSS, "train, Mode 2", 1),
    Metric("mode_loss", NATS, "mode loss before blocking", MODE_LOSS, "train"),
    Metric("mode_accuracy", "share", "tokens whose mode is called right at p = 0.5"),
    Metric("mode_auroc", "", "AUROC of the mode logit over tokens", AUROC, "train"),
    Metric("mode_recall_at_fpr01", "share", "Mode 2 found at 1 % false positives", RECALL, "train"),
    Metric("mode_recall_at_fpr05", "share", "the same at 5 %"),
    Metric(
        "mode2_fraction_realised", "share", "rows taken from Mode 2", SHARE, "rows, realised", 1
    ),
    Metric(
        "mode2_token_fraction_realised",
        "share",
        "Mode 2 tokens among the tokens with a loss",
        SHARE,
        "tokens, realised",
        3,
    ),
    Metric(
        "mode2_fraction_planned",
        "share",
        "Mode 2 rows that the schedule plans for the step",
        SHARE,
        "rows, planned",
        2,
        "dashed",
    ),
    Metric("mode2_rows_planned_minus_realised", "rows", "planned minus taken since the start"),
    Metric("mode2_flops_share", "share", "FLOPs spent on Mode 2 rows"),
    Metric("rows_by_source", "rows", "rows taken in the step"),
    Metric("planned_rows_by_source", "rows", "rows that the plan gives each source in the step"),
    Metric("lm_loss_by_source", NATS, "LM loss; null where a source gave no token"),
    Metric("blocked_share", "share", "tokens blocked, of all with a loss", BLOCKED, "blocked", 4),
    Metric("grad_norm", "", "L2, before clipping; null if left out", GRADIENT, "all parameters"),
    Metric("learning_rate", "", "of the step's update", LEARNING_RATE, "AdamW"),
    Metric("tokens_per_second", "tokens/s", "speed of all ranks", SPEED, "all ranks"),
    Metric("step_seconds", "seconds", "duration of the step, the wait for data included"),
    Metric("data_wait_seconds", "seconds", "time in which the loop had no batch"),
    Metric("checkpoint_stall_seconds", "seconds", "time that saving kept the loop from training"),
    Metric("model_flops_per_second", "FLOP/s", "useful FLOPs of all ranks"),
    Metric("mfu", "share", "of the devices' peak; null on an unknown device"),
    Metric("mode_head_flops_share", "share", "FLOPs of the mode head among all"),
    Metric("peak_memory_bytes", "bytes", "of rank 0: GPU memory, else resident memory"),
    Metric("update_left_out", "", "true where the update was not applied; else absent"),
    Metric("valid_lm_loss", NATS, "LM loss, Mode 1 and chat", LM_LOSS, "held out"),
    Metric("valid_lm_loss_mode1", NATS, "LM loss of Mode 1"),
    Metric("valid_lm_loss_mode2", NATS, "LM loss of Mode 2, chat"),
    Metric("valid_lm_loss_by_source", NATS, "LM loss of each held-out source"),
    Metric("valid_mode_loss", NATS, "mode loss, plain", MODE_LOSS, "held out", 3),
    Metric("valid_mode_auroc", "", "AUROC over tokens, plain", AUROC, "held out, plain", 3),
    Metric(
        "valid_mode_auroc_chat", "", "AUROC over tokens, chat", AUROC, "held out, chat", 4, "dashed"
    ),
    Metric(
        "valid_mode_recall_at_fpr01", "share", "Mode 2 found, plain", RECALL, "held out, plain", 3
    ),
    Metric("valid_mode_recall_at_fpr05", "share", "the same at 5 %"),
)
METRICS = {metric.key: metric for metric in _ENTRIES}


def title(key: str) -> str:
    """Return the title of a column of figures: LM loss, nats/token."""
    words = key.replace("_", " ").replace("lm ", "LM ").replace("auroc", "AUROC")
    unit = METRICS[key].unit if key in METRICS else ""
    return words if unit in ("", "share") else f"{words}, {unit}"
