"""Files of weights: written whole, read strictly, refused with one clear error."""

import json

import pytest
import torch
from torch import nn

from minisd.files import CheckpointError, load_strictly, read_tensors, replacing, save_tensors


def test_round_trip_in_half_precision(tmp_path):
    tensors = {"a": torch.randn(3, 4), "ids": torch.arange(5)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], tensors["a"].half())
    assert torch.equal(back["ids"], tensors["ids"])


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def whole_file():
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (whole_file()[:-1], "not a whole safetensors file"),
        (whole_file() + b"x", "not a whole safetensors file"),
        (b"\xff" * 8 + whole_file()[8:], "not a whole safetensors file"),
        (whole_file()[:-8] + b"\x00\x00\xc0\x7f" + bytes(4), "a holds NaN"),
    ],
    ids=["empty", "lfs", "html", "truncated", "trailing", "header length", "nan"],
)
def test_broken_files_are_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_tensors(path)
    assert "broken.safetensors" in str(error.value)


def test_the_whole_file_reads(tmp_path):
    (tmp_path / "whole.safetensors").write_bytes(whole_file())
    assert torch.equal(read_tensors(tmp_path / "whole.safetensors")["a"], torch.zeros(2))


def test_every_difference_between_file_and_module_is_listed():
    tensors = {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_strictly(nn.Linear(3, 2), tensors, "here.safetensors")
    for part in ("here.safetensors", "missing bias", "unexpected extra", "weight is [2, 2], expected [2, 3]"):
        assert part in str(error.value)
