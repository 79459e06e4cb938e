"""Sampling from vLLM servers: start, ask, feed with weights, survive."""
