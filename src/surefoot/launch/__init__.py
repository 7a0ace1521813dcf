"""Drivers of runs: processes that start them."""
