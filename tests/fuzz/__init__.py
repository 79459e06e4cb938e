"""Inputs that are wrong in every way that somebody thought of: `python -m tests.fuzz`, or `make fuzz`.

A campaign is a name, a strategy of Hypothesis that makes inputs, and a target: a function that hands one input to the
program's own functions, in this process. A target may return, or raise an error that the command line shows as one line
(ConfigError, DataError, RunError); anything else, and an input that takes too long, is a failure. To add one, see
`campaigns.py`.

corpus/NAME/ holds inputs of a campaign that were failures once or that somebody thought of. They are tried first.
"""
