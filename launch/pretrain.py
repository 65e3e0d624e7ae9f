"""Train: `deepspeed launch/pretrain.py --config configs/run/X.yaml [key.path=value ...]`."""

from megatron_mode.commands.train import main

if __name__ == "__main__":
    main()
