"""Training: the loop, the loss, optimizers and schedules, checkpoints, compilation, processes, signals.

This package imports data, models, adapter (the groups of parameters), records and config. The loop takes callables, and
knows neither a tracker nor Hydra nor a task.
"""
