"""The pipeline on a tiny random model: seeds, batches, strength, masks, and what a picture remembers."""

import dataclasses
import functools
import inspect
import warnings

import numpy as np
import pytest
import torch
from peers import randomise
from PIL import Image
from tiny import tiny

import minisd
from minisd import image, samplers, schedule
from minisd.devices import fast_dtype
from minisd.pipeline import StableDiffusion
from minisd.settings import Settings
from minisd.unet import UNet
from minisd.weights import read_config, save_module, write_config

sd = functools.cache(tiny)
QUICK = {"steps": 3, "progress": False}


def pixels(picture):
    return np.asarray(picture).astype(int)


def photograph(width=64, height=64):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([4 * x % 256, 3 * y % 256, (x * y) % 256], -1).astype(np.uint8))


def test_the_same_seed_draws_the_same_picture_and_another_seed_another():
    first, again, other = (sd()("a cat", seed=s, **QUICK) for s in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("sampler", [samplers.dpmpp_sde, samplers.dpmpp_2m, samplers.euler_a])
def test_a_batch_holds_the_pictures_that_single_runs_draw(sampler):
    batch = sd()("a cat", seed=5, n=3, sampler=sampler, **QUICK)
    singles = [sd()("a cat", seed=s, sampler=sampler, **QUICK) for s in (5, 6, 7)]
    listed = sd()("a cat", seed=[7, 6, 5], n=3, sampler=sampler, **QUICK)[::-1]
    for a, b, c in zip(batch, singles, listed, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
        assert np.abs(pixels(a) - pixels(c)).max() <= 1


def test_latents_come_step_by_step_and_the_last_is_the_picture():
    trail = list(sd().latents("a cat", seed=5, **QUICK))
    assert len(trail) == QUICK["steps"]
    x, x0 = trail[-1]
    assert x.shape == x0.shape == (1, 4, 8, 8)
    assert image.to_pil(sd().decode(x))[0].tobytes() == sd()("a cat", seed=5, **QUICK).tobytes()
    for step in (next(sd().latents("a cat", seed=5, **QUICK)), trail[0]):
        assert torch.equal(step[1], trail[0][1])  # one may stop early
    with pytest.raises(ValueError, match="steps"):
        sd().latents("a cat", steps=0)  # refused before the first step is asked for


def test_a_prompt_that_is_refused_is_refused_before_the_picture_is_encoded(monkeypatch):
    monkeypatch.setattr(sd().vae, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    with pytest.raises(ValueError, match="weight"):
        sd().img2img("a (cat:nan)", photograph(), **QUICK)


@pytest.mark.parametrize(
    ("device", "capabilities", "dtype"),
    [
        ("cuda", {}, torch.float16),
        ("mps", {"avx512_bf16": True}, torch.float32),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False}, torch.float32),
        ("cpu", {}, torch.float32),
    ],
)
def test_the_fast_numbers_are_those_a_device_has_instructions_for(monkeypatch, device, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype(torch.device(device)) == dtype


def test_without_word_of_the_instructions_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_dtype(torch.device("cpu")) == torch.float32


def test_several_prompts_draw_n_pictures_each():
    drawn = sd()(["a cat", "a dog"], n=2, seed=1, negative=["", "a cat"], **QUICK)
    assert [p.info["prompt"] for p in drawn] == ["a cat", "a cat", "a dog", "a dog"]
    assert [p.info["negative"] for p in drawn] == ["", "", "a cat", "a cat"]
    assert [p.info["seed"] for p in drawn] == [1, 2, 3, 4]


def test_a_picture_remembers_its_settings_and_they_draw_it_again(tmp_path):
    picture = sd()("a cat", sampler=samplers.heun, schedule="trailing", guidance=2.0, size=(64, 32), **QUICK)
    image.save(picture, tmp_path / "x.png", picture.info)
    noted = image.read_metadata(tmp_path / "x.png")
    again = sd()(
        noted["prompt"], seed=int(noted["seed"]), steps=int(noted["steps"]), guidance=float(noted["guidance"]),
        sampler=getattr(samplers, noted["sampler"]), schedule=noted["schedule"], size=picture.size, progress=False,
    )  # fmt: skip
    assert picture.size == (64, 32)
    assert again.tobytes() == picture.tobytes()


def test_the_parts_by_hand_draw_what_the_call_draws():
    run = schedule.plan(sd().schedule, 3, "karras")
    denoise = sd().denoiser(sd().encode_text("a cat"), sd().encode_text(""), guidance=3.0)
    generator = torch.Generator().manual_seed(11)
    x = run.init_scale * torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        *_, (x, _) = samplers.dpmpp_2m(denoise, x, run.sigmas.float(), None)
    by_hand = image.to_pil(sd().decode(x))[0]
    assert by_hand.tobytes() == sd()("a cat", seed=11, **QUICK).tobytes()


def test_strength_0_gives_the_pixels_back_and_1_is_text_to_image():
    picture = photograph()
    same = sd().img2img("a cat", picture, strength=0, seed=1, **QUICK)
    assert same.tobytes() == picture.tobytes()
    for sampler in (samplers.dpmpp_2m, samplers.euler_a):
        forgotten = sd().img2img("a cat", picture, strength=1, seed=3, sampler=sampler, **QUICK)
        assert forgotten.tobytes() == sd()("a cat", seed=3, sampler=sampler, **QUICK).tobytes()


def test_a_strength_below_one_step_still_runs_one():
    steps = []

    def counted(denoise, x, sigmas, noise):
        steps.append(len(sigmas) - 1)
        yield from samplers.euler(denoise, x, sigmas, noise)

    for strength in (0.01, 0.4, 0.6, 0.99):
        sd().img2img("a cat", photograph(), strength=strength, seed=1, sampler=counted, steps=10, progress=False)
    assert steps == [1, 4, 6, 10]


def test_inpainting_keeps_every_pixel_outside_the_mask():
    picture, mask = photograph(), Image.new("L", (64, 64), 0)
    mask.paste(255, (13, 9, 41, 37))
    drawn = sd().inpaint("a cat", picture, mask, seed=1, **QUICK)
    changed = (pixels(drawn) != pixels(picture)).any(-1)
    inside = pixels(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.9


def test_masks_of_another_size_and_empty_masks_warn():
    with pytest.warns(UserWarning, match="mask is resized"):
        sd().inpaint("a cat", photograph(), Image.new("L", (32, 32), 255), seed=1, **QUICK)
    with pytest.warns(UserWarning, match="all black"):
        same = sd().inpaint("a cat", photograph(), Image.new("L", (64, 64), 0), seed=1, **QUICK)
    assert same.tobytes() == photograph().tobytes()


def test_words_beyond_the_last_place_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"kept 75 of 80 tokens, dropped 'vwxyz'"):
        sd().encode_text("a" * 75 + "vwxyz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd().encode_text("a" * 75)


def test_a_missing_seed_is_drawn_and_noted():
    first, second = (sd()("a cat", **QUICK) for _ in range(2))
    assert first.info["seed"] != second.info["seed"]
    assert sd()("a cat", seed=first.info["seed"], **QUICK).tobytes() == first.tobytes()


def test_latents_that_are_not_finite_name_the_step():
    def breaks(denoise, x, sigmas, noise):
        for i in range(3):
            yield (x * float("nan") if i == 1 else x), x

    with pytest.raises(ValueError, match="after step 2"):
        sd()("a cat", sampler=breaks, **QUICK)


def test_a_saved_model_loads_and_draws_the_same_up_to_half_precision(tmp_path):
    model = sd()
    write_config(tmp_path, model.config)
    model.tokenizer.save(tmp_path / "tokenizer.txt")
    for name in ("text", "unet", "vae"):
        save_module(getattr(model, name), tmp_path / f"{name}.safetensors")
    loaded = minisd.load(tmp_path)
    assert (loaded.config, loaded.dtype) == (model.config, torch.float32)
    assert np.abs(pixels(loaded("a cat", seed=1, **QUICK)) - pixels(model("a cat", seed=1, **QUICK))).mean() < 1


@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_a_model_saved_for_other_tools_loads_and_draws_the_same(tmp_path, name):
    sd().save(tmp_path / name, torch.float32)
    again = minisd.load(tmp_path / name, dtype="float32")
    assert again("a cat", seed=1, **QUICK).tobytes() == sd()("a cat", seed=1, **QUICK).tobytes()
    assert minisd.load(tmp_path / name, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert minisd.load(tmp_path / name).dtype == torch.float32  # as every model of ours
    with pytest.raises(FileExistsError, match="model"):
        sd().save(tmp_path / name)


def test_models_that_are_not_there_or_do_not_fit_are_refused(tmp_path):
    with pytest.raises(minisd.CheckpointError, match="nowhere"):
        minisd.load("nowhere")
    with pytest.raises(ValueError, match="cpu"):
        minisd.load(device="tpu7")


def test_the_negative_prompt_is_what_guidance_leads_away_from():
    plain, away, same = (sd()("a cat", negative=n, seed=1, **QUICK) for n in ("", "a dog", "a cat"))
    assert plain.tobytes() != away.tobytes()
    alone = sd()("a cat", guidance=1, seed=1, **QUICK)
    assert np.abs(pixels(same) - pixels(alone)).max() <= 1  # nothing to lead away from
    with pytest.warns(UserWarning, match="no effect at guidance 1"):
        sd()("a cat", negative="a dog", guidance=1, seed=1, **QUICK)


@pytest.mark.parametrize("size", [(63, 200), (131, 64)])
def test_a_mask_is_cropped_as_its_picture_is(size):
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, 32, 32))
    with pytest.warns(UserWarning) as said:
        drawn = sd().inpaint("a cat", Image.new("RGB", size, "orange"), mask, seed=1, steps=1, progress=False)
    assert not any("the mask is resized" in str(w.message) for w in said)
    kept = image.fit(mask, drawn.size)
    changed = (pixels(drawn) != pixels(Image.new("RGB", drawn.size, "orange"))).any(-1)
    assert not changed[pixels(kept) == 0].any()


def test_a_cast_leaves_the_device_and_a_move_the_dtype():
    model = tiny()
    assert model.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert model.to("cpu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "sampler, noted",
    [(samplers.euler_a, "ancestral"), (functools.partial(samplers.ddim, eta=0.5), "ddim(eta=0.5)")],
)
def test_the_sampler_is_noted_by_name(sampler, noted):
    assert sd()("a cat", sampler=sampler, seed=1, steps=1, progress=False).info["sampler"] == noted


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"unet": []}', '{"prediction": "epsilon"}', '{"schedule": {"name": "x"}}', "{"]
)
def test_a_config_that_cannot_be_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(minisd.CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


# Models that are shown more than a noisy latent


def with_channels(channels: int, **unet) -> StableDiffusion:
    """The tiny model with another U-Net, which remembers the channels it was shown beside the latent."""
    model = tiny()
    config = dataclasses.replace(
        model.config, unet=dataclasses.replace(model.config.unet, in_channels=channels, **unet)
    )
    network = randomise(UNet(config.unet))
    shown = []
    network.register_forward_pre_hook(lambda _, args: shown.append((args[0][:, 4:], args[3])))
    model = StableDiffusion(config, model.tokenizer, model.text, network, model.vae)
    model.shown = shown
    return model


def test_an_inpainting_model_sees_the_mask_and_what_it_leaves():
    model, picture, mask = with_channels(9), photograph(), Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 8, 64, 40))
    drawn = model.inpaint("a cat", picture, mask, seed=1, **QUICK)
    seen, _ = model.shown[0]
    assert torch.equal(seen[0, 0], torch.nn.functional.pad(torch.ones(4, 6), (2, 0, 1, 3)))
    grey = image.from_pil(picture)
    grey[:, :, 8:40, 16:64] = 0
    assert torch.allclose(seen[:1, 1:], model.encode(grey), atol=1e-6)
    kept = pixels(mask) == 0
    assert (pixels(drawn)[kept] == pixels(picture)[kept]).all()
    assert (pixels(drawn)[~kept] != pixels(picture)[~kept]).any()


