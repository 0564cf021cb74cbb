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
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import checks
from ..clip import TextTower
from ..config import ModelConfig, TextConfig
from ..depth import DPT
from ..files import replacing
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .errors import CheckpointError, refuse, shortened
from .tensors import is_finite, load_strictly, read_tensors, save_tensors

M = TypeVar("M", bound=nn.Module)

BUNDLED = "critters-512"
MOST_LEVELS = 16
LIMITS: dict[
    str, tuple[Any, Any]
] = {  # the smallest and the largest a setting may be, by its name; "" is every other whole number's
    "": (1, 2**16),
    "blocks": (1, 64),
    "layers": (1, 64),
    "skip_last": (0, 63),
    "taps": (0, 63),
    "cross_only": (0, MOST_LEVELS),
    "steps": (1, 10_000),
    "vocabulary": (1, 2**20),
    "guidance": (0, 1000),
    "scaling": (1e-6, 1e6),
    "ends": (0, 1),
}
UP, DOWN = ".lora_up", ".lora_down"  # how the factors of a low-rank change are named, behind their layer's name


def assets() -> Path:
    """The folder of bundled models and vocabularies: inside an installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "assets"
    return inside if inside.exists() else package.parent / "assets"


def resolve(model: str | Path | None) -> Path:
    """The file or folder of a model given by its path, or by the name of a bundled one: that comes first.

    So a folder here that is called like a bundled model has to be named by a path: `./critters-512`.
    """
    bundled = sorted(p.parent.name for p in (assets() / "models").glob("*/config.json"))
    if model is None or model in bundled:
        return assets() / "models" / (model or BUNDLED)
    if not isinstance(model, str | Path):
        raise CheckpointError(f"the model is {model!r}; it must be a file, a folder, or the name of a bundled one")
    path = Path(model)
    if path.is_file() or any((path / name).is_file() for name in ("model_index.json", "config.json")):
        return path
    raise CheckpointError(
        f"no model {str(model)!r}: neither a file of weights nor a folder with a model_index.json or config.json at "
        f"{Path(model).absolute()}, nor one of the bundled models ({', '.join(bundled) or 'none'})"
    )


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` took apart, its types and sizes checked.

    Raises ValueError for a setting that is unknown, of another type, or beyond what any model has.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{cls.__name__} is {values!r:.200}; it must be a table of settings")
    hints = get_type_hints(cls)
    if unknown := set(values) - {f.name for f in fields(cls)}:
        raise CheckpointError(f"{cls.__name__} has no setting {shortened(sorted(unknown)):.500}")
    return cls(**{name: checked(name, hints[name], value) for name, value in values.items()})


def checked(name: str, kind: Any, value: Any) -> Any:
    """A setting's value, of the type that a dataclass gives for it and within `LIMITS`; lists become tuples again."""
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    if value is None and NoneType in kinds:
        return None
    kind, *_ = kinds
    allowed = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return from_dict(kind, value)
    if get_origin(kind) is tuple:
        count = range(1, MOST_LEVELS + 1) if ... in allowed else [len(allowed)]
        if not isinstance(value, list | tuple) or len(value) not in count:
            raise ValueError(f"{name} is {value!r:.200}; it must be a list of {count[0]} to {count[-1]} settings")
        return tuple(checked(name, allowed[0], each) for each in value)
    if kind is int:
        return checks.integer(name, value, *LIMITS.get(name, LIMITS[""]))
    if kind is float:
        return checks.number(name, value, *LIMITS[name])
    if get_origin(kind) is Literal and value not in allowed:
        raise ValueError(f"{name} is {value!r:.200}; it must be one of {', '.join(allowed)}")
    if kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.200}; it must be {'true or false' if kind is bool else 'text'}")
    return value


