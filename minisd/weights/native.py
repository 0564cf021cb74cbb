"""A model's folder in our own layout: find it, read it strictly, write it.

A `config.json`, the tokenizer's merges and a file a part. A variant's folder holds what is its own alone, and names
the folder that has the rest; `unet.lora.safetensors` are low-rank changes of that one's U-Net. `checkpoints` reads and
writes the published layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..clip import TextTower
from ..config import ModelConfig, TextConfig
from ..depth import DPT
from ..files import replacing
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .errors import CheckpointError
from .tensors import load_strictly, read_tensors, save_tensors

BUNDLED = "critters-512"
UP, DOWN = ".lora_up", ".lora_down"  # how the factors of a low-rank change are named, behind their layer's name


def assets() -> Path:
    """The folder of bundled models and vocabularies: inside an installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "assets"
    return inside if inside.exists() else package.parent / "assets"


def resolve(model: str | Path | None) -> Path:
    """The file or folder of a model given by its path, or by the name of a bundled one."""
    bundled = sorted(p.parent.name for p in (assets() / "models").glob("*/config.json"))
    if model is None:
        model = BUNDLED
    if not isinstance(model, str | Path):
        raise CheckpointError(f"the model is {model!r}; it must be a file, a folder, or the name of a bundled one")
    for path in (Path(model), assets() / "models" / model):
        if path.is_file() or any((path / name).is_file() for name in ("model_index.json", "config.json")):
            return path
    raise CheckpointError(
        f"no model {str(model)!r}: neither a file of weights nor a folder with a model_index.json or config.json at "
        f"{Path(model).absolute()}, nor one of the bundled models ({', '.join(bundled) or 'none'})"
    )


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` took apart: lists become tuples again, dictionaries dataclasses."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{cls.__name__} is {values!r}; it must be a table of settings")
    hints = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise CheckpointError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")

    def restored(name: str, value: Any) -> Any:
        kinds = get_args(hints[name]) or (hints[name],)
        if value is not None and (kind := next(filter(is_dataclass, kinds), None)):
            return from_dict(kind, value)
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            raise CheckpointError(f"{name} is {value!r}; it must be one of {', '.join(get_args(hints[name]))}")
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: restored(name, value) for name, value in values.items()})


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model in a folder."""
    try:
        config = from_dict(ModelConfig, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not a model's config: {error}") from error
    if config.base is not None and (not isinstance(config.base, str) or Path(config.base).name != config.base):
        raise CheckpointError(f"{folder / 'config.json'}: base is {config.base!r}; it must be the name of a folder")
    return config


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write the sizes of a model beside its weights."""
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")


def place(folder: Path, config: ModelConfig, name: str) -> Path:
    """Where a file of a model is: in its own folder, else in that of its base."""
    own = folder / name
    return own if own.exists() or config.base is None else folder.parent / config.base / name


def read_folder(folder: Path, dtype: torch.dtype = torch.float32, finite: bool = True) -> dict[str, Any]:
    """Config, tokenizer and networks of a model, by the names `StableDiffusion` takes them by."""
    config, parts = read_config(folder), {}
    for name, module in empty_parts(config, folder / "config.json").items():
        lora = folder / f"{name}.lora.safetensors"
        changes = read_tensors(lora, finite) if lora.exists() else {}
        parts[name] = read_module(module, place(folder, config, f"{name}.safetensors"), dtype, finite, changes)
    return {"config": config, "tokenizer": read_tokenizer(folder, config), **parts}


def read_module(
    module: nn.Module,
    path: Path,
    dtype: torch.dtype = torch.float32,
    finite: bool = True,
    changes: Mapping[str, Tensor] = MappingProxyType({}),
) -> nn.Module:
    """Fill a module, which may be on `meta`, from a file in our own layout, strictly, ready to run.

    `changes` are low-rank ones to put into its weights.
    """
    tensors = merged(read_tensors(path, finite), changes)
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    load_strictly(module, cast, str(path), assign=True)
    return module.eval().requires_grad_(False)


def merged(tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with changes put into them, in float32; a tensor that is no change takes its name's place.

    Raises CheckpointError for changes of a layer that the network does not have, or not in this shape.
    """
    result = dict(tensors)
    for name, tensor in changes.items():
        layer = name.removesuffix(UP)
        if layer != name:
            up, down, weight = tensor.float(), changes.get(layer + DOWN), tensors.get(layer + ".weight")
            if down is None or weight is None or (len(up), down.shape[1]) != weight.flatten(1).shape:
                raise CheckpointError(f"{name} changes no layer of this model: it belongs to another one")
            result[layer + ".weight"] = weight.float() + (up @ down.float()).view_as(weight)
        elif not name.endswith(DOWN):
            result[name] = tensor
    return result


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model in a folder of our own layout."""
    return load_tokenizer(place(folder, config, "tokenizer.txt"), config.text)


def load_tokenizer(path: Path, text: TextConfig) -> Tokenizer:
    """The tokenizer of a file of merges, as a text tower needs it."""
    try:
        tokenizer = Tokenizer.load(path, text.vocabulary, pad=text.pad, places=text.places)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if len(tokenizer) != text.vocabulary:
        raise CheckpointError(f"{path} makes {len(tokenizer)} tokens, the config says {text.vocabulary}")
    return tokenizer


class NoInitialisation(TorchFunctionMode):
    """Leaves weights undrawn: on `meta` there is nothing to draw, and merely asking costs a second and 70 MB."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_parts(config: ModelConfig, source: str | Path) -> dict[str, nn.Module]:
    """The networks of a config on `meta`: names and shapes, no numbers."""
    try:
        with torch.device("meta"), NoInitialisation():
            parts = {"text": TextTower(config.text), "unet": UNet(config.unet), "vae": VAE(config.vae)}
            return parts | ({"depth": DPT(config.depth)} if config.depth else {})
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{source}: no network has these sizes: {error}") from error


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision."""
    save_tensors(path, module.state_dict())
