"""Checkpoints: states kept wholly or not at all, verified by content, never unpickled."""
