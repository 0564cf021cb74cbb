"""Names and shapes of the published checkpoints, all on `meta`: every tensor has its place, both ways."""

import functools
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from minisd import config
from minisd.clip import EncoderBlock, TextTower
from minisd.config import TextConfig
from minisd.vae import VAE
from minisd.weights import CheckpointError, diffusers, empty_parts
from minisd.weights.checkpoints import fit, recognise
from minisd.weights.naming import EMA, PREFIXES, Layout, places, read, unused, write

FIXTURE = Path(__file__).parent / "fixtures" / "manifests.json.gz"
MANIFESTS = json.loads(gzip.decompress(FIXTURE.read_bytes()))
SINGLE = {  # the config that a single file must be told to have
    "sd15_ldm": config.SD1,
    "sd15_inpainting_ldm": config.SD1_INPAINT,
    "sd2_base_ldm": config.SD2,
    "sd2_768v_ldm": config.SD2,  # a probe of the numbers tells it from the one above
    "sd2_inpainting_ldm": config.SD2_INPAINT,
    "sd2_depth_ldm": config.SD2_DEPTH,
    "sd_x4_upscaler_ldm": config.SD_X4,
}
FOLDERS = {
    "sd15_diffusers_unet": ("unet", config.SD1),
    "sd15_inpainting_diffusers_unet": ("unet", config.SD1_INPAINT),
    "sd15_diffusers_text_encoder": ("text", config.SD1),
    "sd_diffusers_vae": ("vae", config.SD1),
    "sd2_diffusers_unet": ("unet", config.SD2),
    "sd2_inpainting_diffusers_unet": ("unet", config.SD2_INPAINT),
    "sd2_depth_diffusers_unet": ("unet", config.SD2_DEPTH),
    "sd2_diffusers_text_encoder": ("text", config.SD2),
    "sd_x4_diffusers_unet": ("unet", config.SD_X4),
    "sd_x4_diffusers_vae": ("vae", config.SD_X4),
}


def manifest(name):
    return {tensor: torch.empty(shape, device="meta") for tensor, shape in MANIFESTS["shapes"][name].items()}


empty = functools.cache(empty_parts)  # building a full-size network on `meta` takes a while


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_is_told_and_read_whole(name):
    tensors = manifest(name)
    checkpoint = recognise(Path(name), tensors, {})
    assert checkpoint.config is SINGLE[name] and not checkpoint.notes
    assert checkpoint.untold == (name != "sd_x4_upscaler_ldm")
    for part, module in empty(checkpoint.config, "").items():
        found = checkpoint.parts[part].fit(part, module)
        assert found.problems == [] and shapes(found.tensors) == shapes(module.state_dict())


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_is_written_as_it_was(name):
    model = SINGLE[name]
    written = {}
    for part, module in empty(model, "").items():
        theirs = write(places(part, module, Layout(True, diffusers.is_v2(model))), module.state_dict())
        written |= {PREFIXES[part] + tensor: t for tensor, t in theirs.items()}
    published = MANIFESTS["shapes"][name]
    layers = model.text.layers
    left = {  # what may be left aside: schedules, v2's last block and its like; nothing that is written
        tensor
        for tensor in published
        if any(
            unused(part, tensor[len(p) :], layers) for part, p in [*PREFIXES.items(), ("", "")] if tensor[: len(p)] == p
        )
    }
    assert shapes(written) == {tensor: shape for tensor, shape in published.items() if tensor not in left}
    depth, low, last = 8, 8, 12 + 2  # dead ones of the depth estimator, the upscaler's second schedule, the 24th block
    expected = {"sd15": 13, "sd2_": 12 + last, "sd_x": 12 + last + low}[name[:4]] + ("depth" in name) * depth
    assert len(left) == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_a_part_of_a_folder_is_read_and_written_whole(name):
    part, model = FOLDERS[name]
    module, layout = empty(model, "")[part], Layout(False, diffusers.is_v2(model))
    found = fit(part, module, layout, manifest(name))
    assert found.problems == [] and shapes(found.tensors) == shapes(module.state_dict())
    published = MANIFESTS["shapes"][name]
    theirs = shapes(write(places(part, module, layout), module.state_dict()))
    assert theirs == {tensor: shape for tensor, shape in published.items() if not tensor.endswith("position_ids")}


@pytest.mark.parametrize(
    "pairs, part, model",
    [
        ("sd15_unet", "unet", config.SD1),
        ("sd2_unet", "unet", config.SD2),
        ("x4_unet", "unet", config.SD_X4),
        ("vae", "vae", config.SD1),
        ("x4_vae", "vae", config.SD_X4),
    ],
)
def test_the_two_layouts_pair_up_as_the_published_converter_pairs_them(pairs, part, model):
    """The names alone could be swapped between tensors of one shape; this map says which is which."""
    module = empty(model, "")[part]
    single, folder = (places(part, module, Layout(kind, diffusers.is_v2(model))) for kind in (True, False))
    ours = {folder[name].names[0]: PREFIXES[part] + single[name].names[0] for name in module.state_dict()}
    assert ours == MANIFESTS["keymap"][pairs]


