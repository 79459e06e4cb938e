"""JEPO: reinforcement learning from reference answers that no program can grade, at Megatron scale."""

__version__ = "0.1.0"
