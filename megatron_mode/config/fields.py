"""Declare every configuration key: frozen models, one docstring line a field with its unit."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction01 = Annotated[Decimal, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Share the rules of all sections: immutable, no unknown keys, field docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    """Describe the decoder (Llama style: RMSNorm, RoPE, SwiGLU, grouped-query attention)."""

    name: str
    """Name of the preset, shown in logs and reports."""
    layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Hidden size D."""
    ffn_hidden_size: Count
    """Feed-forward size F of the SwiGLU block (its up and gate matrices are each F x D)."""
    attention_heads: Count
    """Query heads H; the head size is D / H."""
    kv_heads: Count
    """Key/value groups G; H must be a multiple of it."""
    seq_len: Count
    """Row length T in tokens."""
    vocab_size: Count | None = None
    """Padded vocabulary V in tokens, a multiple of 128; unset: taken from the prepared data."""
    tied_embeddings: bool = False
    """Share the embedding matrix with the LM head."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies (RoFormer, section 3.4.3)."""
    norm_epsilon: Positive = 1e-5
    """Epsilon inside RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights; residual outputs get init_std / sqrt(2 * layers)."""


class DataConfig(Section):
    """Say where prepared sources and their tokenizer lie."""

    root: str = "data/tiny"
    """Folder written by `megatron-mode prepare`."""


class SourceConfig(Section):
    """Name one prepared source and its share inside its mode."""

    name: str
    """Name of the source: the files are data.root/NAME.bin, .idx, .flags.bin, .json."""
    weight: Annotated[Decimal, Field(gt=0)] = Decimal(1)
    """Share relative to the other sources of the same mode; exact decimal."""
    epochs_max: Annotated[Decimal, Field(gt=0)] | None = None
    """Most passes over the source before it runs dry; unset: no limit."""
    mode: Literal[1, 2] | None = None
    """Mode of a source without flags in mix.valid; elsewhere the list it stands in decides."""


class SourcesConfig(Section):
    """List the sources of one mode, in the order in which they are apportioned."""

    sources: tuple[SourceConfig, ...] = ()
    """Sources; the order is part of the run's order."""


class Mode2FractionConfig(Section):
    """Schedule the share of Mode 2 rows by tokens seen."""

    shape: Literal["constant", "linear", "cosine", "step", "piecewise"] = "constant"
    """constant holds start; linear and cosine go from start to end between begin_tokens and
    end_tokens; step jumps from start to end at begin_tokens; piecewise joins points by lines."""
    start: Fraction01 = Decimal("0.5")
    """Fraction before begin_tokens, 0 to 1; exact decimal."""
    end: Fraction01 | None = None
    """Fraction after end_tokens (after begin_tokens for step), 0 to 1; exact decimal."""
    begin_tokens: CountOrZero = 0
    """Tokens seen at which the change begins."""
    end_tokens: CountOrZero | None = None
    """Tokens seen at which the change ends; unset: the end of the run."""
    points: tuple[tuple[CountOrZero, Fraction01], ...] = ()
    """Table of (tokens seen, fraction) for piecewise; flat outside."""


class MixConfig(Section):
    """Say which rows are taken, in which share, and how they become loss."""

    mode1: SourcesConfig = SourcesConfig()
    """Sources of text to continue."""
    mode2: SourcesConfig = SourcesConfig()
    """Sources of instructions, assistants and agents."""
    valid: SourcesConfig = SourcesConfig()
    """Held-out sources of either mode; never trained on."""
    mode2_fraction: Mode2FractionConfig = Mode2FractionConfig()
    """Share of Mode 2 rows over the run."""
    reset_at_documents: bool = True
    """Restart positions and attention at each document start."""
    mode2_lm_loss: Literal["all", "assistant"] = "all"
    """Mode 2 tokens with LM loss: all but padding, or only those of assistant turns."""


