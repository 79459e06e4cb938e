"""The NeMo-Aligner-style Megatron actor: model, parallel layout, scoring, step."""
