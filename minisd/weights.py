"""Models on disk and in memory: find the bundled one, load it strictly, save one."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from .clip import TextTower
from .config import ModelConfig
from .files import CheckpointError, load_strictly, read_tensors, replacing, save_tensors
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

BUNDLED = "critters-128"
PARTS = ("text", "unet", "vae")


def assets() -> Path:
    """The folder of bundled models and vocabularies: inside an installed package, beside it in a clone."""
    inside = Path(__file__).parent / "assets"
    return inside if inside.exists() else Path(__file__).parent.parent / "assets"


def resolve(model: str | Path | None) -> Path:
    """The folder of a model given by its path, or by the name of a bundled one."""
    bundled = sorted(p.parent.name for p in (assets() / "models").glob("*/config.json"))
    if model is None:
        model = BUNDLED
    if not isinstance(model, str | Path):
        raise CheckpointError(f"the model is {model!r}; it must be a folder, or the name of a bundled one")
    for folder in (Path(model), assets() / "models" / model):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"no model {str(model)!r}: neither a folder with a config.json at {Path(model).absolute()}, nor one of the "
        f"bundled models ({', '.join(bundled) or 'none'})"
    )


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` took apart: lists become tuples again, dictionaries dataclasses."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{cls.__name__} is {values!r}; it must be a table of settings")
    hints = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise CheckpointError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")

    def restored(name: str, value: Any) -> Any:
        if is_dataclass(hints[name]):
            return from_dict(hints[name], value)
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise CheckpointError(f"{name} is {value!r}; it must be one of {', '.join(get_args(hints[name]))}")
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: restored(name, value) for name, value in values.items()})


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model in a folder."""
    try:
        return from_dict(ModelConfig, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not a model's config: {error}") from error


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write the sizes of a model beside its weights."""
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")


def read_module(module: nn.Module, path: Path) -> nn.Module:
    """Fill a module from a file, strictly, ready to run."""
    tensors = read_tensors(path)
    load_strictly(module, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, str(path))
    return module.eval().requires_grad_(False)


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model in a folder."""
    path, text = folder / "tokenizer.txt", config.text
    try:
        tokenizer = Tokenizer.load(path, text.vocabulary, pad=text.pad, places=text.places)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if len(tokenizer) != text.vocabulary:
        raise CheckpointError(f"{path} makes {len(tokenizer)} tokens, the config says {text.vocabulary}")
    return tokenizer


def read_parts(folder: Path) -> dict[str, Any]:
    """Config, tokenizer and networks of a model in a folder, by the names `StableDiffusion` takes them by."""
    config = read_config(folder)
    try:
        with torch.device("meta"):
            modules = {"text": TextTower(config.text), "unet": UNet(config.unet), "vae": VAE(config.vae)}
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: no network has these sizes: {error}") from error
    parts = {name: read_module(modules[name].to_empty(device="cpu"), folder / f"{name}.safetensors") for name in PARTS}
    return {"config": config, "tokenizer": read_tokenizer(folder, config), **parts}


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision."""
    save_tensors(path, module.state_dict())
