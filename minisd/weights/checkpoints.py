"""Models on disk, published ones too: tell what a file or folder holds, load it strictly, write it for other tools.

Published are single files in the names of the original code (LDM), safetensors or .ckpt, and diffusers' folders.
`read_parts` takes them and our own folders (`weights`); `write_folder` and `write_single` write theirs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import checks
from ..clip import TextTower
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
from ..denoiser import Prediction
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import diffusers, naming
from .diffusers import is_v2
from .errors import CheckpointError, refuse, shortened
from .mapped import forget
from .naming import EMA, PREFIXES, Layout
from .native import M, assets, empty_parts, fitting, from_dict, load_tokenizer, read_config, read_folder, write_config
from .tensors import is_finite, read_metadata, read_tensors, save_tensors

FAMILIES = {  # by the width of the context and the channels that go into the U-Net
    (768, 4): SD1,
    (768, 9): SD1_INPAINT,
    (1024, 4): SD2,  # or SD2_V: no name and no shape says which
    (1024, 9): SD2_INPAINT,
    (1024, 5): SD2_DEPTH,
    (1024, 7): SD_X4,
}
CHANNELS = {  # by how many go into the U-Net: diffusers' name of what draws with it
    4: "StableDiffusionPipeline",
    5: "StableDiffusionDepth2ImgPipeline",
    7: "StableDiffusionUpscalePipeline",
    9: "StableDiffusionInpaintPipeline",
}
STRANGERS = {  # what another file of weights is, told by a name in it
    r"lora_(unet|te\d?)_.+|.*([_.]lora\.(up|down)|lora_(up|down|A|B)|hada_w1_a|lokr_w[12]).*": "a LoRA: it changes a "
    "model and is none itself",
    r"(control_model|controlnet_cond_embedding|input_hint_block|zero_convs)\..+": "a ControlNet, not a whole model",
    r"emb_params|string_to_param\..+": "a textual inversion: words for a model, not a model",
    r"\d+\.[01]\.linear\d?\..+": "a hypernetwork: it changes a model and is none itself",
    r"(image_proj|ip_adapter)\..+": "an IP-Adapter, not a whole model",
    r".*motion_modules\..+": "a motion module: it changes a model and is none itself",
    r"conditioner\.embedders\..+|clip_[lg]": "for Stable Diffusion XL, which is not read here",
    r"(model\.diffusion_model\.)?(joint|double)_blocks\..+": "of Stable Diffusion 3 or FLUX, which are not read here",
}
ALONE = "without text tower and autoencoder; minisd.load(model, unet=...) puts it into a whole model"
FRAGMENTS = {  # the same, where there is no whole model
    r"((vae|first_stage_model)\.)?(encoder|decoder)\.conv_in\.weight": "an autoencoder alone; read_vae takes it",
    r"((model\.)?diffusion_model\.|unet\.)?(input_blocks\.0\.0|conv_in)\.weight": f"a U-Net alone, {ALONE}",
    rf"{re.escape(EMA)}input_blocks00weight": f"a U-Net alone, {ALONE}",
    r"time_embedding\..+|(text_model\.)?encoder\.layers\..+": "one part of a diffusers folder; give the whole folder",
}
SPOKEN: dict[str, Prediction] = {
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
}  # as a file's own texts say it, after the ModelSpec
ALONE_PREFIXES = {  # of the names in a file of one part; else they have none
    "unet": (PREFIXES["unet"], "diffusion_model.", "unet."),
    "vae": (PREFIXES["vae"], "vae."),
}
MARKS = {"v_pred", "ztsnr"}  # tensors of no numbers: predicts v; has a schedule with zero terminal SNR
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
CLIP_VOCABULARY = 49_408


@dataclass(frozen=True)
class Fitted:
    """What a checkpoint has for one part of a model."""

    tensors: dict[str, Tensor]  # under our names
    sources: dict[str, str]  # the checkpoint's names for them
    problems: list[tuple[str, str, str]]  # what is wrong, with which name of the checkpoint's, and how
    aside: list[str]  # the checkpoint's names of what is not needed


@dataclass(frozen=True, eq=False)
class Part:
    """The tensors that published weights have for one part of a model; their numbers are not read yet."""

    tensors: Mapping[str, Tensor]  # without the part's prefix
    prefix: str  # of the names, in the file or in the folder
    layout: Layout

    def fit(self, part: str, module: nn.Module) -> Fitted:
        """What there is for a network."""
        return fit(part, module, self.layout, self.tensors)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Published weights: what they are and which tensors they have."""

    path: Path
    config: ModelConfig
    single: bool  # one file for all parts, else a diffusers folder
    tokenizer: Tokenizer
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = ()  # what had to be decided
    aside: tuple[str, ...] = ()  # what belongs to no part and is not needed
    untold: bool = False  # whether eps or v is for a probe to find out

    def fit(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Fitted], list[str]]:
        """What there is for each part, and everything that keeps it from fitting."""
        fitted = {part: self.parts[part].fit(part, module) for part, module in modules.items()}
        problems = [
            f"{kind} {self.parts[part].prefix}{name}{how}"
            for part, f in fitted.items()
            for kind, name, how in f.problems
        ]
        return fitted, problems

    def load(self, dtype: torch.dtype, finite: bool) -> dict[str, Any]:
        """What `read_parts` gives."""
        modules = empty_parts(self.config, self.path)
        fitted, problems = self.fit(modules)
        refuse(self.path, self.config.name, problems)
        for part, module in modules.items():
            fill(module, fitted[part], dtype, finite, self.path)
        config, notes = self.config, list(self.notes)
        if self.untold:
            unet = modules["unet"]
            assert isinstance(unet, UNet), unet
            config = predicting(config, "v" if predicts_v(unet) else "eps")
            if config.prediction == "v" or self.config in (SD2, SD2_V):  # v2 is published in both kinds, v1 in one
                notes.append(
                    f"the file does not say what its U-Net predicts; a probe says {config.prediction}. Where pictures "
                    'are noise or grey it is wrong: say prediction="eps" or "v"'
                )
        for note in notes:
            checks.warn(f"{self.path.name}: {note}")
        return {"config": config, "tokenizer": self.tokenizer, **modules}

    def describe(self, keys: bool = False) -> Iterator[str]:
        """What it is, line by line; with `keys` also where each of our tensors comes from."""
        fitted, problems = self.fit(empty_parts(self.config, self.path))
        aside = [self.parts[part].prefix + name for part, f in fitted.items() for name in f.aside] + [*self.aside]
        yield f"{self.config.name}, {'a single file' if self.single else 'a diffusers folder'}"
        yield f"predicts {'eps or v, which a probe tells on loading' if self.untold else self.config.prediction}"
        yield from (f"{part}: {amount(f.tensors)}" for part, f in fitted.items())
        yield f"not needed: {len(aside)} tensors" + (f": {shortened(aside)}" if aside else "")
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"does not fit: {problem}" for problem in problems)
        if keys:
            for part, f in fitted.items():
                yield from (f"{part}.{ours} <- {self.parts[part].prefix}{name}" for ours, name in f.sources.items())


