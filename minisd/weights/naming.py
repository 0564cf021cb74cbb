"""Names of tensors: ours, those of single-file checkpoints, and those of diffusers' folders, side by side.

Single files carry the names of the code that Stable Diffusion was trained with (CompVis' latent diffusion, "LDM");
folders those of diffusers and transformers. The tables follow from a config; which of their rows a model has, its own
tensors say. In a table `*` stands for `weight` and `bias`, and behind a `|` stands a name that is read, never written.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import DepthConfig, TextConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names and shapes its tensors."""

    single: bool  # one file for all parts, in LDM's names; else a folder for each part, in diffusers' names
    v2: bool  # with OpenCLIP's text tower for OpenAI's, and with a Linear where v1 has a 1x1 convolution


class Row(NamedTuple):
    """One line of a table."""

    ours: str
    ldm: str
    diffusers: str
    convolved: str = ""  # who keeps our Linear as a 1x1 convolution: "ldm" or "both"
    third: int | None = None  # which third of the rows of LDM's matrix we have


@dataclass(frozen=True)
class Place:
    """Where a checkpoint keeps one of our tensors."""

    names: tuple[str, ...]  # the one to write, then others to read
    convolved: bool
    third: int | None

    def ours(self, theirs: Tensor) -> Tensor:
        """Our tensor, a view of the checkpoint's."""
        if self.third is not None and theirs.ndim and theirs.shape[0] % 3 == 0:
            theirs = theirs.chunk(3)[self.third]
        return theirs[..., 0, 0] if self.convolved and theirs.shape[2:] == (1, 1) else theirs


