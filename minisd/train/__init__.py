"""Training, whatever is trained: losses, one loop, averages, checkpoints."""

from .loop import Record, TrainConfig, fit

__all__ = ["Record", "TrainConfig", "fit"]