def is_published(path: Path) -> bool:
    """Whether a file or folder holds a published model, or one of its size.

    Not a small one of ours, though `write_single` and `write_folder` put it into the published layouts.
    """
    if not in_published_layout(path):
        return False
    if path.is_file():
        own = own_config(path, read_metadata(path))
    else:
        own = read_config(path) if (path / "config.json").is_file() else None
    return own is None or any(own.unet == model.unet for model in FAMILIES.values())


def in_published_layout(path: Path) -> bool:
    """Whether a file or folder is in a layout of the published models, not in our own."""
    return path.is_file() or (path / "model_index.json").is_file()


def read_parts(
    path: Path,
    dtype: torch.dtype = torch.float32,
    finite: bool = True,
    *,
    unet: str | Path | None = None,
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Config, tokenizer and networks of a model, by the names `StableDiffusion` takes them by.

    `path` is a folder in our own layout or in diffusers', or a single file, safetensors or .ckpt. `unet` is a file, or
    a folder of diffusers', whose U-Net takes the place of that of a published model. `prediction` says what the U-Net
    predicts; else the config does, a mark in the file, a .yaml beside it, or a probe. Weights become `dtype`; those
    that are it already stay in the file, mapped. What had to be decided is said in a warning.

    Raises CheckpointError, listing what is wrong, where a file is not whole, not of a model known here, or does not
    fit; and where a number is NaN or infinite, unless `finite` is False.
    """
    path = Path(path)
    if prediction not in (None, *get_args(Prediction)):
        raise CheckpointError(f"prediction is {prediction!r}; it must be one of {', '.join(get_args(Prediction))}")
    if in_published_layout(path):
        checkpoint = open_checkpoint(path)
        if unet is not None:
            checkpoint = with_unet(checkpoint, Path(unet))
        if prediction:
            checkpoint = replace(checkpoint, config=predicting(checkpoint.config, prediction), untold=False)
        return checkpoint.load(dtype, finite)
    if unet is not None:
        raise CheckpointError(f"{path} is a folder of minisd; a U-Net of another file goes into published models alone")
    parts = read_folder(path, dtype, finite)
    return parts | ({"config": predicting(parts["config"], prediction)} if prediction else {})


def with_unet(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The same model with the U-Net of another file, which says itself what it predicts, or is probed."""
    file, part = read_alone("unet", path, checkpoint.config)
    metadata, names = ({}, set()) if file.suffix == ".json" else (read_metadata(file), set(read_tensors(file, False)))
    prediction, zero = told(file, metadata, names)
    return replace(
        checkpoint,
        config=predicting(checkpoint.config, prediction or checkpoint.config.prediction, zero),
        parts={**checkpoint.parts, "unet": part},
        notes=(*checkpoint.notes, *precisions({"the other U-Net": part})),
        untold=prediction is None,
    )


def predicting(config: ModelConfig, prediction: Prediction, zero: bool = False) -> ModelConfig:
    """A config with another prediction; `zero`: of a schedule with zero terminal SNR, whose runs begin at its end."""
    if prediction != config.prediction:
        pair = {SD2: SD2_V, SD2_V: SD2}.get(config)
        config = pair if pair and pair.prediction == prediction else replace(config, prediction=prediction)
    if zero:
        config = replace(config, schedule=replace(config.schedule, zero_terminal_snr=True), spacing="trailing")
    return config


def told(path: Path, metadata: Mapping[str, str], names: Collection[str]) -> tuple[Prediction | None, bool]:
    """What a file says its U-Net predicts, and whether its schedule has zero terminal SNR; None where it says nothing.

    It is said by tensors of no numbers (`MARKS`), in the file's own texts, or in the config of the training, a .yaml of
    the file's name beside it.
    """
    if not MARKS.isdisjoint(names):
        return "v", "ztsnr" in names
    if prediction := SPOKEN.get(metadata.get("modelspec.prediction_type", "")):
        return prediction, metadata.get("ss_zero_terminal_snr") == "True"
    for config in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if config.is_file():
            text = config.read_text(encoding="utf-8", errors="replace")
            for prediction in get_args(Prediction):
                if re.search(rf"""^\s*parameterization\s*:\s*["']?{prediction}\b""", text, re.MULTILINE):
                    return prediction, False
    return None, False


def describe(path: Path, keys: bool = False) -> Iterator[str]:
    """What weights hold, line by line: a checkpoint of any layout, or a file of other tensors, which is listed."""
    if not in_published_layout(path):
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
    layers = len(module.blocks) if isinstance(module, TextTower) else 0
    aside = [name for name in spare if naming.unused(part, name, layers)]
    problems = [("missing", place.names[0], "") for name, place in wanted.items() if name not in found]
    problems += [("unexpected", name, "") for name in spare if name not in aside]
    for ours, theirs in sources.items():
        there = tensors[theirs]
        if found[ours].shape != own[ours].shape:
            problems.append(
                ("wrong shape:", theirs, f" is {list(there.shape)}, read as {ours} of {list(own[ours].shape)}")
            )
        elif not there.is_floating_point():
            problems.append(("wrong numbers:", theirs, f" is {str(there.dtype)[6:]}, which is no kind of weights"))
    return Fitted(found, sources, problems, aside)


def fill(module: M, fitted: Fitted, dtype: torch.dtype, finite: bool, source: Path) -> M:
    """Put what fits in the place of a module's own tensors, ready to run."""
    cast = {}
    for name, tensor in fitted.tensors.items():
        cast[name] = tensor.to(dtype)
        if finite and not is_finite(cast[name]):
            raise CheckpointError(f"{source}: {fitted.sources[name]} holds NaN or infinity in {dtype}")
        if cast[name] is not tensor:
            forget(tensor)  # else a file that is cast takes memory twice
    module.load_state_dict(cast, assign=True)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def predicts_v(unet: UNet) -> bool:
    """Whether a U-Net predicts v: at the last step eps is nearly its input, v far below it.

    The probe of AUTOMATIC1111's web UI: latent and context all 0.5, t = 999, and the mean difference below -1. Beside
    the latent stand zeros, but for an inpainting model's mask, which is all ones.
    """
    channels, shown = unet.config.out_channels, unet.config.in_channels
    x_t = torch.zeros(1, shown, 8, 8).to(unet.conv_in.weight)
    x_t[:, :channels] = 0.5
    if shown == 2 * channels + 1:
        x_t[:, channels] = 1
    context = torch.full((1, 2, unet.config.context_dim), 0.5).to(x_t)
    out = unet(x_t, torch.tensor([999.0], device=x_t.device), context)
    return (out - x_t[:, :channels]).float().mean().item() < -1


def open_checkpoint(path: Path) -> Checkpoint:
    """Tell what a single file or a diffusers folder holds; CheckpointError names what it is, where it is no model."""
    single = path.is_file()
    checkpoint = recognise(path, read_tensors(path, finite=False), read_metadata(path)) if single else open_folder(path)
    if (channels := checkpoint.config.unet.in_channels) not in CHANNELS:
        pix = ", as InstructPix2Pix has" if channels == 8 else ""
        raise CheckpointError(
            f"{path} has a U-Net of {channels} input channels{pix}, with which nothing here draws; read are 4 (words "
            "alone), 5 (a depth map beside them), 7 (a small picture), 9 (a picture with a hole)"
        )
    if checkpoint.config.text.projection:
        raise CheckpointError(f"{path}: text.projection is for folders of minisd; no published model stores one")
    return checkpoint


def recognise(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Tell what a single file holds by its tensors' names and shapes, or by the config that `write_single` left in it.

    The U-Net's running average (EMA) is taken where there is one.
    """
    inside: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    beside = []
    for name, tensor in tensors.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part:
            inside[part][name.removeprefix(PREFIXES[part])] = tensor
        else:
            beside.append(name)
    own = own_config(path, metadata)
    config, notes = own or family(path, tensors, inside), []
    problems = [f"unexpected {name}" for name in beside if not naming.unused("", name, 0)]
    if any(name.startswith(EMA) for name in tensors):
        beside += [PREFIXES["unet"] + name for name in inside["unet"]]
        inside["unet"], missing = averaged(path, config, tensors)
        beside = [name for name in beside if not name.startswith(EMA)]
        problems += [f"missing {name}" for name in missing]
        notes.append("the U-Net is its running average (model_ema), which draws better than the last step of training")
    refuse(path, config.name, problems)
    v2 = is_v2(config)
    parts = {
        part: Part(found, PREFIXES[part], naming.layout_of(part, found, True, v2)) for part, found in inside.items()
    }
    prediction, zero = told(path, metadata, tensors.keys())
    untold = not own and not prediction and not config.unet.classes  # the upscaler's is known
    config = predicting(config, prediction or config.prediction, zero)
    tokenizer = own_tokenizer(path, metadata, config.text)
    return Checkpoint(path, config, True, tokenizer, parts, (*precisions(parts), *notes), tuple(beside), untold)


def averaged(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The U-Net's running average under the names of the U-Net, and what of it is not there."""
    places = naming.places("unet", empty_parts(config, path)["unet"], Layout(single=True, v2=is_v2(config)))
    names = {place.names[0]: EMA + place.names[0].replace(".", "") for place in places.values()}
    there = {name: tensors[average] for name, average in names.items() if average in tensors}
    return there, [average for average in names.values() if average not in tensors]


def own_tokenizer(path: Path, metadata: Mapping[str, str], text: TextConfig) -> Tokenizer:
    """The tokenizer of the merges that `write_single` has left in a file; that of every published model is CLIP's."""
    if text.vocabulary == CLIP_VOCABULARY:
        return clip_tokenizer(text)
    known, merges = set(Tokenizer([]).tokens), []
    for line in metadata.get("minisd.merges", "").splitlines():
        merge = tuple(line.split())
        if len(merge) != 2 or not known.issuperset(merge) or "".join(merge) in known:
            raise CheckpointError(f"{path}: its merge {line[:80]!r} does not join two known symbols to a new one")
        known.add("".join(merge))
        merges.append(merge)
    return fitting(Tokenizer(merges, pad=text.pad, places=text.places), text, path)


def own_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig | None:
    """The config that `write_single` has left in a file, if it has."""
    if "minisd.config" not in metadata:
        return None
    try:
        return from_dict(ModelConfig, json.loads(metadata["minisd.config"]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its config is not a model's: {error}") from error


def clip_tokenizer(text: TextConfig) -> Tokenizer:
    """The tokenizer of every published model."""
    return load_tokenizer(assets() / "vocab" / "bpe_simple_vocab_16e6.txt.gz", text)


def family(path: Path, tensors: Mapping[str, Tensor], inside: Mapping[str, Mapping[str, Tensor]]) -> ModelConfig:
    """Which published model a single file holds, by widths and channels; CheckpointError names what else it is."""
    whole = (inside["text"] or inside["vae"]) and (inside["unet"] or any(name.startswith(EMA) for name in tensors))
    for pattern, what in (STRANGERS if whole else STRANGERS | FRAGMENTS).items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            raise CheckpointError(f"{path} is {what}")
    if len(tensors) == 1 and next(iter(tensors.values())).shape[-1:] in ((768,), (1024,)):
        raise CheckpointError(f"{path} is a textual inversion: words for a model, not a model")

    def second(name: str) -> int:
        """How many channels go into a layer of the U-Net, or of its running average."""
        return (tensors.get(PREFIXES["unet"] + name, tensors.get(EMA + name.replace(".", "")))).shape[1]

    try:
        context = second("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
        channels = second("input_blocks.0.0.weight")
    except (AttributeError, IndexError):
        first = ", ".join(list(tensors)[:3])[:300] or "no tensor at all"
        raise CheckpointError(f"{path} holds no U-Net of Stable Diffusion; what it holds begins with {first}") from None
    if (context, channels) not in FAMILIES:
        known = "; ".join(f"{c} and {n}: {model.name}" for (c, n), model in FAMILIES.items())
        raise CheckpointError(
            f"{path} has a U-Net for a context {context} wide and {channels} input channels; known are {known}"
        )
    return FAMILIES[context, channels]


def precisions(parts: Mapping[str, Part]) -> list[str]:
    """A note for each part whose numbers are of several precisions, or of eight bits."""
    notes = []
    for name, part in parts.items():
        kinds = {t.dtype for t in part.tensors.values() if t.is_floating_point()}
        if len(kinds) > 1 or any(kind.itemsize == 1 for kind in kinds):
            told = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            notes.append(f"the numbers of {name} are {told}; all are converted")
    return notes


def open_folder(path: Path) -> Checkpoint:
    """Tell what a diffusers folder holds: by the `config.json` that `write_folder` has left in it, or by diffusers'."""
    try:
        if (path / "config.json").is_file():
            config = read_config(path)
        else:
            files = {name: path / name / f"{file}.json" for name, file in JSON_FILES.items()}
            told = {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}
            config = from_dict(ModelConfig, diffusers.from_diffusers(path.name, told).to_dict())
    except CheckpointError:
        raise
    except (OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} is not a diffusers folder of Stable Diffusion: {said}") from error
    for preset in (*FAMILIES.values(), SD2_V):
        if preset == replace(config, name=preset.name, size=preset.size, guidance=preset.guidance):
            config = preset
    if (added := config.text.vocabulary - CLIP_VOCABULARY) > 0:
        raise CheckpointError(
            f"{path} has {added} words beyond CLIP's, which textual inversion adds and which are not read here; use "
            "the model without them: they are the last embeddings of its text encoder, and in added_tokens.json"
        )
    merges = path / "tokenizer" / "merges.txt"
    tokenizer = load_tokenizer(merges, config.text) if added else clip_tokenizer(config.text)
    parts = {}
    for part, (name, stems) in FOLDERS.items():
        if part != "depth" or config.depth:
            tensors = read_tensors(weights_file(path / name, stems), finite=False)
            parts[part] = Part(tensors, f"{name}/", Layout(single=False, v2=is_v2(config)))
    return Checkpoint(path, config, False, tokenizer, parts, tuple(precisions(parts)))


def weights_file(folder: Path, stems: Sequence[str]) -> Path:
    """The file of weights in one folder of a diffusers model; whole precision before half, safetensors before .bin."""
    names = [stem + ending for ending in ENDINGS for stem in stems]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no weights; looked for {', '.join(names)}")


def read_alone(part: str, path: Path, config: ModelConfig) -> tuple[Path, Part]:
    """One part of a model, from a file of it or of a whole model or from a diffusers folder of either; and its file."""
    if path.is_dir():
        folder, stems = FOLDERS[part]
        path = weights_file(path / folder if (path / folder).is_dir() else path, stems)
    tensors = read_tensors(path, finite=False)
    prefix = next((p for p in ALONE_PREFIXES[part] if any(name.startswith(p) for name in tensors)), "")
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if part == "unet" and any(name.startswith(EMA) for name in tensors):
        found, missing = averaged(path, config, tensors)
        refuse(path, config.name, [f"missing {name}" for name in missing])
    found = {name: tensor for name, tensor in found.items() if name not in MARKS}
    return path, Part(found, f"{path.name}: {prefix}", naming.layout_of(part, found, True, is_v2(config)))


def read_vae(
    path: str | Path, config: VAEConfig = SD1.vae, dtype: torch.dtype = torch.float32, finite: bool = True
) -> VAE:
    """An autoencoder alone, to take the place of a model's own: `sd.vae = read_vae("vae-ft-mse-840000.safetensors")`.

    `path` is a file of an autoencoder or of a whole model, or a diffusers folder of either. CheckpointError lists what
    does not fit the config.
    """
    file, part = read_alone("vae", Path(path), replace(SD1, vae=config))
    with torch.device("meta"):
        vae = VAE(config)
    fitted = part.fit("vae", vae)
    refuse(file, "this autoencoder", [f"{kind} {name}{how}" for kind, name, how in fitted.problems])
    return fill(vae, fitted, dtype, finite, file)


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
        "_class_name": CHANNELS.get(config.unet.in_channels, CHANNELS[4]),
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