def test_openclips_stacked_attention_is_cut_into_the_right_thirds():
    """PyTorch's own MultiheadAttention, which OpenCLIP is made of, with causal mask."""
    torch.manual_seed(0)
    theirs, block = nn.MultiheadAttention(16, 2, batch_first=True), EncoderBlock(16, 2, quick=False)
    nn.init.normal_(theirs.in_proj_bias)
    text = TextTower(TextConfig(vocabulary=20, width=16, layers=1, heads=2, quick_gelu=False))
    wanted = places("text", text, Layout(True, v2=True))
    state = {f"model.transformer.resblocks.0.attn.{name}": t for name, t in theirs.state_dict().items()}
    found, _ = read(wanted, state)
    block.attention.load_state_dict({name.removeprefix("blocks.0.attention."): t for name, t in found.items()})
    x, mask = torch.randn(2, 7, 16), torch.ones(7, 7).triu(1).bool()
    difference = block.attention(x, causal=True) - theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert difference.abs().max() < 2e-6


def test_names_that_have_been_in_use_are_read_too():
    vae, text = VAE(config.VAEConfig(widths=(8,), groups=2)), TextTower(TextConfig(20, 8, 1, 2))
    folder = Layout(single=False, v2=False)
    theirs = write(places("vae", vae, folder), vae.state_dict())
    old = {}
    for name, tensor in theirs.items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, was)
        old[name] = tensor
    assert len(set(old) - set(theirs)) == 16
    found = fit("vae", vae, folder, old | {"loss.logvar": torch.zeros(1)})
    assert not found.problems and found.aside == ["loss.logvar"]
    assert all(torch.equal(found.tensors[name], t) for name, t in vae.state_dict().items())
    for layout in (folder, Layout(single=True, v2=False)):
        theirs = write(places("text", text, layout), text.state_dict())
        short = {name.replace("text_model.", ""): tensor for name, tensor in theirs.items()}
        assert not set(short) & set(theirs)
        assert fit("text", text, layout, short).problems == []


def test_averages_are_preferred_and_all_of_them_needed():
    tensors = manifest("sd15_ldm")
    unet = [name for name in tensors if name.startswith(PREFIXES["unet"])]
    averaged = {EMA + name.removeprefix(PREFIXES["unet"]).replace(".", ""): tensors[name] for name in unet}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averaged
    whole = tensors | averaged | {"model_ema.decay": torch.zeros(())}
    checkpoint = recognise(Path("full.ckpt"), whole, {})
    assert all(
        checkpoint.parts["unet"].tensors[n.removeprefix(PREFIXES["unet"])] is averaged[a]
        for n, a in zip(unet, averaged, strict=True)
    )
    assert "running average" in checkpoint.notes[0]
    del whole["model_ema.diffusion_modelinput_blocks00weight"]
    with pytest.raises(CheckpointError, match="missing model_ema"):
        recognise(Path("full.ckpt"), whole, {})


def test_everything_that_does_not_fit_is_said_in_the_files_own_names():
    tensors = manifest("sd2_base_ldm")
    for i in range(12):
        tensors.pop(f"cond_stage_model.model.transformer.resblocks.{i}.mlp.c_fc.weight")
    tensors["first_stage_model.quant_conv.weight"] = torch.empty(8, 9, 1, 1, device="meta")
    tensors["model.diffusion_model.more"] = torch.empty(1, device="meta")
    with pytest.raises(CheckpointError) as error:
        recognise(Path("broken.ckpt"), tensors, {}).load(torch.float32, finite=True)
    said = str(error.value)
    assert "broken.ckpt" in said and "Stable Diffusion v2" in said
    assert "missing cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight" in said and "and 4 more" in said
    tensors["one_too_many"] = torch.empty(1, device="meta")
    with pytest.raises(CheckpointError, match="unexpected one_too_many"):
        recognise(Path("broken.ckpt"), tensors, {})


@pytest.mark.parametrize(
    "part, theirs",
    [
        ("unet", "output_blocks.5.2.conv.weight"),
        ("vae", "decoder.mid.attn_1.q.weight"),
        ("text", "model.positional_embedding"),
    ],
)
def test_one_missing_one_more_and_one_of_another_shape_are_found_in_each_part(part, theirs):
    module = empty(config.SD2, "")[part]
    layout = Layout(single=True, v2=True)
    tensors = write(places(part, module, layout), module.state_dict())
    assert fit(part, module, layout, tensors).problems == []
    assert fit(part, module, layout, {n: t for n, t in tensors.items() if n != theirs}).problems == [
        ("missing", theirs, "")
    ]
    assert fit(part, module, layout, tensors | {"x.y": tensors[theirs]}).problems == [("unexpected", "x.y", "")]
    ((kind, name, _),) = fit(part, module, layout, tensors | {theirs: torch.empty(3, 5, device="meta")}).problems
    assert (kind, name) == ("wrong shape:", theirs)


CONFIGS = {
    "sd15_unet": config.SD1,
    "sd15_inpainting_unet": config.SD1_INPAINT,
    "sd2_unet": config.SD2,
    "sd2_inpainting_unet": config.SD2_INPAINT,
    "sd2_depth_unet": config.SD2_DEPTH,
    "x4_unet": config.SD_X4,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_read_as_our_presets(name):
    model = CONFIGS[name]
    files = json.loads(json.dumps(diffusers.to_diffusers(model)))
    assert diffusers.from_diffusers(model.name, files) == replace(model, guidance=7.5)
    files["unet"] = MANIFESTS["configs"][name]
    files["vae"] = MANIFESTS["configs"]["x4_vae" if "x4" in name else "sd_vae"]
    told = diffusers.from_diffusers("its name", files)
    assert (told.unet, told.vae, told.text, told.size) == (model.unet, model.vae, model.text, 512)
    with pytest.raises(ValueError, match="addition_embed_type 'text_time'"):
        diffusers.from_diffusers("xl", files | {"unet": files["unet"] | {"addition_embed_type": "text_time"}})
