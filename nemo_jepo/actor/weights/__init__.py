"""Hugging Face <-> Megatron: names, layouts, import, and the stream of weights to samplers and files."""
