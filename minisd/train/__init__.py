"""Training: data, losses, one loop, and the recipes of the bundled models."""

from .loop import Record, TrainConfig, fit

__all__ = ["Record", "TrainConfig", "fit"]
