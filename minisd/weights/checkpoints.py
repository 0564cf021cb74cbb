"""Models on disk, published ones too: tell what a file or folder holds, load it strictly, write it for other tools.

Published are single files in the names of the original code (LDM), safetensors or .ckpt, and diffusers' folders.
`read_parts` takes them and our own folders (`weights`); `write_folder` and `write_single` write theirs.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import (
    SD1,
    SD1_INPAINT,
    SD2,
    SD2_DEPTH,
    SD2_INPAINT,
    SD2_V,
    SD_X4,
    ModelConfig,
    TextConfig,
    VAEConfig,
)
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import diffusers, naming
from .diffusers import is_v2
from .errors import CheckpointError, refuse, shortened
from .naming import EMA, PREFIXES, Layout
from .native import assets, empty_parts, from_dict, load_tokenizer, read_config, read_folder, write_config
from .tensors import is_finite, read_metadata, read_tensors, save_tensors

FAMILIES = {  # by the width of the context and the channels that go into the U-Net
    (768, 4): SD1,
    (768, 9): SD1_INPAINT,
    (1024, 4): SD2,  # or SD2_V: no name and no shape says which
    (1024, 9): SD2_INPAINT,
    (1024, 5): SD2_DEPTH,
    (1024, 7): SD_X4,
}
STRANGERS = {  # what another file of weights is, told by a name in it
    r".*(lora_(up|down|A|B)|\.lora\.(up|down)|hada_w1_a|lokr_w[12]).*": "a LoRA: it changes a model and is none itself",
    r"(control_model|controlnet_cond_embedding|input_hint_block|zero_convs)\..+": "a ControlNet, not a whole model",
    r"emb_params|string_to_param\..+": "a textual inversion: words for a model, not a model",
    r"conditioner\.embedders\..+|clip_[lg]": "for Stable Diffusion XL, which is not read here",
    r"(model\.diffusion_model\.)?(joint|double)_blocks\..+": "of Stable Diffusion 3 or FLUX, which are not read here",
}
FRAGMENTS = {  # the same, where there is no U-Net
    r"((vae|first_stage_model)\.)?(encoder|decoder)\.conv_in\.weight": "an autoencoder alone; read_vae takes it",
    r"time_embedding\..+|(text_model\.)?encoder\.layers\..+": "one part of a diffusers folder; give the whole folder",
}
FOLDERS = {  # of diffusers' parts, and the names of the files in them
    "unet": ("unet", ("diffusion_pytorch_model",)),
    "vae": ("vae", ("diffusion_pytorch_model",)),
    "text": ("text_encoder", ("model", "pytorch_model")),
    "depth": ("depth_estimator", ("model", "pytorch_model")),
}
JSON_FILES = {
    "unet": "config",
    "vae": "config",
    "text_encoder": "config",
    "scheduler": "scheduler_config",
    "depth_estimator": "config",
    "feature_extractor": "preprocessor_config",
}
ENDINGS = [  # of a file of weights, the first that is there is read
    *(".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json"),
    *(".bin", ".bin.index.json", ".fp16.bin", ".bin.index.fp16.json"),
]
PIPELINES = {  # diffusers' names of what draws with a U-Net of so many channels
    4: "StableDiffusionPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
    7: "StableDiffusionUpscalePipeline",
    9: "StableDiffusionInpaintPipeline",
}
CLIP_VOCABULARY = 49_408


@dataclass(frozen=True)
class Fitted:
    """What a checkpoint has for one part of a model."""

    tensors: dict[str, Tensor]  # under our names
    sources: dict[str, str]  # the checkpoint's names for them
    problems: list[tuple[str, str, str]]  # what is wrong, with which name of the checkpoint's, and how
    aside: list[str]  # the checkpoint's names of what is not needed


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Published weights: what they are and which tensors they have; the numbers are not read yet."""

    path: Path
    config: ModelConfig
    layout: Layout
    tokenizer: Tokenizer
    tensors: Mapping[str, Mapping[str, Tensor]]  # by part, under the file's names without the part's prefix
    notes: tuple[str, ...] = ()  # what had to be decided
    aside: tuple[str, ...] = ()  # what belongs to no part and is not needed
    untold: bool = False  # whether eps or v is for a probe to find out

    def named(self, part: str, name: str) -> str:
        """A tensor's full name in the file, or in the folder."""
        return f"{PREFIXES[part]}{name}" if self.layout.single else f"{FOLDERS[part][0]}/{name}"

    def fit(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Fitted], list[str]]:
        """What there is for each part, and everything that keeps it from fitting."""
        fitted = {part: fit(part, module, self.layout, self.tensors[part]) for part, module in modules.items()}
        problems = [
            f"{kind} {self.named(part, name)}{how}" for part, f in fitted.items() for kind, name, how in f.problems
        ]
        return fitted, problems

    def load(self, dtype: torch.dtype, finite: bool) -> dict[str, Any]:
        """What `read_parts` gives."""
        parts = empty_parts(self.config, self.path)
        fitted, problems = self.fit(parts)
        refuse(self.path, self.config.name, problems)
        for part, module in parts.items():
            fill(module, fitted[part], dtype, finite, self.path)
        config, notes = self.config, list(self.notes)
        if self.untold:
            config = SD2_V if predicts_v(parts["unet"]) else SD2
            notes.append(f"the file does not say what its U-Net predicts; a probe says {config.prediction}")
        for note in notes:
            warnings.warn(f"{self.path.name}: {note}", stacklevel=4)
        return {"config": config, "tokenizer": self.tokenizer, **parts}

    def describe(self, keys: bool = False) -> Iterator[str]:
        """What it is, line by line; with `keys` also where each of our tensors comes from."""
        fitted, problems = self.fit(empty_parts(self.config, self.path))
        aside = [self.named(part, name) for part, f in fitted.items() for name in f.aside] + [*self.aside]
        yield f"{self.config.name}, {'a single file' if self.layout.single else 'a diffusers folder'}"
        yield f"predicts {'eps or v, which a probe tells on loading' if self.untold else self.config.prediction}"
        yield from (f"{part}: {amount(f.tensors)}" for part, f in fitted.items())
        yield f"not needed: {len(aside)} tensors" + (f": {shortened(aside)}" if aside else "")
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"does not fit: {problem}" for problem in problems)
        if keys:
            for part, f in fitted.items():
                yield from (f"{part}.{ours} <- {self.named(part, name)}" for ours, name in f.sources.items())


