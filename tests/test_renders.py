"""Renders on the disk: mapped, not read whole; resumed where they stopped; refused where they are something else."""

import numpy as np
import pytest
import torch

from minisd.critters import data, render
from minisd.critters.data import Renders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", 4)
        Renders(folder, 6, 64, seed=5)
    return folder


@pytest.fixture
def renders(folder, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr(data, "render", None)  # everything is there: nothing is rendered again
    return Renders(folder, 6, 64, seed=5)


def test_pictures_and_parts_are_those_of_their_scenes(renders):
    assert len(renders) == len(renders.scenes) == 6
    indices = torch.tensor([5, 0, 3])
    fresh = render([renders.scenes[i] for i in indices], 64)
    assert (renders.pictures(indices) - fresh.image).abs().max() <= 1 / 255
    assert renders.parts(indices).equal(fresh.parts.byte())


def test_some_are_mirrored_with_their_parts(renders):
    indices, mirrored = torch.tensor([1, 1]), torch.tensor([False, True])
    for maps in (renders.pictures(indices, mirrored), renders.parts(indices, mirrored)):
        assert maps[1].equal(maps[0].flip(2)) and not maps[1].equal(maps[0])


def test_shrunk_parts_are_those_in_the_middle_of_the_shrunk_pixels(renders):
    assert renders.shrunk_parts(16).equal(renders.parts(torch.arange(6))[:, 0, 2::4, 2::4])


def test_they_are_mapped_not_read(renders):
    assert len(renders.files) == 2 and all(isinstance(file, np.memmap) for file in renders.files)


@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x03\x04 half of an archive", "plain"], ids=repr)
def test_a_file_of_something_else_is_named(renders, tmp_path, content):
    path = tmp_path / "64-5-0000.npy"
    if content == "plain":
        np.save(path, np.zeros(4))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"64-5-0000\.npy is not what was stored there; remove it") as error:
        Renders(tmp_path, 4, 64, seed=5)
    assert "pickle" not in str(error.value)
