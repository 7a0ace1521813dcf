"""Measuring a model: validation metrics and the digest of its weights."""
