"""Rewards of a sample's own answer: read by rloo, jepo_rl and evaluation, never by the likelihood objectives."""
