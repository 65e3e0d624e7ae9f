"""Train in 3D: process start-up, topology, DeepSpeed pipeline, optimizer, one step."""
