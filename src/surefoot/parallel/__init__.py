"""Strategies: how many processes train together."""