def test_an_inpainting_model_draws_from_a_prompt_alone_with_everything_masked():
    model = with_channels(9)
    model("a cat", seed=1, size=(64, 32), **QUICK)
    seen, _ = model.shown[0]
    assert (seen[:, 0] == 1).all()
    assert torch.allclose(seen[:1, 1:], model.encode(torch.zeros(1, 3, 32, 64)), atol=1e-6)


def test_an_upscaler_enlarges_by_the_factor_of_its_autoencoder_and_sees_the_noised_picture():
    model, picture = with_channels(7, classes=400), photograph(16, 12)
    drawn = model.upscale("a cat", picture, noise_level=30, seed=5, **QUICK)
    assert drawn.size == (128, 96) and drawn.info["noise_level"] == 30
    seen, label = model.shown[0]
    assert torch.equal(label, torch.tensor([30, 30]))
    noise = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(5))  # a seed's first draw
    assert torch.allclose(seen[:1], model.schedule.add_noise(image.from_pil(picture), torch.tensor([30]), noise))
    pair = model.upscale("a cat", picture, noise_level=30, seed=4, n=2, **QUICK)
    assert np.abs(pixels(pair[1]) - pixels(drawn)).max() <= 1  # the same in every batch
    for level in (-1, 351, 2.5):
        with pytest.raises(ValueError, match="noise_level"):
            model.upscale("a cat", picture, noise_level=level)


