"""Declare every configuration key: frozen models, one docstring line a field with its unit."""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_mode.config.mix import MixConfig
from megatron_mode.config.section import (
    LARGEST_SEED,
    LARGEST_THREADS,
    CheckpointName,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    Section,
    Size,
)

FolderPath = Annotated[str, AfterValidator(expanduser)]


class ModelConfig(Section):
    """Describe the decoder (Llama style: RMSNorm, RoPE, SwiGLU, grouped-query attention)."""

    name: str
    """Name of the preset, shown in logs and reports."""
    layers: Annotated[int, Field(ge=1, le=10_000)]
    """Decoder layers."""
    hidden_size: Size
    """Hidden size D."""
    ffn_hidden_size: Size
    """Feed-forward size F of the SwiGLU block (its up and gate matrices are each F x D)."""
    attention_heads: Size
    """Query heads H; the head size is D / H."""
    kv_heads: Size
    """Key/value groups G; H must be a multiple of it."""
    seq_len: Size
    """Row length T in tokens."""
    vocab_size: Size | None = None
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
    """Say where prepared sources and their tokenizer are."""

    root: FolderPath = "data/tiny"
    """Folder written by `megatron-mode prepare`."""
    workers: Annotated[int, Field(ge=1, le=LARGEST_THREADS)] = 1
    """Threads of each reading process that read rows ahead of the training loop."""
    prefetch_steps: Size = 4
    """Steps read ahead of the training loop."""
    verify: bool = True
    """Hash all prepared files once a run, in the background of its first steps."""


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
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """Order of passes; dualpipev gives a rank a stage from each end of the model: a smaller bubble
    for half a micro-batch more in memory."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: selective the attention core
    (Korthikanti et al., 2022, section 5), full each decoder layer."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the row over the tensor ranks: less memory, same traffic."""
    zero_stage: Literal[0, 1] = 1
    """1 shards the optimizer state over the data-parallel ranks (ZeRO-1)."""


class AcceleratorConfig(Section):
    """Choose who computes what optional packages compute too.

    What auto takes depends on the device alone: machines with other packages compute the same.
    """

    attention: Literal["auto", "dense", "flex", "flash"] = "auto"
    """auto: flex on a GPU (heads of 16 or more), dense, which builds a T x T mask, elsewhere; flash
    is flash-attention over packed documents."""
    norm: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Whose RMSNorm runs; auto is torch."""
    adamw: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused AdamW runs; auto is torch. The two keep different states."""


class BatchConfig(Section):
    """Size the batch; accumulation is global_rows / (micro_rows * data)."""

    global_rows: Size = 8
    """Rows in one optimizer step over all ranks."""
    micro_rows: Size = 1
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
    permanent_every_steps: CountOrZero = 0
    """Checkpoints of steps that are a multiple of it are kept for good; 0 keeps none of them."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory of what a rank saves."""
    fallback: bool = False
    """Resume from the checkpoint before when the newest is damaged, which is set aside."""
    reshard: Literal["auto", "never"] = "never"
    """auto rewrites a checkpoint of another layout when a run is resumed; never refuses it."""


class RunConfig(Section):
    """Name the run, its length, its seed and its reports."""

    dir: FolderPath = "runs/tiny"
    """Run folder: config, metrics, checkpoints, report."""
    resume_from: CheckpointName | None = None
    """step-N: go back to this checkpoint, once; a checkpoint saved since then is resumed as usual,
    and newer ones are kept as step-M.aside. Unset: the one that RUN/checkpoints/latest names."""
    steps: Count = 100
    """Optimizer steps."""
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 1234
    """Seed of weights and order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 gradient accumulation on GPUs, fp32 on CPU."""
    eval_every_steps: CountOrZero = 100
    """Steps between evaluations on mix.valid; 0 evaluates only at the end."""
    eval_rows: Size = 64
    """Rows read from each held-out source in one evaluation."""
    threads: Annotated[int, Field(ge=0, le=LARGEST_THREADS)] = 0
    """CPU threads a process uses; 0 shares the machine's cores among its ranks."""
    time_limit_seconds: Positive | None = None
    """Seconds after its start by which a process has saved and left; unset: the end of its Slurm
    job, where there is one. The earlier of the two counts."""
    time_margin_seconds: NonNegative = 60.0
    """Seconds that stay free before the time limit, beyond the learned time of a step and a save;
    a first save must fit in them."""


class HealthConfig(Section):
    """Choose what happens at a loss or gradient that is not finite, at a spike and at a stall."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """At a loss or gradient that is not finite: stop; skip the update; or reload the newest
    checkpoint and leave the update out."""
    spike: Literal["report", "stop", "skip", "rollback"] = "report"
    """The same at a spike of the loss; report writes it to health.jsonl and continues."""
    spike_window_steps: Count = 64
    """Steps whose losses a spike is judged by; none is found before so many are taken."""
    spike_factor: Positive = 12.0
    """A loss spikes above the window's median + this times its median absolute deviation, which
    counts as at least 1 % of the median."""
    rollback_steps: Count = 1
    """Steps whose updates a rollback leaves out: the one at fault and those right before it."""
    max_skips: CountOrZero = 8
    """Most updates left out by these policies within max_skips_window_steps; one more stops."""
    max_skips_window_steps: Count = 1000
    """Steps within which max_skips counts."""
    leave_out_steps: tuple[CountOrZero, ...] = ()
    """Steps (from 0) whose updates are left out from the start: repeats what a run chose."""
    stall_seconds: NonNegative = 600.0
    """Seconds without progress after which a run writes its stacks and ends; 0: nobody watches, and
    only the collectives' own time limit of ten minutes and more is left."""
    start_stall_seconds: Positive = 900.0
    """The same for the start with its resume, the first step and the final report, which may take
    longer."""


class Config(Section):
    """Hold a complete run; the resolved form is written to RUN/config.yaml."""

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
    accelerators: AcceleratorConfig = AcceleratorConfig()
    """The optional accelerators."""
    batch: BatchConfig = BatchConfig()
    """The batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """The checkpoints."""
    health: HealthConfig = HealthConfig()
    """What to do about bad steps and stalls."""
