"""Published checkpoints, small ones with random weights: told, read and written in every layout."""

import contextlib
import gc
import io
import itertools
import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import randomise

import minisd
from minisd import __main__ as command_line
from minisd import samplers, schedule, weights
from minisd.config import DepthConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.weights import CheckpointError, checkpoints, empty_parts, read_tensors, save_tensors
from minisd.weights.checkpoints import open_checkpoint, read_parts, read_vae, write_folder, write_single
from minisd.weights.naming import EMA, PREFIXES
from minisd.weights.tensors import is_finite

UNET = UNetConfig(widths=(16, 32), blocks=1, attention=(True, False), heads=2, context_dim=16, groups=4)
UNET2 = replace(UNET, heads=None, head_dim=8, context_dim=24)
V1 = ModelConfig(
    name="small v1",
    unet=UNET,
    vae=VAEConfig(widths=(8, 16), blocks=1, groups=2),
    text=TextConfig(vocabulary=514, width=16, layers=2, heads=2),
)
V2 = replace(
    V1,
    name="small v2",
    unet=UNET2,
    text=TextConfig(vocabulary=514, width=24, layers=2, heads=2, quick_gelu=False, pad="zero"),
)
X4 = replace(
    V2,
    name="small x4",
    prediction="v",
    schedule=replace(V2.schedule, ends=(1e-4, 0.02)),
    unet=UNetConfig(7, 4, (16, 32), 1, (False, True), 4, None, 24, groups=4, cross_only=1, classes=10),
)
DEPTH = DepthConfig(64, 16, (32, 64, 96), (1, 1, 2), groups=4, width=32, heads=4, taps=(1, 2), fusion=16)
FAMILIES = {
    (16, 4): V1,
    (16, 9): replace(V1, name="small v1 inpainting", unet=replace(UNET, in_channels=9)),
    (24, 4): V2,
    (24, 9): replace(V2, name="small v2 inpainting", unet=replace(UNET2, in_channels=9)),
    (24, 5): replace(V2, name="small v2 depth", unet=replace(UNET2, in_channels=5), depth=DEPTH),
    (24, 7): X4,
}
each_family = pytest.mark.parametrize("model", FAMILIES.values(), ids=[m.name for m in FAMILIES.values()])


@pytest.fixture(autouse=True)
def small_families(monkeypatch):
    """The published families, made small; their tokenizer is CLIP's without a merge."""
    monkeypatch.setattr(checkpoints, "FAMILIES", FAMILIES)
    monkeypatch.setattr(checkpoints, "SD2", V2)
    monkeypatch.setattr(checkpoints, "SD2_V", replace(V2, name="small v2 v", prediction="v"))


def made(model):
    parts = empty_parts(model, "")
    filled = {name: randomise(part.to_empty(device="cpu"), i) for i, (name, part) in enumerate(parts.items())}
    return {"config": model, "tokenizer": Tokenizer([], pad=model.text.pad), **filled}


def networks(parts):
    """Names of all parts that hold weights."""
    return [name for name, part in parts.items() if isinstance(part, torch.nn.Module)]


def assert_same(read, parts, cast=lambda tensor: tensor):
    assert networks(read) == networks(parts)
    assert read["tokenizer"].tokens == parts["tokenizer"].tokens and read["tokenizer"].pad == parts["tokenizer"].pad
    for part in networks(parts):
        own, back = parts[part].state_dict(), read[part].state_dict()
        assert list(own) == list(back)
        assert all(torch.equal(back[name], cast(tensor)) for name, tensor in own.items())
        assert not read[part].training and not any(p.requires_grad for p in read[part].parameters())