def under(prefix: tuple[str, str, str], rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a module inside another one, whose three names are given."""
    for row in rows:
        ours, ldm, diffusers = (
            "|".join(f"{p}.{name}" for name in n.split("|")) for p, n in zip(prefix, row[:3], strict=True)
        )
        yield row._replace(ours=ours, ldm=ldm, diffusers=diffusers)


def same(*names: str) -> list[Row]:
    """Rows of what all three call by one name."""
    return [Row(f"{name}.*", f"{name}.*", f"{name}.*") for name in names]


# The noise predictor

RESIDUAL = [
    Row("norm1.*", "in_layers.0.*", "norm1.*"),
    Row("conv1.*", "in_layers.2.*", "conv1.*"),
    Row("time.*", "emb_layers.1.*", "time_emb_proj.*"),
    Row("norm2.*", "out_layers.0.*", "norm2.*"),
    Row("conv2.*", "out_layers.3.*", "conv2.*"),
    Row("shortcut.*", "skip_connection.*", "conv_shortcut.*"),
]
ATTENTION = [
    Row("q.*", "to_q.*", "to_q.*"),
    Row("k.*", "to_k.*", "to_k.*"),
    Row("v.*", "to_v.*", "to_v.*"),
    Row("out.*", "to_out.0.*", "to_out.0.*"),
]
TRANSFORMER = [
    *same("norm1", "norm2", "norm3"),
    *under(("self_attention", "attn1", "attn1"), ATTENTION),
    *under(("cross_attention", "attn2", "attn2"), ATTENTION),
    Row("feed_forward.proj_in.*", "ff.net.0.proj.*", "ff.net.0.proj.*"),
    Row("feed_forward.proj_out.*", "ff.net.2.*", "ff.net.2.*"),
]


def unet_rows(config: UNetConfig, v2: bool) -> Iterator[Row]:
    """The table of the noise predictor. LDM counts on through all levels, diffusers anew in each."""
    transformer = [
        *same("norm"),
        *(row._replace(convolved="" if v2 else "both") for row in same("proj_in", "proj_out")),
        *under(("block", "transformer_blocks.0", "transformer_blocks.0"), TRANSFORMER),
    ]

    def block(ours: str, ldm: str, diffusers: str, number: int) -> Iterator[Row]:
        yield from under((f"{ours}.residual", f"{ldm}.0", f"{diffusers}.resnets.{number}"), RESIDUAL)
        yield from under((f"{ours}.transformer", f"{ldm}.1", f"{diffusers}.attentions.{number}"), transformer)

    yield Row("time_embed.0.*", "time_embed.0.*", "time_embedding.linear_1.*")
    yield Row("time_embed.2.*", "time_embed.2.*", "time_embedding.linear_2.*")
    yield Row("class_embed.*", "label_emb.*", "class_embedding.*")
    yield Row("conv_in.*", "input_blocks.0.0.*", "conv_in.*")

    levels, i = len(config.widths), 0
    for level in range(levels):
        for number in range(config.blocks):
            yield from block(f"down.{i}", f"input_blocks.{i + 1}", f"down_blocks.{level}", number)
            i += 1
        if level < levels - 1:
            yield Row(f"down.{i}.conv.*", f"input_blocks.{i + 1}.0.op.*", f"down_blocks.{level}.downsamplers.0.conv.*")
            i += 1

    yield from under(("middle.0.residual", "middle_block.0", "mid_block.resnets.0"), RESIDUAL)
    yield from under(("middle.0.transformer", "middle_block.1", "mid_block.attentions.0"), transformer)
    yield from under(("middle.1.residual", "middle_block.2", "mid_block.resnets.1"), RESIDUAL)

    i = j = 0  # LDM puts the doubling into the last block of its level
    for up, level in enumerate(reversed(range(levels))):
        for number in range(config.blocks + 1):
            yield from block(f"up.{i}", f"output_blocks.{j}", f"up_blocks.{up}", number)
            i, j = i + 1, j + 1
        if level:
            ldm = f"output_blocks.{j - 1}.{2 if config.attention[level] else 1}.conv.*"
            yield Row(f"up.{i}.conv.*", ldm, f"up_blocks.{up}.upsamplers.0.conv.*")
            i += 1

    yield Row("norm_out.*", "out.0.*", "conv_norm_out.*")
    yield Row("conv_out.*", "out.2.*", "conv_out.*")


# The autoencoder

VAE_RESIDUAL = [*same("norm1", "conv1", "norm2", "conv2"), Row("shortcut.*", "nin_shortcut.*", "conv_shortcut.*")]
PIXEL_ATTENTION = [
    Row("norm.*", "norm.*|group_norm.*", "group_norm.*"),  # converters have put both of diffusers' names beside LDM's
    Row("attention.q.*", "q.*|to_q.*|query.*", "to_q.*|query.*", convolved="ldm"),
    Row("attention.k.*", "k.*|to_k.*|key.*", "to_k.*|key.*", convolved="ldm"),
    Row("attention.v.*", "v.*|to_v.*|value.*", "to_v.*|value.*", convolved="ldm"),
    Row("attention.out.*", "proj_out.*|to_out.0.*|proj_attn.*", "to_out.0.*|proj_attn.*", convolved="ldm"),
]
VAE_ENDS = [
    *same("conv_in", "conv_out"),
    Row("norm_out.*", "norm_out.*", "conv_norm_out.*"),
    *under(("middle.0", "mid.block_1", "mid_block.resnets.0"), VAE_RESIDUAL),
    *under(("middle.1", "mid.attn_1", "mid_block.attentions.0"), PIXEL_ATTENTION),
    *under(("middle.2", "mid.block_2", "mid_block.resnets.1"), VAE_RESIDUAL),
]


def vae_rows(config: VAEConfig, v2: bool) -> Iterator[Row]:
    """The table of the autoencoder, of both versions. LDM counts levels from the finest, also on the way up."""
    yield Row("quant.*", "quant_conv.*", "quant_conv.*")
    yield Row("post_quant.*", "post_quant_conv.*", "post_quant_conv.*")
    levels = range(len(config.widths))
    for half, way, order, blocks in (
        ("encoder", "down", levels, config.blocks),
        ("decoder", "up", reversed(levels), config.blocks + 1),
    ):
        yield from under((half, half, half), VAE_ENDS)
        i = 0
        for theirs, level in enumerate(order):
            ldm, diffusers = f"{half}.{way}.{level}", f"{half}.{way}_blocks.{theirs}"
            for number in range(blocks):
                names = f"{half}.{way}.{i}", f"{ldm}.block.{number}", f"{diffusers}.resnets.{number}"
                yield from under(names, VAE_RESIDUAL)
                i += 1
            if theirs < levels[-1]:
                sampler = f"{diffusers}.{way}samplers.0.conv.*"
                yield Row(f"{half}.{way}.{i}.conv.*", f"{ldm}.{way}sample.conv.*", sampler)
                i += 1


# The text tower: v1's single files carry it in transformers' names, v2's in OpenCLIP's

TEXT_ENDS = [  # ours, OpenCLIP's, transformers'
    Row("token_embedding.weight", "token_embedding.weight", "embeddings.token_embedding.weight"),
    Row("position_embedding.weight", "positional_embedding", "embeddings.position_embedding.weight"),
    Row("final_norm.*", "ln_final.*", "final_layer_norm.*"),
]
TEXT_BLOCK = [
    Row("norm1.*", "ln_1.*", "layer_norm1.*"),
    Row("attention.q.*", "attn.in_proj_*", "self_attn.q_proj.*", third=0),
    Row("attention.k.*", "attn.in_proj_*", "self_attn.k_proj.*", third=1),
    Row("attention.v.*", "attn.in_proj_*", "self_attn.v_proj.*", third=2),
    Row("attention.out.*", "attn.out_proj.*", "self_attn.out_proj.*"),
    Row("norm2.*", "ln_2.*", "layer_norm2.*"),
    Row("mlp_in.*", "mlp.c_fc.*", "mlp.fc1.*"),
    Row("mlp_out.*", "mlp.c_proj.*", "mlp.fc2.*"),
]


def text_rows(config: TextConfig, v2: bool) -> Iterator[Row]:
    """The table of the text tower. Some tools leave out `text_model.`, some write it; some put `model.` before all."""
    rows = list(TEXT_ENDS)
    for i in range(config.layers):
        rows += under((f"blocks.{i}", f"transformer.resblocks.{i}", f"encoder.layers.{i}"), TEXT_BLOCK)
    for ours, openclip, transformers, _, third in rows:
        names = f"text_model.{transformers}|{transformers}"
        if v2:
            yield Row(ours, f"model.{openclip}", names, third=third)
        else:
            both = ("transformer.", "model.transformer.")
            yield Row(ours, "|".join(f"{prefix}{name}" for prefix in both for name in names.split("|")), names)


# The depth estimator

BOTTLENECK = [  # ours, and the number that both others count the convolution by
    *((f"reduce.{kind}", f"{kind}1") for kind in ("conv", "norm")),
    *((f"mix.{kind}", f"{kind}2") for kind in ("conv", "norm")),
    *((f"expand.{kind}", f"{kind}3") for kind in ("conv", "norm")),
    *((f"shortcut.{kind}", f"downsample.{kind}") for kind in ("conv", "norm")),
]
VIT_BLOCK = [
    Row("norm1.*", "norm1.*", "layernorm_before.*"),
    Row("attention.q.*", "attn.qkv.*", "attention.attention.query.*", third=0),
    Row("attention.k.*", "attn.qkv.*", "attention.attention.key.*", third=1),
    Row("attention.v.*", "attn.qkv.*", "attention.attention.value.*", third=2),
    Row("attention.out.*", "attn.proj.*", "attention.output.dense.*"),
    Row("norm2.*", "norm2.*", "layernorm_after.*"),
    Row("mlp_in.*", "mlp.fc1.*", "intermediate.dense.*"),
    Row("mlp_out.*", "mlp.fc2.*", "output.dense.*"),
]
CONV_UNITS = [
    Row(f"unit{u}.conv{c}.*", f"resConfUnit{u}.conv{c}.*", f"residual_layer{u}.convolution{c}.*")
    for u in (1, 2)
    for c in (1, 2)
]


def depth_rows(config: DepthConfig, v2: bool) -> Iterator[Row]:
    """The table of the depth estimator, of v2 alone. The ladder's rungs are counted from the finest, and back."""
    backbone, bit = "pretrained.model.patch_embed.backbone", "dpt.embeddings.backbone.bit"
    yield Row("resnet.stem.conv.*", f"{backbone}.stem.conv.*", f"{bit}.embedder.convolution.*")
    yield Row("resnet.stem.norm.*", f"{backbone}.stem.norm.*", f"{bit}.embedder.norm.*")
    for stage, blocks in enumerate(config.blocks):
        for block in range(blocks):
            ldm, dpt = f"{backbone}.stages.{stage}.blocks.{block}", f"{bit}.encoder.stages.{stage}.layers.{block}"
            for ours, theirs in BOTTLENECK:
                yield Row(f"resnet.stages.{stage}.{block}.{ours}.*", f"{ldm}.{theirs}.*", f"{dpt}.{theirs}.*")

    yield Row("vit.proj_in.*", "pretrained.model.patch_embed.proj.*", "dpt.embeddings.projection.*")
    yield Row("vit.class_token", "pretrained.model.cls_token", "dpt.embeddings.cls_token")
    yield Row("vit.positions", "pretrained.model.pos_embed", "dpt.embeddings.position_embeddings")
    for i in range(config.taps[-1] + 1):
        yield from under((f"vit.blocks.{i}", f"pretrained.model.blocks.{i}", f"dpt.encoder.layer.{i}"), VIT_BLOCK)

    for i in range(2):
        ldm, neck = f"pretrained.act_postprocess{i + 3}", "neck.reassemble_stage"
        yield Row(f"reassemble.{i}.readout.*", f"{ldm}.0.project.0.*", f"{neck}.readout_projects.{i + 2}.0.*")
        yield Row(f"reassemble.{i}.proj_out.*", f"{ldm}.3.*", f"{neck}.layers.{i + 2}.projection.*")
        yield Row(f"reassemble.{i}.halve.*", f"{ldm}.4.*", f"{neck}.layers.{i + 2}.resize.*")
    for i in range(4):
        ldm, fusion = f"scratch.refinenet{i + 1}", f"neck.fusion_stage.layers.{3 - i}"
        yield Row(f"ladder.{i}.proj_in.*", f"scratch.layer{i + 1}_rn.*", f"neck.convs.{i}.*")
        yield from under((f"ladder.{i}", ldm, fusion), CONV_UNITS)
        yield Row(f"ladder.{i}.proj_out.*", f"{ldm}.out_conv.*", f"{fusion}.projection.*")
    for i in (0, 2, 4):
        yield Row(f"head.{i}.*", f"scratch.output_conv.{i}.*", f"head.head.{i}.*")


# Tables at work

ROWS: dict[str, Callable[..., Iterator[Row]]] = {
    "unet": unet_rows,
    "vae": vae_rows,
    "text": text_rows,
    "depth": depth_rows,
}
PREFIXES = {  # of a part's tensors in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.",
    "depth": "depth_model.model.",
}
EMA = "model_ema.diffusion_model"  # before the names of the averaged U-Net, which have lost their dots

UNUSED = {  # what files carry and nothing here needs: by part, and beside the parts of a single file
    "unet": r"(?!)",
    "vae": r"(loss|model_ema)\..+",
    "text": r"((model\.)?transformer\.)?(text_model\.)?embeddings\.position_ids"
    r"|((model\.)?transformer\.|model\.)?(text_projection(\.weight)?|logit_scale)",
    "depth": r"pretrained\.model\.(norm|head)\..+|scratch\.refinenet4\.resConfUnit1\..+"  # its classifier; a unit
    r"|dpt\.layernorm\..+|neck\.fusion_stage\.layers\.0\.residual_layer1\..+",  # that has nothing to add to
    "": r"(sqrt_(one_minus_|recip_|recipm1_)?|log_one_minus_)?alphas_cumprod(_prev)?|betas|logvar|v_pred|ztsnr"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|(model_ema|low_scale_model)\..+",
}


def unused(part: str, name: str, layers: int) -> bool:
    """Whether a tensor may be left aside; so may v2's last block, of number `layers`, whose result nobody reads."""
    last = rf"(model\.)?transformer\.(resblocks|(text_model\.)?encoder\.layers)\.{layers}\..+"
    return re.fullmatch(UNUSED[part], name) is not None or (part == "text" and re.fullmatch(last, name) is not None)


def layout_of(part: str, names: Iterable[str], single: bool, v2: bool) -> Layout:
    """How a part is named, by its own names: single files carry parts in diffusers' names, too, and v2's text tower
    in transformers'.
    """
    if part == "text":
        return Layout(single, v2 and not (single and any(".layers." in name for name in names)))
    return Layout(single and not any(re.search(r"(down|up|mid)_blocks?\.|^dpt\.", name) for name in names), v2)


def places(part: str, module: nn.Module, layout: Layout) -> dict[str, Place]:
    """Where a checkpoint keeps each tensor of a part of a model: `unet`, `vae`, `text` or `depth`."""
    table = {}
    for row in ROWS[part](module.config, layout.v2):
        theirs = row.ldm if layout.single else row.diffusers
        convolved = row.convolved == "both" or (row.convolved == "ldm" and layout.single)
        for leaf in ("weight", "bias"):
            names = tuple(name.replace("*", leaf) for name in theirs.split("|"))
            table[row.ours.replace("*", leaf)] = Place(names, convolved, row.third if layout.single else None)
    return {name: table[name] for name in module.state_dict()}


def read(wanted: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ours that a checkpoint has, views of its own, and the name that each of them has there."""
    sources = {ours: name for ours, place in wanted.items() for name in reversed(place.names) if name in tensors}
    return {ours: wanted[ours].ours(tensors[name]) for ours, name in sources.items()}, sources


def write(wanted: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as a checkpoint keeps them: the reverse of `read`."""
    pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for ours, place in wanted.items():
        tensor = tensors[ours]
        convolved = place.convolved and tensor.ndim == 2
        pieces[place.names[0]][place.third or 0] = tensor[:, :, None, None] if convolved else tensor
    return {name: torch.cat([p[i] for i in sorted(p)]) if len(p) > 1 else p[0] for name, p in pieces.items()}
