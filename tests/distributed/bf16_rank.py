"""What each rank does in the bf16 tests: one step of many micro-batches, then two more."""

from __future__ import annotations

import equality_rank


def three_steps(process, layout_sizes, variants):
    """Run each variant; return [(losses, gradients, cuts, coordinates, fp32 weights after one)]."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megatron_mode.engine.step import Engine

    train_step = Engine.train_step
    masters = []

    def noting(self, step, micro_batches):
        result = train_step(self, step, micro_batches)
        if step == 0:
            masters.append(
                {
                    f"{link}.{name}": safe_get_full_fp32_param(parameter).double()
                    for link, module in self.deepspeed.module.named_links()
                    for name, parameter in module.named_parameters()
                }
            )
        return result

    Engine.train_step = noting
    results = equality_rank.three_steps(process, layout_sizes, variants)
    return [(*result, weights) for result, weights in zip(results, masters, strict=True)]
