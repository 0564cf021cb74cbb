"""Everything about files of weights: read strictly, whatever wrote them, and written whole."""

from .checkpoints import describe, is_published, read_parts, read_vae, write_folder, write_single
from .errors import CheckpointError
from .native import assets, empty_parts, read_config, read_module, read_tokenizer, resolve, save_module, write_config
from .tensors import load_strictly, read_tensors, save_tensors

__all__ = [
    "CheckpointError",
    "assets",
    "describe",
    "empty_parts",
    "is_published",
    "load_strictly",
    "read_config",
    "read_module",
    "read_parts",
    "read_tensors",
    "read_tokenizer",
    "read_vae",
    "resolve",
    "save_module",
    "save_tensors",
    "write_config",
    "write_folder",
    "write_single",
]
