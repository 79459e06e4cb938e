"""What is said of a sample's own answer.

verify   0/1 by a program: the reward of rloo and jepo_rl, and evaluation's accuracy; no likelihood objective reads it
judge    votes of a language model on what the verifier calls wrong: evaluation only
"""
