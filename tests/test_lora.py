"""Low-rank changes: none at first, of the rank they say, and the same network when they are read back from a file."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny import CONFIG, tiny

import minisd
from minisd.adapters import lora
from minisd.weights import CheckpointError, read_tensors, save_module, save_tensors, write_config
from minisd.weights.native import merged

RANK = 3
X, T, CONTEXT = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 5, 16)


@pytest.fixture
def folder(tmp_path):
    """A base model, and a variant of it with changes drawn at random; beside them what the changed U-Net says."""
    sd, base, variant = tiny(), tmp_path / "base", tmp_path / "variant"
    base.mkdir()
    variant.mkdir()
    for name in ("text", "unet", "vae"):
        save_module(getattr(sd, name), base / f"{name}.safetensors")
    sd.tokenizer.save(base / "tokenizer.txt")
    write_config(base, CONFIG)

    unet = minisd.load(base).unet
    before = unet(X, T, CONTEXT)
    lora.attach(unet, RANK)
    assert unet(X, T, CONTEXT).equal(before)
    for name, parameter in unet.named_parameters():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    torch.save(unet(X, T, CONTEXT).detach(), tmp_path / "after.pt")
    save_tensors(variant / "unet.lora.safetensors", lora.changes(unet))
    write_config(variant, dataclasses.replace(CONFIG, name="variant", base="base"))
    return tmp_path


def test_only_the_changes_learn_and_they_are_of_their_rank():
    unet = tiny().unet
    weights = {name: p.detach().clone() for name, p in unet.named_parameters()}
    lora.attach(unet, RANK)
    learning = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert all(name.endswith((".up", ".down")) for name in learning)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        unet(X, T, CONTEXT).square().mean().backward()
        optimizer.step()
    whole = merged(weights, lora.changes(unet))
    assert whole.keys() == weights.keys()
    for name, weight in weights.items():
        if weight.ndim > 1 and name.endswith("weight"):
            change = (whole[name] - weight).flatten(1)
            assert change.abs().max() > 0 or "cross" in name, name  # not all of them are asked for by this loss
            assert torch.linalg.matrix_rank(change, atol=1e-6) <= RANK, name  # above rounding
        else:
            assert whole[name].equal(weight), name


def test_a_variant_reads_its_base_and_its_changes(folder):
    base, variant = minisd.load(folder / "base"), minisd.load(folder / "variant")
    after = torch.load(folder / "after.pt")
    assert (variant.unet(X, T, CONTEXT) - after).abs().max() < 2e-3 * after.abs().max()  # the file is in half precision
    assert (base.unet(X, T, CONTEXT) - after).abs().max() > 0.05 * after.abs().max()
    assert all(a.equal(b) for a, b in zip(base.text.parameters(), variant.text.parameters(), strict=True))


def test_a_network_with_changes_can_be_copied(folder):
    unet = minisd.load(folder / "base").unet
    lora.attach(unet, RANK)
    twin = copy.deepcopy(unet)  # as the moving average of a training is
    with torch.no_grad():
        twin.conv_in.parametrizations.weight[0].up.add_(1)
    assert not twin(X, T, CONTEXT).equal(unet(X, T, CONTEXT))


def test_changes_of_another_model_are_refused(folder):
    path = folder / "variant" / "unet.lora.safetensors"
    changes = read_tensors(path)
    for wrong in (
        {"nowhere.lora_up": torch.zeros(4, 2), "nowhere.lora_down": torch.zeros(2, 4)},
        {"conv_in.lora_up": changes["conv_in.lora_up"][1:], "conv_in.lora_down": changes["conv_in.lora_down"]},
        {"conv_in.lora_up": changes["conv_in.lora_up"][:, 1:], "conv_in.lora_down": changes["conv_in.lora_down"]},
        {"conv_in.lora_up": torch.zeros(()), "conv_in.lora_down": torch.zeros(())},
        {"conv_in.lora_up": torch.zeros(16), "conv_in.lora_down": torch.zeros(36)},
        {"conv_in.lora_up": torch.zeros(16, 2, 1), "conv_in.lora_down": torch.zeros(2, 36, 1)},
        {"norm_out.lora_up": torch.zeros(16, 2), "norm_out.lora_down": torch.zeros(2, 1)},
    ):
        save_tensors(path, wrong)
        with pytest.raises(CheckpointError, match="belongs to another"):
            minisd.load(folder / "variant")
    for half in ("conv_in.lora_up", "conv_in.lora_down"):
        save_tensors(path, {half: changes[half]})
        with pytest.raises(CheckpointError, match="half a change"):
            minisd.load(folder / "variant")


@pytest.mark.parametrize("base", ["../base", "nowhere", 7, ""])
def test_a_base_that_is_no_folder_beside_is_refused(folder, base):
    path = folder / "variant" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": base}))
    with pytest.raises(CheckpointError, match=r"base|no such file"):
        minisd.load(folder / "variant")
