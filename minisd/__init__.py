"""minisd: Stable Diffusion from scratch, small enough to read, whole enough to run.

>>> import minisd
>>> sd = minisd.load()
>>> picture = sd("a watercolor of an orange cat with blue eyes on a beach", seed=7)
"""

from . import image, samplers, schedule
from .config import ModelConfig
from .pipeline import StableDiffusion, load
from .weights import CheckpointError

__all__ = ["CheckpointError", "ModelConfig", "StableDiffusion", "image", "load", "samplers", "schedule"]
__version__ = "0.1.0"
