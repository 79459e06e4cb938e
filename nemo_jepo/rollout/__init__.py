"""Prompt -> Rollout: the samplers."""
