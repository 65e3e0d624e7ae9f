"""Compile DeepSpeed's shared-memory collective for CPU ranks once, so that no run does it."""

from deepspeed.accelerator import get_accelerator

accelerator = get_accelerator()
if accelerator.device_name() == "cpu":
    accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