def is_published(path: Path) -> bool:
    """Whether a model's file or folder is in a layout of the published ones, not in our own."""
    return path.is_file() or (path / "model_index.json").is_file()


def read_parts(path: Path, dtype: torch.dtype = torch.float32, finite: bool = True) -> dict[str, Any]:
    """Config, tokenizer and networks of a model, by the names `StableDiffusion` takes them by.

    `path` is a folder in our own layout or in diffusers', or a single file, safetensors or .ckpt. Weights become
    `dtype`; those that are it already stay in the file, mapped. What had to be decided is said in a warning.

    Raises CheckpointError, listing what is wrong, where a file is not whole, not of a model known here, or does not
    fit; and where a number is NaN or infinite, unless `finite` is False.
    """
    path = Path(path)
    if is_published(path):
        return open_checkpoint(path).load(dtype, finite)
    return read_folder(path, dtype, finite)


def describe(path: Path, keys: bool = False) -> Iterator[str]:
    """What weights hold, line by line: a checkpoint of any layout, or a file of other tensors, which is listed."""
    if not is_published(path):
        yield f"{read_config(path).name}, a folder of minisd"
        yield from (f"{file.stem}: {amount(read_tensors(file, False))}" for file in sorted(path.glob("*.safetensors")))
        return
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        if path.is_dir():
            raise
        tensors = read_tensors(path, finite=False)
        yield str(error)
        for name, tensor in tensors.items():
            yield f"{name:60} {list(tensor.shape)!s:24} {str(tensor.dtype).removeprefix('torch.')}"
        yield amount(tensors)
        return
    yield from checkpoint.describe(keys)