def test_a_depth_model_sees_how_near_things_are():
    model, picture = with_channels(5), photograph(64, 32)
    near = Image.linear_gradient("L").resize((64, 32))
    drawn = model.depth2img("a cat", picture, depth=near, seed=1, **QUICK)
    assert drawn.size == (64, 32) and drawn.info["strength"] == 0.9
    seen, _ = model.shown[0]
    assert seen.shape[1:] == (1, 4, 8) and seen.min() == -1 and seen.max() == 1
    assert (seen[0, 0].diff(dim=0) > 0).all()  # black above, white below: nearer and nearer
    with pytest.raises(ValueError, match="without a depth estimator"):
        model.depth2img("a cat", picture, seed=1, **QUICK)
    same = model.depth2img("a cat", picture, depth=near, strength=0, seed=1, **QUICK)
    assert same.tobytes() == picture.tobytes()


def test_tiles_reach_the_autoencoder_and_take_less_memory(monkeypatch):
    whole, tiled = (sd()("a cat", size=(128, 64), tile=tile, seed=1, **QUICK) for tile in (None, 8))
    assert tiled.size == whole.size and tiled.tobytes() != whole.tobytes()  # how near they are: test_vae_tiling
    assert tiled.info["tile"] == 8 and "tile" not in whole.info
    monkeypatch.setattr("minisd.pipeline.free_memory", lambda device: 2**23)
    with pytest.raises(ValueError, match="tile"):
        sd()("a cat", size=256, seed=1, **QUICK)
    assert sd()("a cat", size=256, tile=16, seed=1, **QUICK).size == (256, 256)