class BlockingConfig(Section):
    """Take confidently wrong tokens out of a loss."""

    policy: Literal["none", "mode", "lm", "both"] = "none"
    """Which loss loses the token."""
    direction: Literal["mode1_as_mode2", "mode2_as_mode1", "both"] = "mode1_as_mode2"
    """Which mistake blocks: a Mode 1 token called Mode 2, the reverse, or either."""
    tau: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Probability of the wrong mode above which a token is blocked."""
    warmup_tokens: CountOrZero = 0
    """Tokens seen before blocking begins."""
    cap: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Largest blocked share of a row's valid tokens, the largest excess first."""
    renormalise: bool = False
    """Divide by the unblocked share of the step before instead of the full denominator."""


class LossConfig(Section):
    """Weigh the LM loss, the mode loss and their refinements."""

    implementation: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """auto: triton on a GPU where it is installed, else chunked; reference is the plain oracle."""
    keep_logits_bytes: CountOrZero = 0
    """Largest logits that triton keeps, rounded to the precision of the run, instead of computing
    them again in the backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which the gradient of the hidden states is summed over tensor ranks."""
    check_targets: bool = False
    """Check the range of targets on a GPU too, on the device; a CPU always does."""
    mode_weight: NonNegative = 0.1
    """Lambda, the weight of the mean mode loss beside the mean LM loss."""
    z_weight: NonNegative = 0.0
    """Weight of the squared log-partition of the LM logits (PaLM, section 5)."""
    blocking: BlockingConfig = BlockingConfig()
    """Blocking of confidently wrong tokens."""


class ParallelConfig(Section):
    """Split the model over ranks; the data-parallel size is the world size over the rest."""

    tensor: Count = 1
    """Tensor-parallel ranks (megatron-core)."""
    pipeline: Count = 1
    """Pipeline stages (DeepSpeed)."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full recomputes each decoder layer in the backward pass."""
    zero_stage: Literal[0, 1] = 1
    """1 shards the optimizer state over the data-parallel ranks (ZeRO-1)."""


class BatchConfig(Section):
    """Size the batch; accumulation is global_rows / (micro_rows * data)."""

    global_rows: Count = 8
    """Rows in one optimizer step over all ranks."""
    micro_rows: Count = 1
    """Rows in one forward pass of one data-parallel rank."""


class OptimizerConfig(Section):
    """Set AdamW (Loshchilov and Hutter, 2019) and its learning-rate schedule."""

    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    min_learning_rate: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after warm-up; wsd holds the peak, then decays linearly over decay_steps."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up from zero."""
    decay_steps: CountOrZero = 0
    """Last steps of the run over which wsd decays."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Positive = 1e-8
    """Term added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, biases and the mode head's bias have none."""
    clip_grad_norm: NonNegative = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""


class CheckpointConfig(Section):
    """Say when checkpoints are written and how many stay."""

    every_steps: CountOrZero = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Count = 2
    """Newest checkpoints kept."""


class RunConfig(Section):
    """Name the run, its length, its seed and its reports."""

    dir: str = "runs/tiny"
    """Run folder: config, metrics, checkpoints, report."""
    steps: Count = 100
    """Optimizer steps."""
    seed: CountOrZero = 1234
    """Seed of weights and order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 gradient accumulation on GPUs, fp32 on CPU."""
    eval_every_steps: CountOrZero = 100
    """Steps between evaluations on mix.valid; 0 evaluates only at the end."""
    eval_rows: Count = 64
    """Rows read from each held-out source in one evaluation."""
    threads: CountOrZero = 0
    """CPU threads a process uses; 0 shares the machine's cores among its ranks."""


class Config(Section):
    """Hold a whole run; the resolved form is written to RUN/config.yaml."""

    run: RunConfig
    """The run."""
    model: ModelConfig
    """The model."""
    data: DataConfig = DataConfig()
    """The prepared data."""
    mix: MixConfig
    """The mix of data."""
    loss: LossConfig = LossConfig()
    """The loss."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    batch: BatchConfig = BatchConfig()
    """The batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """The checkpoints."""
