"""ControlNet against diffusers'; that it starts in silence, learns alone, and comes back from a file as it was."""

import copy

import pytest
import torch
from peers import controlnet_peer, randomise, unet_peer
from tiny import CONFIG, tiny

from minisd.adapters import controlnet
from minisd.adapters.controlnet import Controlled, ControlNet
from minisd.config import CRITTERS_512, SD1, UNetConfig
from minisd.unet import UNet
from minisd.weights import CheckpointError, save_tensors

WIDTHS = (4, 6, 8, 8)  # of the hint's encoder
V1 = UNetConfig(widths=(32, 64, 64), attention=(True, True, False), heads=4, context_dim=24, groups=8)


def inputs(config, size=(8, 12)):
    draw = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, config.in_channels, *size, generator=draw)
    context = torch.randn(2, 7, config.context_dim, generator=draw)
    return x_t, torch.tensor([3.0, 871.0]), context, torch.rand(1, 3, 8 * size[0], 8 * size[1], generator=draw)


@pytest.mark.parametrize("form", [V1, CRITTERS_512.unet], ids=["v1", "bundled"])
def test_what_it_says_and_what_comes_of_it_equal_diffusers(form):
    unet, control = randomise(UNet(form)), randomise(ControlNet(form, WIDTHS), seed=2)
    x_t, t, context, picture = inputs(form)
    settings = {"controlnet_cond": picture.expand(2, -1, -1, -1), "conditioning_scale": 0.7, "return_dict": False}
    down, middle = controlnet_peer(control, WIDTHS)(x_t, t, context, **settings)
    said = control(x_t, t, context, picture)
    for ours, theirs in zip(said, [*down, middle], strict=True):
        assert (0.7 * ours - theirs).abs().max() < 1e-5 * theirs.abs().max()

    more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    theirs = unet_peer(unet)(x_t, t, context, **more).sample
    ours = Controlled(unet, control, picture, strength=0.7)(x_t, t, context)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - unet(x_t, t, context)).abs().max() > 0.01 * theirs.abs().max()


def test_the_published_one_has_its_number_of_parameters():
    with torch.device("meta"):
        control = ControlNet(SD1.unet)
    assert sum(p.numel() for p in control.parameters()) == 361_279_120


def test_at_first_it_says_nothing():
    unet = tiny().unet
    control = controlnet.beside(unet, WIDTHS)
    x_t, t, context, picture = inputs(CONFIG.unet)
    assert all((each == 0).all() for each in control(x_t, t, context, picture))
    assert Controlled(unet, control, picture)(x_t, t, context).equal(unet(x_t, t, context))
    with torch.no_grad():  # and it is a copy: shown no hint, it goes down as the U-Net does
        (h, kept, _), (own, own_kept, _) = unet.descend(x_t, t, context), control.descend(x_t, t, context)
    assert h.equal(own) and all(a.equal(b) for a, b in zip(kept, own_kept, strict=True))


@pytest.fixture
def learnt(tmp_path):
    """A U-Net, a ControlNet that has learnt a little beside it, and the file that keeps it."""
    unet = tiny().unet
    control = controlnet.beside(unet, WIDTHS)
    controlnet.attach(control, rank=2)
    before = copy.deepcopy(unet.state_dict())
    x_t, t, context, picture = inputs(CONFIG.unet)
    optimizer = torch.optim.Adam([p for p in control.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (unet(x_t, t, context, control=control(x_t, t, context, picture)) - 1).square().mean().backward()
        optimizer.step()
    assert all(unet.state_dict()[name].equal(tensor) for name, tensor in before.items())
    path = tmp_path / "control.lora.safetensors"
    save_tensors(path, controlnet.differences(control))
    return unet, control, path


def test_it_comes_back_from_its_file(learnt):
    unet, control, path = learnt
    x_t, t, context, picture = inputs(CONFIG.unet)
    again = controlnet.read(path, unet, WIDTHS)
    with torch.no_grad():
        said, as_read = control(x_t, t, context, picture), again(x_t, t, context, picture)
    assert all(each.abs().max() > 1e-3 for each in said)  # every zero convolution has learnt
    for a, b in zip(said, as_read, strict=True):
        assert (a - b).abs().max() < 4e-3 * a.abs().max()  # the file is in half precision
    assert not controlnet.beside(unet, WIDTHS).down[0].residual.conv1.weight.equal(again.down[0].residual.conv1.weight)


def test_one_of_another_model_is_refused(learnt):
    _, _, path = learnt
    with pytest.raises(CheckpointError, match="belongs to another"):
        controlnet.read(path, UNet(V1), WIDTHS)
    with pytest.raises(CheckpointError, match="hint"):
        controlnet.read(path, tiny().unet, (4, 6, 8))


def test_a_pipeline_draws_with_one():
    sd = tiny()
    settings = {"seed": 1, "steps": 2, "progress": False}
    alone = sd("a cat", **settings)
    control = randomise(controlnet.beside(sd.unet, WIDTHS), seed=3)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, drawn = sd.unet, {}
    for strength in (0.0, 1.0):
        sd.unet = Controlled(plain, control, picture, strength)
        drawn[strength] = sd("a cat", **settings)
    assert drawn[0.0].tobytes() == alone.tobytes() != drawn[1.0].tobytes()