@pytest.mark.parametrize(
    "channels, way, instead",
    [
        (4, "upscale", "img2img"),
        (5, "text_to_image", "depth2img"),
        (4, "depth2img", "img2img"),
        (7, "img2img", "upscale"),
        (7, "text_to_image", "upscale"),
        (9, "upscale", "inpaint"),
    ],
)
def test_a_model_refuses_what_it_was_not_made_for_and_says_what_it_was(channels, way, instead):
    model = with_channels(channels)
    arguments = ["a cat"] if way == "text_to_image" else ["a cat", photograph()]
    with pytest.raises(ValueError, match=instead):
        getattr(model, way)(*arguments, seed=1, **QUICK)


def test_long_prompts_in_chunks_draw_with_a_short_negative_one():
    prompt = "a cat with " + ", ".join(["blue eyes"] * 12) + " BREAK on a beach"
    with pytest.warns(UserWarning, match="kept 75 of"):
        cut = sd()(prompt, seed=1, **QUICK)
    whole = sd()(prompt, negative="a dog", long_prompts="chunk", seed=1, **QUICK)
    assert whole.tobytes() != cut.tobytes() and whole.info["long_prompts"] == "chunk"


@pytest.mark.parametrize("way", ["__call__", "text_to_image", "latents", "img2img", "inpaint", "depth2img", "upscale"])
def test_every_way_to_draw_names_every_setting(way):
    taken = inspect.signature(getattr(StableDiffusion, way)).parameters
    for field in dataclasses.fields(Settings):
        assert taken[field.name].default == field.default and taken[field.name].annotation == field.type, field.name


def test_equal_texts_are_encoded_once(monkeypatch):
    model, read = sd(), []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda texts, **how: read.append(list(texts)) or encode(texts, **how))
    model(["a cat", "a dog", "a cat"], n=2, seed=1, **QUICK)
    assert read == [["a cat", "a dog", ""]]


def test_what_cannot_fit_is_refused_before_the_prompts_are_read(monkeypatch):
    monkeypatch.setattr("minisd.pipeline.free_memory", lambda device: 2**20)
    monkeypatch.setattr(sd(), "encode_text", lambda *_, **__: pytest.fail("they were read"))
    with pytest.raises(ValueError, match="10000 pictures of 64 x 64 would take about"):
        sd()("a cat", n=10_000, **QUICK)
    with pytest.raises(ValueError, match="1 picture of 512 x 512 would"):
        sd()("a cat", size=512, **QUICK)


def test_warnings_point_at_the_line_that_asked():
    with pytest.warns(UserWarning) as said:
        sd().img2img("(a cat", photograph(63, 65), negative="a dog", guidance=1, seed=1, **QUICK)
    assert len(said) == 3 and {warning.filename for warning in said} == {__file__}