def quietly(path, **options):
    """Read with nothing to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_parts(path, **options)


@each_family
def test_each_family_comes_back_from_a_single_file(model, tmp_path):
    parts, path = made(model), tmp_path / "x.safetensors"
    write_single(parts, path, torch.float32)
    read = quietly(path)
    assert read["config"] == model
    assert_same(read, parts)
    with pytest.raises(FileExistsError, match=r"x\.safetensors"):
        write_single(parts, path)
    torch.save({"state_dict": read_tensors(path), "epoch": 1}, tmp_path / "x.ckpt")  # says nothing of its config
    if model is V2:
        with pytest.warns(UserWarning, match="does not say what its U-Net predicts; a probe says eps"):
            read = read_parts(tmp_path / "x.ckpt")
    else:
        read = quietly(tmp_path / "x.ckpt")
    assert read["config"] is model
    assert_same(read, parts)


@each_family
def test_each_family_comes_back_from_a_folder(model, tmp_path):
    parts, folder = made(model), tmp_path / "model"
    write_folder(parts, folder, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert quietly(folder)["config"] == model
    with pytest.raises(FileExistsError, match="model"):
        write_folder(parts, folder)
    (folder / "config.json").unlink()  # ours; then diffusers' own files say what it is
    read = quietly(folder)
    assert read["config"] == model
    assert_same(read, parts)


def test_a_folder_of_bin_files_of_halves_or_of_shards_is_the_same(tmp_path):
    parts, folder = made(V1), tmp_path / "model"
    write_folder(parts, folder)
    for name in ("unet", "vae"):
        whole = folder / name / "diffusion_pytorch_model.safetensors"
        torch.save(read_tensors(whole), folder / name / "diffusion_pytorch_model.bin")
        whole.unlink()
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    assert_same(quietly(folder), parts, lambda tensor: tensor.half().float())
    assert_same(quietly(folder, dtype=torch.float16), parts, torch.Tensor.half)
    bin_file = folder / "unet" / "diffusion_pytorch_model.bin"
    tensors = list(read_tensors(bin_file).items())
    for i in range(2):
        save_tensors(folder / "unet" / f"{i}.safetensors", dict(tensors[i::2]))
    index = {name: f"{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)}
    bin_file.unlink()
    with pytest.raises(CheckpointError, match=r"unet has no weights; looked for diffusion_pytorch_model\.safetensors"):
        read_parts(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(quietly(folder), parts, lambda tensor: tensor.half().float())


def test_half_precision_stays_in_the_file(tmp_path):
    """No tensor of v1 or v2 is copied: not the stacked attention, not the convolutions."""
    for model in (V1, V2):
        path = tmp_path / f"{model.name}.safetensors"
        write_single(made(model), path)
        read = read_parts(path, torch.float16)
        storages = {t.untyped_storage().data_ptr() for part in networks(read) for t in read[part].state_dict().values()}
        assert len(storages) == 1


def named(parts, tmp_path):
    """The tensors of a single file, under the names it has for them."""
    write_single(parts, tmp_path / "named.safetensors", torch.float32)
    return read_tensors(tmp_path / "named.safetensors")


def named_again(parts, tmp_path):
    (tmp_path / "named.safetensors").unlink(missing_ok=True)
    return named(parts, tmp_path)


@pytest.fixture(scope="module")
def v1_folder(tmp_path_factory):
    """A folder that diffusers could have made: nothing of ours in it."""
    folder = tmp_path_factory.mktemp("v1") / "model"
    write_folder(made(V1), folder)
    (folder / "config.json").unlink()
    return folder


def test_averages_go_before_the_last_step_and_that_is_said(tmp_path):
    parts, other = made(V1), made(replace(V1, name="other"))
    randomise(other["unet"], seed=9)
    tensors = named(parts, tmp_path)
    (tmp_path / "named.safetensors").unlink()
    averaged = {
        EMA + name.removeprefix(PREFIXES["unet"]).replace(".", ""): tensor
        for name, tensor in named(other, tmp_path).items()
        if name.startswith(PREFIXES["unet"])
    }
    torch.save({"state_dict": tensors | averaged | {"model_ema.decay": torch.tensor(0.9999)}}, tmp_path / "full.ckpt")
    with pytest.warns(UserWarning, match=r"full\.ckpt.*running average"):
        read = read_parts(tmp_path / "full.ckpt")
    assert_same(read, parts | {"unet": other["unet"]})


def test_numbers_of_several_precisions_are_converted_and_that_is_said(tmp_path):
    parts = made(V1)
    mixed = {
        name: t.to(torch.float8_e4m3fn) if "diffusion" in name else t.bfloat16() if "encoder" in name else t
        for name, t in named(parts, tmp_path).items()
    }
    torch.save({n: t for n, t in mixed.items() if "diffusion" not in n}, tmp_path / "x.ckpt")
    import safetensors.torch

    safetensors.torch.save_file(mixed, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning) as said:
        read = read_parts(tmp_path / "x.safetensors")
    told = " ".join(str(w.message) for w in said)
    assert "unet are float8_e4m3fn" in told and "vae are bfloat16 and float32" in told
    assert all(t.dtype == torch.float32 for part in networks(read) for t in read[part].state_dict().values())
    back, own = read["unet"].conv_in.weight, parts["unet"].conv_in.weight
    assert torch.equal(back, own.to(torch.float8_e4m3fn).float())


def test_the_probe_tells_eps_from_v():
    unet = randomise(UNet(UNET2))
    with torch.no_grad():
        for bias, v in ((0.5, False), (-0.4, False), (-0.6, True)):  # out - x is bias - 0.5
            unet.conv_out.weight.zero_()
            unet.conv_out.bias.fill_(bias)
            assert checkpoints.predicts_v(unet) == v
            assert checkpoints.predicts_v(unet.half()) == v
            unet.float()


def test_a_v_model_is_told_by_its_probe(tmp_path):
    parts = made(V2)
    with torch.no_grad():
        parts["unet"].conv_out.bias.fill_(-3)
    torch.save(named(parts, tmp_path), tmp_path / "x.ckpt")
    assert open_checkpoint(tmp_path / "x.ckpt").untold
    with pytest.warns(UserWarning, match="a probe says v"):
        assert read_parts(tmp_path / "x.ckpt")["config"] == checkpoints.SD2_V


OTHERS = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)},
    "a LoRA:": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 320)},
    "a LoRA: ": {"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (4, 320)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a ControlNet,": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "a textual inversion": {"emb_params": (2, 768)},
    "a textual inversion:": {"<cat-toy>": (768,)},
    "a textual inversion: ": {"string_to_param.*": (3, 1024)},
    "Stable Diffusion XL": {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)},
    "Stable Diffusion XL,": {"clip_g": (2, 1280), "clip_l": (2, 768)},
    "Stable Diffusion 3 or FLUX": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "an autoencoder alone; read_vae": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "an autoencoder alone; ": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "one part of a diffusers folder": {"time_embedding.linear_1.weight": (1280, 320)},
    "no U-Net of Stable Diffusion; .* begins with a, b, c": dict.fromkeys("abcd", (1,)),
    "begins with no tensor": {},
    "a LoRA, of old names": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up": (4,)},
    "a hypernetwork": {"320.0.linear.0.weight": (640, 320)},
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768)},
    "a motion module": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
    "a U-Net alone, without text tower": {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a U-Net alone, ": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a U-Net alone": {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
    "a U-Net alone, with": {EMA + "input_blocks00weight": (320, 4, 3, 3)},
    "context 2048 wide and 4 input channels; known are 16 and 4: small v1": {
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (2048,),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 2048),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    },
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_that_are_no_model_are_called_by_their_name(tmp_path, what):
    what, tensors = what.removesuffix(", of old names"), OTHERS[what]
    save_tensors(tmp_path / "x.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=what) as error:
        read_parts(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)


def test_a_hypernetwork_of_the_web_ui_is_told(tmp_path):
    layers = [{"linear.0.weight": torch.ones(4, 2)}, {"linear.0.weight": torch.ones(4, 2)}]
    torch.save({320: layers, 768: layers, "step": 5, "name": "x"}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a hypernetwork"):
        read_parts(tmp_path / "x.pt")


def test_a_file_with_the_running_average_alone_is_read(tmp_path):
    parts = made(V1)
    tensors = {
        EMA + name.removeprefix(PREFIXES["unet"]).replace(".", "") if name.startswith(PREFIXES["unet"]) else name: t
        for name, t in named(parts, tmp_path).items()
    }
    torch.save(tensors, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="running average"):
        assert_same(read_parts(tmp_path / "x.ckpt"), parts)


@pytest.mark.parametrize("form", ["model.diffusion_model.", "diffusion_model.", "", "average", "diffusers", "folder"])
def test_another_u_net_takes_the_place_of_a_models_own(form, tmp_path):
    base, other = made(V1), made(V1)
    randomise(other["unet"], seed=9)
    write_single(base, tmp_path / "base.safetensors", torch.float32)
    prefix = PREFIXES["unet"]
    tensors = {n.removeprefix(prefix): t for n, t in named(other, tmp_path).items() if n.startswith(prefix)}
    path = tmp_path / "unet.ckpt"
    if form == "average":
        torch.save({EMA + name.replace(".", ""): t for name, t in tensors.items()}, path)
    elif form in ("diffusers", "folder"):
        write_folder(other, tmp_path / "folder", torch.float32)
        path = tmp_path / "folder" / "unet"
        path = path if form == "folder" else path / "diffusion_pytorch_model.safetensors"
    else:
        torch.save({form + name: t for name, t in tensors.items()}, path)
    assert_same(quietly(tmp_path / "base.safetensors", unet=path), base | {"unet": other["unet"]})


def test_another_u_net_says_what_it_predicts_and_must_fit(tmp_path):
    write_single(made(V1), tmp_path / "base.safetensors")
    bare = {n.removeprefix(PREFIXES["unet"]): t for n, t in named(made(V1), tmp_path).items() if "diffusion" in n}
    torch.save(bare | {"v_pred": torch.zeros(0)}, tmp_path / "x.ckpt")
    assert quietly(tmp_path / "base.safetensors", unet=tmp_path / "x.ckpt")["config"].prediction == "v"
    torch.save(bare | {"out.2.bias": torch.full((4,), -3.0)}, tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="a probe says v"):
        assert read_parts(tmp_path / "base.safetensors", unet=tmp_path / "x.ckpt")["config"].prediction == "v"
    torch.save(bare | {"out.2.bias": torch.zeros(5)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"wrong shape: x\.ckpt: out\.2\.bias"):
        read_parts(tmp_path / "base.safetensors", unet=tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="a folder of minisd"):
        read_parts(weights.resolve(None), unet=tmp_path / "x.ckpt")


def test_v2_is_read_with_its_text_tower_in_the_names_of_transformers(tmp_path):
    """As some converters write it, and with the buffer that diffusers' own leaves under v2's prefix."""
    parts = made(V2)
    tensors = {n: t for n, t in named(parts, tmp_path).items() if not n.startswith(PREFIXES["text"])}
    write_folder(parts, tmp_path / "folder", torch.float32)
    text = read_tensors(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    for prefix in ("transformer.", "model.transformer."):
        theirs = {f"{PREFIXES['text']}{prefix}{name}": tensor for name, tensor in text.items()}
        torch.save(tensors | theirs, tmp_path / "x.ckpt")
        assert_same(read_parts(tmp_path / "x.ckpt", prediction="eps"), parts)
    ids = {"cond_stage_model.model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    for kind in (torch.int64, torch.float16):
        torch.save(named_again(parts, tmp_path) | {n: t.to(kind) for n, t in ids.items()}, tmp_path / "x.ckpt")
        assert_same(read_parts(tmp_path / "x.ckpt", prediction="eps"), parts)


@pytest.mark.parametrize("names", ["to_q to_k to_v to_out.0", "query key value proj_attn"])
@pytest.mark.parametrize("group_norm", ["norm", "group_norm"])
def test_single_files_with_diffusers_names_of_the_autoencoders_attention_are_read(names, group_norm, tmp_path):
    """Matrices where LDM has convolutions, as converters wrote them for months."""
    parts, tensors = made(V1), {}
    theirs = dict(zip(("q", "k", "v", "proj_out", "norm"), (*names.split(), group_norm), strict=True))
    for name, tensor in named(parts, tmp_path).items():
        head, attention, tail = name.partition(".mid.attn_1.")
        if attention:
            leaf, kind = tail.rsplit(".", 1)
            name = f"{head}{attention}{theirs[leaf]}.{kind}"
            tensor = tensor[..., 0, 0] if tensor.ndim == 4 else tensor
        tensors[name] = tensor
    torch.save(tensors, tmp_path / "x.ckpt")
    assert_same(read_parts(tmp_path / "x.ckpt"), parts)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("old", [False, True])
def test_an_autoencoder_in_diffusers_names_is_read_under_every_prefix(prefix, old, tmp_path):
    parts = made(V1)
    write_folder(parts, tmp_path / "folder", torch.float32)
    tensors = {}
    for name, tensor in read_tensors(tmp_path / "folder" / "vae" / "diffusion_pytorch_model.safetensors").items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, was) if old else name
        tensors[prefix + name] = tensor
    torch.save(tensors, tmp_path / "x.pt")
    vae = read_vae(tmp_path / "x.pt", V1.vae)
    assert all(torch.equal(t, vae.state_dict()[name]) for name, t in parts["vae"].state_dict().items())


def plain(parts, tmp_path, **more):
    """A .ckpt that says nothing of itself but in what is added to it."""
    path = tmp_path / "plain.ckpt"
    torch.save(named_again(parts, tmp_path) | more, path)
    return path


def test_what_a_u_net_predicts_is_told_by_marks_by_texts_by_a_yaml_or_by_hand(tmp_path):
    parts, nothing = made(V1), torch.zeros(0)
    assert quietly(plain(parts, tmp_path))["config"] is V1
    assert quietly(plain(parts, tmp_path, v_pred=nothing))["config"] == replace(V1, prediction="v")
    both = quietly(plain(parts, tmp_path, v_pred=nothing, ztsnr=nothing))["config"]
    assert (both.prediction, both.schedule.zero_terminal_snr, both.spacing) == ("v", True, "trailing")
    path = plain(parts, tmp_path)
    for text, prediction in (
        ('model:\n  params:\n    parameterization: "v"\n', "v"),
        ("parameterization: 'v' # comment\n", "v"),
        ("  parameterization: eps", "eps"),
        ("# parameterization: v", "eps"),
        ("parameterization: vast", "eps"),
    ):
        path.with_suffix(".yaml").write_text(text)
        assert quietly(path)["config"].prediction == prediction
    path.with_suffix(".yaml").unlink()
    assert quietly(path, prediction="v")["config"].prediction == "v"
    with pytest.raises(CheckpointError, match="prediction is 'epsilon'; it must be one of eps, v, x0"):
        read_parts(path, prediction="epsilon")
    save_tensors(tmp_path / "x.safetensors", named_again(parts, tmp_path), metadata={"modelspec.prediction_type": "v"})
    assert quietly(tmp_path / "x.safetensors")["config"].prediction == "v"
    write_folder(parts, tmp_path / "folder")
    assert quietly(tmp_path / "folder", prediction="v")["config"].prediction == "v"
    assert read_parts(plain(made(V2), tmp_path), prediction="v")["config"] == checkpoints.SD2_V


@pytest.mark.parametrize("key", [(16, 4), (16, 9), (24, 9), (24, 5)], ids=str)
def test_the_probe_asks_every_family_and_speaks_where_the_answer_is_not_the_published_one(key, tmp_path):
    parts = made(FAMILIES[key])
    assert quietly(plain(parts, tmp_path))["config"].prediction == "eps"
    with torch.no_grad():
        parts["unet"].conv_out.bias.fill_(-3)
    with pytest.warns(UserWarning, match=r"a probe says v\..*prediction=\"eps\""):
        assert read_parts(plain(parts, tmp_path))["config"] == replace(FAMILIES[key], prediction="v")


SCHEDULERS = {
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "trailing": {"timestep_spacing": "trailing"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0005, "beta_end": 0.01},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "another sampler": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "leading"},
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_the_noise_of_a_diffusers_scheduler_is_read_as_diffusers_has_it(case, tmp_path):
    import diffusers

    write_folder(made(V1), tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text()) | SCHEDULERS[case]
    path.write_text(json.dumps(settings))
    config = read_parts(tmp_path / "model")["config"]
    theirs = diffusers.DDIMScheduler.from_config(settings).alphas_cumprod.double()
    assert (schedule.from_config(config.schedule).alpha_bar - theirs).abs().max() < 1e-5
    assert config.spacing == ("trailing" if settings["timestep_spacing"] == "trailing" else "karras")
    write_folder({**made(V1), "config": config}, tmp_path / "again")  # and comes back
    (tmp_path / "again" / "config.json").unlink()
    assert replace(read_parts(tmp_path / "again")["config"], name=config.name) == config


REFUSED = {
    "scheduler": [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler.*read are DDIMScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas \[0.1, 0.2\]"),
        ({"clip_sample": True}, "clip_sample True"),
        ({"thresholding": True}, "thresholding True"),
        ({"timestep_spacing": "odd"}, "timestep_spacing is 'odd'; read are leading, linspace, trailing"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; read are scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'; read are epsilon"),
        ({"num_train_timesteps": 10**12}, "steps is 1000000000000"),
        ({"beta_start": 0.5}, "the first must not be above the last"),
        ({"beta_end": "x"}, "ends is 'x'"),
    ],
    "vae": [
        ({"shift_factor": 0.1}, "shift_factor 0.1"),
        ({"latents_mean": [0.1] * 4}, "latents_mean"),
        ({"scaling_factor": float("inf")}, "scaling is inf"),
        ({"scaling_factor": -1}, "scaling is -1"),
        ({"use_quant_conv": False}, "use_quant_conv False"),
    ],
    "unet": [
        ({"only_cross_attention": [False, True]}, r"only_cross_attention is \[False, True\]"),
        ({"only_cross_attention": True}, "only_cross_attention is True"),
        ({"in_channels": 8}, "8 input channels, as InstructPix2Pix has"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn 'silu'"),
        ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor 2.0"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"attention_head_dim": 3}, "don't divide into the U-Net's heads"),
        ({"layers_per_block": 10**9}, "blocks is 1000000000"),
        ({"norm_num_groups": -1}, "groups is -1"),
        ({"cross_attention_dim": 32}, "context_dim is 32, the text tower 16 wide"),
        ({"sample_size": [64, 64]}, "model is not a diffusers folder|size is"),
    ],
    "text_encoder": [
        ({"vocab_size": 49_409}, "1 words beyond CLIP's, which textual inversion adds"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; read are gelu, quick_gelu"),
        ({"hidden_size": "x"}, "width is 'x'"),
    ],
}


@pytest.mark.parametrize("part, settings, reason", [(p, s, r) for p, cases in REFUSED.items() for s, r in cases])
def test_settings_of_a_folder_that_nothing_here_has_are_refused_by_name(part, settings, reason, tmp_path, v1_folder):
    shutil.copytree(v1_folder, tmp_path / "model")
    (path,) = (tmp_path / "model" / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match=reason) as error:
        read_parts(tmp_path / "model")
    assert "model" in str(error.value)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"unet": UNET.__dict__ | {"heads": 3}}, "don't divide into the U-Net's heads"),
        ({"unet": UNET.__dict__ | {"groups": -1}}, "groups is -1; it must be a whole number from 1"),
        ({"unet": UNET.__dict__ | {"blocks": 10**9}}, "blocks is 1000000000"),
        ({"unet": UNET.__dict__ | {"widths": [8] * 1000}}, "widths is .*list of 1 to 16"),
        ({"unet": UNET.__dict__ | {"widths": "16"}}, "widths is '16'"),
        ({"unet": UNET.__dict__ | {"attention": [1, 0]}}, "attention is 1; it must be true or false"),
        ({"unet": UNET.__dict__ | {"attention": [True]}}, "attention has 1 levels, widths 2"),
        ({"unet": 3}, "UNetConfig is 3"),
        ({"vae": {"scaling": "x"}}, "scaling is 'x'"),
        ({"vae": {"scaling": 0}}, "scaling is 0"),
        ({"text": {"skip_last": 99}}, "skip_last is 99"),
        ({"text": {"layers": 2, "skip_last": 2, "width": 16, "heads": 2}}, "skip_last is 2 of 2"),
        ({"text": V1.text.__dict__ | {"projection": 8}}, "text.projection is for folders of minisd"),
        ({"schedule": {"steps": 10**12}}, "steps is 1000000000000"),
        ({"schedule": {"name": "cosine", "ends": [0.1, 0.2]}}, "the cosine schedule has no ends"),
        ({"schedule": {"ends": [0.1]}}, "ends is .*list of 2"),
        ({"schedule": {"zero_terminal_snr": 1}}, "zero_terminal_snr is 1"),
        ({"prediction": "flow"}, "prediction is 'flow'; it must be one of eps, v, x0"),
        ({"guidance": True}, "guidance is True"),
        ({"name": 7}, "name is 7; it must be text"),
        ({"sizes": 7}, "no setting sizes"),
        ([], "must be a table"),
    ],
)
def test_settings_left_in_a_single_file_are_checked(settings, reason, tmp_path):
    tensors = named(made(V1), tmp_path)
    told = json.loads(json.dumps(V1.to_dict())) | settings if settings else settings
    save_tensors(tmp_path / "x.safetensors", tensors, metadata={"minisd.config": json.dumps(told)})
    with pytest.raises(CheckpointError, match=reason) as error:
        read_parts(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("merges", ["", "a b", "a b\na b", "ab c\na b", "a b\nc", "a b\nb c\nc d"])
def test_merges_left_in_a_single_file_must_be_those_of_its_vocabulary(merges, tmp_path):
    model = replace(V1, text=replace(V1.text, vocabulary=516))
    parts = made(model) | {"tokenizer": Tokenizer([("a", "b"), ("ab", "c")])}
    write_single(parts, tmp_path / "x.safetensors")
    assert quietly(tmp_path / "x.safetensors")["tokenizer"].merges == [("a", "b"), ("ab", "c")]
    told = {"minisd.config": json.dumps(model.to_dict()), "minisd.merges": merges}
    save_tensors(tmp_path / "y.safetensors", read_tensors(tmp_path / "x.safetensors"), metadata=told)
    with pytest.raises(CheckpointError, match=r"y\.safetensors.*(merge|tokens)"):
        read_parts(tmp_path / "y.safetensors")


def test_whole_numbers_are_no_weights(tmp_path):
    tensors = named(made(V1), tmp_path)
    name = "model.diffusion_model.out.2.bias"
    torch.save(tensors | {name: tensors[name].long()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"wrong numbers: model\.diffusion_model\.out\.2\.bias is int64"):
        read_parts(tmp_path / "x.ckpt")


def test_small_models_of_ours_are_told_from_published_ones(tmp_path, monkeypatch):
    """So that they are loaded in whole precision, in which they were trained."""
    small = replace(V1, unet=replace(UNET, widths=(8, 16)))
    for model, published in ((V1, True), (small, False)):
        write_single(made(model), tmp_path / f"{published}.safetensors")
        write_folder(made(model), tmp_path / f"{published}")
        assert weights.is_published(tmp_path / f"{published}.safetensors") == published
        assert weights.is_published(tmp_path / f"{published}") == published
        (tmp_path / f"{published}" / "config.json").unlink()
        assert weights.is_published(tmp_path / f"{published}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
def test_a_file_that_is_cast_does_not_stay_in_memory(tmp_path, monkeypatch):
    """While it is read; afterwards nothing is left of it anyway."""
    path, most, calls = tmp_path / "x.safetensors", [], itertools.count()
    pattern = rf"{re.escape(str(path))}\n.*\nKernel.*\nMMU.*\nRss: +(\d+) kB"

    def watched(tensor):
        if next(calls) % 20 == 0:  # the account is long to read
            found = re.findall(pattern, Path("/proc/self/smaps").read_text())
            most.append(1024 * sum(map(int, found)) / path.stat().st_size)
        return is_finite(tensor)

    write_single(made(replace(V1, unet=replace(UNET, widths=(128, 256)))), path, torch.float32)
    monkeypatch.setattr(checkpoints, "is_finite", watched)
    read_parts(path)
    assert max(most) > 0.7  # mapped: nearly all of it has been looked at
    most.clear()
    gc.collect()  # the networks of the first reading
    read_parts(path, torch.bfloat16)
    assert max(most) < 0.5  # the largest tensor is a tenth of the file; a system reads some megabytes ahead


def test_a_part_that_is_not_there_is_missing_by_name(tmp_path):
    tensors = {name: t for name, t in named(made(V1), tmp_path).items() if not name.startswith("first_stage")}
    torch.save(tensors, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"small v1: missing first_stage_model\.\S+; missing .* and \d+ more"):
        read_parts(tmp_path / "x.ckpt")


def test_numbers_that_are_not_finite_are_refused_or_let_through(tmp_path):
    tensors = named(made(V1), tmp_path)
    tensors["first_stage_model.quant_conv.bias"][3] = float("inf")
    torch.save(tensors, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias holds NaN or infinity"):
        read_parts(tmp_path / "x.ckpt")
    assert read_parts(tmp_path / "x.ckpt", finite=False)["vae"].quant.bias[3] == float("inf")
    tensors["first_stage_model.quant_conv.bias"][3] = 1e5  # too much for half precision
    tensors["sqrt_recip_alphas_cumprod"] = torch.tensor([float("inf")])  # and what is not needed may be anything
    torch.save(tensors, tmp_path / "x.ckpt")
    assert read_parts(tmp_path / "x.ckpt")["vae"].quant.bias[3] == 1e5
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias holds NaN or infinity in torch\.float16"):
        read_parts(tmp_path / "x.ckpt", torch.float16)


@pytest.mark.parametrize(
    "name, content",
    [
        ("unet/config.json", "{"),
        ("unet/config.json", "[]"),
        ("unet/config.json", '{"in_channels": 4}'),
        ("unet/config.json", None),
        ("scheduler/scheduler_config.json", '{"prediction_type": "flow"}'),
        ("text_encoder/config.json", '{"hidden_act": "relu"}'),
        ("vae/config.json", '{"block_out_channels": 8, "use_quant_conv": false}'),
    ],
)
def test_folders_that_say_nothing_known_are_refused(tmp_path, name, content):
    folder = tmp_path / "model"
    write_folder(made(V1), folder)
    (folder / "config.json").unlink()
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match="model is not a diffusers folder of Stable Diffusion"):
        read_parts(folder)


@pytest.mark.parametrize("layout", ["bare", "vae.", "first_stage_model.", "whole", "folder", "folder/vae"])
def test_an_autoencoder_alone_can_be_put_into_a_model(tmp_path, layout):
    parts, path = made(V1), tmp_path / "x"
    tensors = {n: t for n, t in named(parts, tmp_path).items() if layout == "whole" or n.startswith("first_stage")}
    if layout.startswith("folder"):
        write_folder(parts, path, torch.float32)
        path = path / "vae" if layout == "folder/vae" else path
    else:
        prefix = {"bare": "", "whole": "first_stage_model."}.get(layout, layout)
        loss = {} if layout == "whole" else {prefix + "loss.logvar": torch.zeros(())}
        torch.save({n.replace("first_stage_model.", prefix): t for n, t in tensors.items()} | loss, path)
    vae = read_vae(path, V1.vae)
    assert all(torch.equal(t, vae.state_dict()[name]) for name, t in parts["vae"].state_dict().items())
    with pytest.raises(CheckpointError, match="wrong shape: encoder"):
        read_vae(path, replace(V1.vae, widths=(8, 24)))


def test_a_model_is_found_by_file_by_folder_and_by_name(tmp_path):
    write_folder(made(V1), tmp_path / "folder")
    write_single(made(V1), tmp_path / "x.safetensors")
    for path in (tmp_path / "folder", tmp_path / "x.safetensors"):
        assert minisd.load(path).config == V1
        assert minisd.load(str(path), dtype=torch.float16).dtype == torch.float16
    with pytest.raises(CheckpointError, match="critters-512"):
        minisd.load(tmp_path)


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["minisd", "info", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_info_tells_what_a_checkpoint_is(tmp_path, monkeypatch, capsys):
    parts = made(V2)
    numbers = {
        part: f"{sum(p.numel() for p in parts[part].parameters()):,} numbers, float32" for part in networks(parts)
    }
    last = {"cond_stage_model.model.logit_scale": torch.ones(()), "betas": torch.ones(1000)}
    last["cond_stage_model.model.transformer.resblocks.2.ln_1.weight"] = torch.ones(24)
    torch.save(named(parts, tmp_path) | last, tmp_path / "x.ckpt")
    told = said(monkeypatch, capsys, tmp_path / "x.ckpt")
    assert "not needed: 3 tensors: " in told and all(name in told for name in last)
    assert "small v2, a single file\n" in told and "predicts eps or v" in told and "<-" not in told
    assert all(f"{part}: {len(parts[part].state_dict())} tensors, {numbers[part]}" in told for part in networks(parts))
    told = said(monkeypatch, capsys, tmp_path / "x.ckpt", "--keys")
    block = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    assert f"text.blocks.1.attention.k.weight <- {block}\n" in told
    assert "unet.conv_in.weight <- model.diffusion_model.input_blocks.0.0.weight\n" in told
    write_folder(made(X4), tmp_path / "folder")
    told = said(monkeypatch, capsys, tmp_path / "folder", "--keys")
    assert "small x4, a diffusers folder\npredicts v\n" in told and "float16" in told
    assert "unet.conv_in.weight <- unet/conv_in.weight\n" in told
    told = said(monkeypatch, capsys, weights.assets() / "models" / "critters-512")
    assert told.startswith("critters-512, a folder of minisd\n") and "\nunet: " in told
    save_tensors(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(4, 8)})
    told = said(monkeypatch, capsys, tmp_path / "lora.safetensors")
    assert "is a LoRA" in told and "1 tensors, 32 numbers, float16" in told


def test_diffusers_draws_with_the_bundled_model_what_we_draw(tmp_path):
    """From a folder, and from a single file: three steps of DDIM from one start, with guidance."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parts = read_parts(weights.resolve(None))
    sd = minisd.StableDiffusion(**parts)
    write_folder(parts, tmp_path / "folder", torch.float32)
    write_single(parts, tmp_path / "x.safetensors", torch.float32)
    prompt = "a watercolor of an orange cat with blue eyes on a beach"
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = schedule.plan(sd.schedule, 3, "leading", to_zero=False, rounded=True)
    denoise = sd.denoiser(sd.encode_text(prompt), sd.encode_text(""), guidance=4.0)
    with torch.no_grad():
        *_, (ours, _) = samplers.ddim(denoise, plan.init_scale * z, plan.sigmas.float(), None)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    for pipe in (
        StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True),
        StableDiffusionPipeline.from_single_file(
            str(tmp_path / "x.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
        ),
    ):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.tokenizer(prompt, padding="max_length").input_ids == sd.tokenizer([prompt])[0].tolist()
        with contextlib.redirect_stderr(io.StringIO()):
            theirs = pipe(prompt, latents=z, **settings).images
        assert (plan.final_scale * ours - theirs).abs().max() < 1.5e-5  # measured 2.6e-6, of numbers up to 3.6


def test_a_folder_that_is_called_like_a_bundled_model_does_not_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "critters-512").mkdir()
    (tmp_path / "critters-512" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    bundled = weights.assets() / "models" / "critters-512"
    assert weights.resolve(None) == weights.resolve("critters-512") == bundled
    assert weights.resolve("./critters-512").resolve() == (tmp_path / "critters-512").resolve() != bundled.resolve()


def test_load_takes_another_u_net_and_what_it_predicts(tmp_path):
    model, other = made(V1), made(V1)
    other["unet"] = randomise(UNet(V1.unet), 5)
    write_single(model, tmp_path / "model.safetensors", torch.float32)
    write_single(other, tmp_path / "other.safetensors", torch.float32)
    path, unet = (tmp_path / f"{name}.safetensors" for name in ("model", "other"))
    sd = minisd.load(path, dtype="float32", unet=unet, prediction="v")
    assert sd.config.prediction == "v"
    for part, parts in (("unet", other), ("vae", model)):
        ours = getattr(sd, part).state_dict()
        assert all(ours[name].equal(tensor) for name, tensor in parts[part].state_dict().items())
    with pytest.raises(CheckpointError, match="prediction is 'epsilon'"):
        minisd.load(path, prediction="epsilon")