def contradictions(config: ModelConfig) -> list[str]:
    """What the settings of a config say against each other and no network would say when it is built."""
    unet, vae, text, depth, ends = config.unet, config.vae, config.text, config.depth, config.schedule.ends
    attending = [w for w, attention in zip(unet.widths, unet.attention, strict=False) if attention] + [unet.widths[-1]]
    heads, levels, given = unet.heads or unet.head_dim, len(unet.widths), unet.out_channels
    wrong = [
        (not heads, "the U-Net has neither heads nor head_dim"),
        (heads and any(w % heads for w in attending), f"widths {attending} don't divide into the U-Net's heads"),
        (len(unet.attention) != levels, f"attention has {len(unet.attention)} levels, widths {levels}"),
        (
            unet.context_dim not in (None, text.width),
            f"context_dim is {unet.context_dim}, the text tower {text.width} wide",
        ),
        (given != vae.latent_channels, f"the U-Net gives {given} channels, a latent has {vae.latent_channels}"),
        (text.width % text.heads, f"the text tower's width {text.width} doesn't divide into {text.heads} heads"),
        (text.skip_last >= text.layers, f"skip_last is {text.skip_last} of {text.layers} blocks"),
        (depth and depth.width % depth.heads, "the depth estimator's width doesn't divide into its heads"),
        (ends and ends[0] > ends[1], f"ends are {ends}, the first must not be above the last"),
        (ends and config.schedule.name == "cosine", "the cosine schedule has no ends"),
    ]
    return [said for holds, said in wrong if holds]


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model in a folder."""
    path = folder / "config.json"
    try:
        config = from_dict(ModelConfig, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a model's config: {error}") from error
    if config.base is not None and (not isinstance(config.base, str) or Path(config.base).name != config.base):
        raise CheckpointError(f"{path}: base is {config.base!r}; it must be the name of a folder")
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
    module: M,
    path: Path,
    dtype: torch.dtype = torch.float32,
    finite: bool = True,
    changes: Mapping[str, Tensor] = MappingProxyType({}),
) -> M:
    """Fill a module, which may be on `meta`, from a file in our own layout, strictly, ready to run.

    `changes` are low-rank ones to put into its weights.
    """
    tensors = merged(read_tensors(path, finite=False), changes)
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in cast.items():
        if finite and not is_finite(tensor):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity in {dtype}")
    load_strictly(module, cast, str(path), assign=True)
    return module.eval().requires_grad_(False)


def merged(tensors: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights with changes put into them, in float32; a tensor that is no change takes its name's place.

    Raises CheckpointError for changes of a layer that the network does not have, or not in this shape.
    """
    result = dict(tensors)
    for name, tensor in changes.items():
        layer = name.removesuffix(UP).removesuffix(DOWN)
        if layer == name:
            result[name] = tensor
            continue
        up, down, weight = changes.get(layer + UP), changes.get(layer + DOWN), tensors.get(layer + ".weight")
        if up is None or down is None:
            raise CheckpointError(f"{name} is half a change: {layer}{UP} and {layer}{DOWN} belong together")
        whole = up.ndim == down.ndim == 2 and up.shape[1] == len(down) and weight is not None and weight.ndim > 1
        if not whole or (len(up), down.shape[1]) != weight.flatten(1).shape:
            raise CheckpointError(f"{name} changes no layer of this model: it belongs to another one")
        if name.endswith(UP):
            result[layer + ".weight"] = weight.float() + (up.float() @ down.float()).view_as(weight)
    return result


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model in a folder of our own layout."""
    return load_tokenizer(place(folder, config, "tokenizer.txt"), config.text)


def load_tokenizer(path: Path, text: TextConfig) -> Tokenizer:
    """The tokenizer of a file of merges, as a text tower needs it."""
    try:
        tokenizer = Tokenizer.load(path, text.vocabulary, pad=text.pad, places=text.places)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return fitting(tokenizer, text, path)


def fitting(tokenizer: Tokenizer, text: TextConfig, source: Path) -> Tokenizer:
    """A tokenizer that has as many tokens as a text tower."""
    if len(tokenizer) != text.vocabulary:
        raise CheckpointError(f"{source} makes {len(tokenizer)} tokens, the config says {text.vocabulary}")
    return tokenizer


class NoInitialisation(TorchFunctionMode):
    """Leaves weights undrawn: on `meta` there is nothing to draw, and merely asking costs a second and 70 MB."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_parts(config: ModelConfig, source: str | Path) -> dict[str, nn.Module]:
    """The networks of a config on `meta`: names and shapes, no numbers."""
    refuse(source, "any network", contradictions(config))
    try:
        with torch.device("meta"), NoInitialisation():
            parts = {"text": TextTower(config.text), "unet": UNet(config.unet), "vae": VAE(config.vae)}
            return parts | ({"depth": DPT(config.depth)} if config.depth else {})
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{source}: no network has these sizes: {error}") from error


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's weights in half precision."""
    save_tensors(path, module.state_dict())
