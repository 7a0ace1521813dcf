"""Optimization: objectives, optimizers, parameter groups, schedules, gradient transforms, precision."""