def in_blue(monkeypatch, model):
    """Whatever is drawn comes out blue."""
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    monkeypatch.setattr(model, "decode", lambda z, tile=None: blue.expand(len(z), 3, 8 * z.shape[2], 8 * z.shape[3]))
    return model


def test_where_a_mask_is_grey_old_and_new_are_blended_by_it(monkeypatch):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    orange = Image.new("RGB", (64, 64), (255, 165, 0))
    drawn = in_blue(monkeypatch, sd()).inpaint("a cat", orange, Image.fromarray(grey), seed=1, **QUICK)
    share = grey[..., None] / 255
    assert np.abs(pixels(drawn) - ((1 - share) * [255, 165, 0] + share * [0, 0, 255])).max() <= 1
    assert (pixels(drawn)[:, 0] == [255, 165, 0]).all() and (pixels(drawn)[:, 63] == [3, 2, 252]).all()


def test_what_a_jpeg_leaves_of_black_redraws_nothing():
    with pytest.warns(UserWarning, match="all black"):
        drawn = sd().inpaint("a cat", photograph(), Image.new("L", (64, 64), 7), seed=1, **QUICK)
    assert drawn.tobytes() == photograph().tobytes()


def test_every_pixel_of_a_thin_stroke_lies_in_a_cell_that_is_redrawn():
    model, mask = with_channels(9), Image.new("L", (64, 64), 0)
    mask.paste(255, (11, 9, 14, 60))  # it misses the first pixel of every cell
    model.inpaint("a cat", photograph(), mask, seed=1, **QUICK)
    cells = torch.zeros(8, 8)
    cells[1:8, 1] = 1
    assert torch.equal(model.shown[0][0][0, 0], cells)


@pytest.mark.parametrize(
    "depth",
    [
        Image.fromarray(np.tile(np.linspace(500, 4500, 64).round().astype(np.uint16), (64, 1))),
        Image.fromarray(np.tile(np.linspace(-3, 2, 64, dtype=np.float32), (64, 1))),
    ],
    ids=["16 bits", "floating point"],
)
def test_depths_keep_all_their_levels(depth):
    model = with_channels(5)
    model.depth2img("a cat", photograph(512, 512), depth=depth, seed=1, **QUICK)
    seen = model.shown[0][0][0, 0]
    assert torch.allclose(seen, torch.linspace(-1, 1, 64).expand(64, 64), atol=1e-3)  # what 8 bits can't tell


def test_depths_that_are_no_numbers_are_refused():
    depth = Image.fromarray(np.full((64, 64), np.inf, dtype=np.float32))
    with pytest.raises(ValueError, match="not finite"):
        with_channels(5).depth2img("a cat", photograph(), depth=depth, seed=1, **QUICK)


def test_an_autoencoder_that_overflows_in_half_precision_works_in_float32():
    model = tiny()
    with torch.no_grad():
        model.vae.decoder.conv_in.weight.mul_(3e4).clamp_(-6e4, 6e4)
    z = 1000 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half().float()
    expected = tiny().to(dtype=torch.float16)  # its weights, rounded as those of the one below
    with torch.no_grad():
        expected.vae.decoder.conv_in.weight.copy_(model.vae.decoder.conv_in.weight)
    expected = expected.to(dtype=torch.float32).decode(z)
    model.to(dtype=torch.float16)
    with pytest.warns(UserWarning, match=r'overflowed in torch\.float16.*dtype="float32"'):
        assert torch.allclose(model.decode(z), expected, atol=1e-5)
    assert model.vae.decoder.conv_in.weight.dtype == torch.float16


def test_a_model_says_what_it_is():
    model = sd()
    numbers = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("text", "unet", "vae")}
    assert repr(model) == f"<StableDiffusion tiny: {sum(numbers.values()) / 1e6:.1f} M numbers, float32 on cpu>"
    told = model.info().splitlines()
    assert told[0] == repr(model) and told[-1] == "  drawn with 20 steps of dpmpp_2m, spaced karras, guidance 3"
    for line, (name, n) in zip(told[1:-1], numbers.items(), strict=True):
        assert line.split()[:2] == [name, f"{n / 1e6:.1f}"]
    assert "4 x 8 x 8" in told[2]
    page = model._repr_html_()
    assert (
        page.startswith("&lt;StableDiffusion tiny")
        and page.count("<tr>") == 3
        and "<td style='text-align:left'>UNet" in page
    )
