"""Drivers of runs: processes that start them."""

NOTE = "_SUREFOOT_NOTE"
"""Environment variable: a file in which a training process tells its supervisor why it ends."""