def amount(tensors: Mapping[str, Tensor]) -> str:
    """How much there is: "686 tensors, 859,520,964 numbers, float16"."""
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers, {' and '.join(kinds)}"


def fit(part: str, module: nn.Module, layout: Layout, tensors: Mapping[str, Tensor]) -> Fitted:
    """Look up a part's tensors under the names that a layout has for them; all that does not fit is noted."""
    wanted, own = naming.places(part, module, layout), module.state_dict()
    found, sources = naming.read(wanted, tensors)
    spare = sorted(set(tensors) - {name for place in wanted.values() for name in place.names})
    layers = len(module.blocks) if part == "text" else 0
    aside = [name for name in spare if naming.unused(part, name, layers)]
    problems = [("missing", place.names[0], "") for name, place in wanted.items() if name not in found]
    problems += [("unexpected", name, "") for name in spare if name not in aside]
    problems += [
        ("wrong shape:", theirs, f" is {list(tensors[theirs].shape)}, read as {ours} of {list(own[ours].shape)}")
        for ours, theirs in sources.items()
        if found[ours].shape != own[ours].shape
    ]
    return Fitted(found, sources, problems, aside)


def fill(module: nn.Module, fitted: Fitted, dtype: torch.dtype, finite: bool, source: Path) -> nn.Module:
    """Put what fits in the place of a module's own tensors, ready to run."""
    cast = {name: tensor.to(dtype) for name, tensor in fitted.tensors.items()}
    for name, tensor in cast.items():
        if finite and not is_finite(tensor):
            raise CheckpointError(f"{source}: {fitted.sources[name]} holds NaN or infinity in {dtype}")
    module.load_state_dict(cast, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def predicts_v(unet: UNet) -> bool:
    """Whether a v2 U-Net predicts v: at the last step eps is nearly its input, v far below it.

    The probe of AUTOMATIC1111's web UI: latent and context all 0.5, t = 999, and the mean difference below -1.
    """
    weight = unet.conv_in.weight
    x_t = torch.full((1, 4, 8, 8), 0.5, dtype=weight.dtype, device=weight.device)
    context = torch.full((1, 2, unet.config.context_dim), 0.5, dtype=weight.dtype, device=weight.device)
    out = unet(x_t, torch.tensor([999.0], device=weight.device), context)
    return (out - x_t).float().mean().item() < -1


def open_checkpoint(path: Path) -> Checkpoint:
    """Tell what a single file or a diffusers folder holds; CheckpointError names what it is, where it is no model."""
    if path.is_file():
        return recognise(path, read_tensors(path, finite=False), read_metadata(path))
    return open_folder(path)


def recognise(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Tell what a single file holds by its tensors' names and shapes, or by the config that `write_single` left in it.

    The U-Net's running average (EMA) is taken where there is one.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    beside = []
    for name, tensor in tensors.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part:
            parts[part][name.removeprefix(PREFIXES[part])] = tensor
        else:
            beside.append(name)
    own = own_config(path, metadata)
    config = own or family(path, tensors, parts["unet"])
    problems = [f"unexpected {name}" for name in beside if not naming.unused("", name, 0)]
    notes = precisions(parts)
    if any(name.startswith(EMA) for name in tensors):
        averages = {name: EMA + name.replace(".", "") for name in parts["unet"]}
        problems += [f"missing {name}" for name in averages.values() if name not in tensors]
        beside = [name for name in beside if not name.startswith(EMA)] + [PREFIXES["unet"] + name for name in averages]
        parts["unet"] = {name: tensors[average] for name, average in averages.items() if average in tensors}
        notes.append("the U-Net is its running average (model_ema), which draws better than the last step of training")
    refuse(path, config.name, problems)
    if "minisd.merges" in metadata:
        merges = (tuple(line.split()) for line in metadata["minisd.merges"].splitlines())
        tokenizer = Tokenizer(merges, pad=config.text.pad, places=config.text.places)
    else:
        tokenizer = clip_tokenizer(config.text)
    layout = Layout(single=True, v2=is_v2(config))
    untold = own is None and config is SD2
    return Checkpoint(path, config, layout, tokenizer, parts, tuple(notes), tuple(beside), untold)


def own_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig | None:
    """The config that `write_single` has left in a file, if it has."""
    if "minisd.config" not in metadata:
        return None
    try:
        return from_dict(ModelConfig, json.loads(metadata["minisd.config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its config is not a model's: {error}") from error


def clip_tokenizer(text: TextConfig) -> Tokenizer:
    """The tokenizer of every published model."""
    return load_tokenizer(assets() / "vocab" / "bpe_simple_vocab_16e6.txt.gz", text)


def family(path: Path, tensors: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> ModelConfig:
    """Which published model a single file holds, by widths and channels; CheckpointError names what else it is."""
    for pattern, what in (STRANGERS if unet else STRANGERS | FRAGMENTS).items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            raise CheckpointError(f"{path} is {what}")
    if len(tensors) == 1 and next(iter(tensors.values())).shape[-1:] in ((768,), (1024,)):
        raise CheckpointError(f"{path} is a textual inversion: words for a model, not a model")
    try:
        context = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        channels = unet["input_blocks.0.0.weight"].shape[1]
    except (KeyError, IndexError):
        first = ", ".join(list(tensors)[:3]) or "no tensor at all"
        raise CheckpointError(f"{path} holds no U-Net of Stable Diffusion; what it holds begins with {first}") from None
    if (context, channels) not in FAMILIES:
        known = "; ".join(f"{c} and {n}: {model.name}" for (c, n), model in FAMILIES.items())
        raise CheckpointError(
            f"{path} has a U-Net for a context {context} wide and {channels} input channels; known are {known}"
        )
    return FAMILIES[context, channels]


def precisions(parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """A note for each part whose numbers are of several precisions, or of eight bits."""
    notes = []
    for part, tensors in parts.items():
        kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
        if len(kinds) > 1 or any(kind.itemsize == 1 for kind in kinds):
            names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            notes.append(f"the numbers of {part} are {names}; all are converted")
    return notes


def open_folder(path: Path) -> Checkpoint:
    """Tell what a diffusers folder holds: by the `config.json` that `write_folder` has left in it, or by diffusers'."""
    try:
        if (path / "config.json").is_file():
            config = read_config(path)
        else:
            files = {name: path / name / f"{file}.json" for name, file in JSON_FILES.items()}
            told = {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}
            config = diffusers.from_diffusers(path.name, told)
    except CheckpointError:
        raise
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a diffusers folder of Stable Diffusion: {error!r}") from error
    for preset in (*FAMILIES.values(), SD2_V):
        if preset == replace(config, name=preset.name, size=preset.size, guidance=preset.guidance):
            config = preset
    clip = config.text.vocabulary == CLIP_VOCABULARY
    tokenizer = clip_tokenizer(config.text) if clip else load_tokenizer(path / "tokenizer" / "merges.txt", config.text)
    there = {part: FOLDERS[part] for part in FOLDERS if part != "depth" or config.depth}
    tensors = {part: read_tensors(weights_file(path / name, stems), False) for part, (name, stems) in there.items()}
    layout = Layout(single=False, v2=is_v2(config))
    return Checkpoint(path, config, layout, tokenizer, tensors, tuple(precisions(tensors)))


def weights_file(folder: Path, stems: Sequence[str]) -> Path:
    """The file of weights in one folder of a diffusers model; whole precision before half, safetensors before .bin."""
    names = [stem + ending for ending in ENDINGS for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no weights; looked for {', '.join(names)}")


def read_vae(
    path: str | Path, config: VAEConfig = SD1.vae, dtype: torch.dtype = torch.float32, finite: bool = True
) -> VAE:
    """An autoencoder alone, to take the place of a model's own: `sd.vae = read_vae("vae-ft-mse-840000.safetensors")`.

    `path` is a file of an autoencoder or of a whole model, or a diffusers folder of either. CheckpointError lists what
    does not fit the config.
    """
    path = Path(path)
    if path.is_dir():
        folder, stems = FOLDERS["vae"]
        path = weights_file(path / folder if (path / folder).is_dir() else path, stems)
    tensors = read_tensors(path, finite=False)
    for prefix in (PREFIXES["vae"], "vae."):
        if inside := {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}:
            tensors = inside
    with torch.device("meta"):
        vae = VAE(config)
    single = any(name.startswith("encoder.down.") for name in tensors)
    fitted = fit("vae", vae, Layout(single, v2=False), tensors)
    refuse(path, "this autoencoder", [f"{kind} {name}{how}" for kind, name, how in fitted.problems])
    return fill(vae, fitted, dtype, finite, path)


def laid_out(parts: Mapping[str, Any], single: bool) -> tuple[ModelConfig, dict[str, dict[str, Tensor]]]:
    """A model's tensors as a checkpoint names and shapes them, by part, and the config of what is written.

    What drawing does not use is left out, as in the published files: the text tower's projection, and its blocks
    beyond the one that is read.
    """
    text = parts["config"].text
    text = replace(text, layers=text.layers - text.skip_last, skip_last=0, projection=None)
    config = replace(parts["config"], text=text)
    layout = Layout(single, is_v2(config))
    tensors = {
        part: naming.write(naming.places(part, module, layout), parts[part].state_dict())
        for part, module in empty_parts(config, config.name).items()
    }
    return config, tensors


def write_single(parts: Mapping[str, Any], path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a model as a single safetensors file in LDM's names, which any tool for Stable Diffusion reads.

    `parts` are those that `read_parts` gives. Raises FileExistsError where the file is there already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name, or remove it first")
    config, tensors = laid_out(parts, single=True)
    metadata = {"minisd.config": json.dumps(config.to_dict())}
    if config.text.vocabulary != CLIP_VOCABULARY:
        metadata["minisd.merges"] = "\n".join(" ".join(merge) for merge in parts["tokenizer"].merges)
    named = {PREFIXES[part] + name: tensor for part, own in tensors.items() for name, tensor in own.items()}
    save_tensors(path, named, dtype, metadata)


def write_folder(parts: Mapping[str, Any], folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a model as a folder that diffusers loads: weights, configs, tokenizer and scheduler.

    `parts` are those that `read_parts` gives. The folder appears when it is whole. Raises FileExistsError where it is
    there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another name, or remove it first")
    config, tensors = laid_out(parts, single=False)
    files = {f"{name}/{JSON_FILES[name]}": told for name, told in diffusers.to_diffusers(config).items()}
    files |= {f"tokenizer/{name}": told for name, told in diffusers.to_tokenizer(parts["tokenizer"]).items()}
    files["model_index"] = index = {
        "_class_name": PIPELINES.get(config.unet.in_channels, PIPELINES[4]),
        "_diffusers_version": "0.35.0",  # some of its pipelines ask for it
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    if config.depth:
        index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
        index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    if config.unet.classes:
        index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        low = files["scheduler/scheduler_config"] | {"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}
        files["low_res_scheduler/scheduler_config"] = low
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, told in files.items():
            file = temporary / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        parts["tokenizer"].save(temporary / "tokenizer" / "merges.txt")
        for part, own in tensors.items():
            name, stems = FOLDERS[part]
            save_tensors(temporary / name / f"{stems[0]}.safetensors", own, dtype)
        write_config(temporary, config)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
