"""Files of weights: written whole, read strictly, refused with one clear error; nothing in a pickle runs.

Run as a script, it reads many more broken files than the tests do: `python tests/test_files.py 100000 20000`.
"""

import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from minisd.files import replacing
from minisd.weights.tensors import (
    CheckpointError,
    is_finite,
    load_strictly,
    read_metadata,
    read_pickle,
    read_tensors,
    save_tensors,
)


def test_round_trip_in_half_precision(tmp_path):
    tensors = {"a": torch.randn(3, 4), "ids": torch.arange(5)}
    save_tensors(tmp_path / "x.safetensors", tensors, metadata={"of": "a test"})
    back = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], tensors["a"].half())
    assert torch.equal(back["ids"], tensors["ids"])
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "of": "a test"}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_difference_between_file_and_module_is_listed():
    tensors = {"weight": torch.zeros(2, 2), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_strictly(nn.Linear(3, 2), tensors, "here.safetensors")
    for part in ("here.safetensors", "missing bias", "unexpected extra", "weight is [2, 2], expected [2, 3]"):
        assert part in str(error.value)


# safetensors


def packed(header, numbers=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


WHOLE = packed({"a": entry()})
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)
BROKEN = {
    "empty": (b"", "neither a whole safetensors file nor"),
    "text": (b"a cat sat on the mat", "neither a whole safetensors file nor"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(56), "is in the GGUF format"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error>', "web page"),
    "truncated": (WHOLE[:-1], "its last tensor ends at byte 77 of 76"),
    "in the header": (WHOLE[:20], "not a whole safetensors file"),
    "trailing": (WHOLE + b"x", "goes on for 1 bytes after its last tensor"),
    "header length": (b"\xff" * 8 + WHOLE[8:], "not a whole safetensors file"),
    "short header": ((9).to_bytes(8, "little") + WHOLE[8:], "not a whole safetensors file"),
    "no utf-8": (packed(b'{"\xff":0}'), "not a whole safetensors file"),
    "deep": (packed(b'{"a":' * 100_000), "not a whole safetensors file"),
    "nan": (WHOLE[:-8] + struct.pack("<f", float("nan")) + bytes(4), "a holds NaN"),
    "inf": (WHOLE[:-8] + bytes(4) + struct.pack("<f", float("-inf")), "a holds NaN or infinity"),
    "fp8 nan": (packed({"a": entry((8,), dtype="F8_E4M3")}, b"\x7f" * 8), "a holds NaN"),
    "overlap": (packed({"a": entry(), "b": entry((1,), 4, 8)}), "not a whole safetensors file"),
    "twice the same bytes": (packed({"a": entry(), "b": entry()}), "not a whole safetensors file"),
    "hole": (packed({"a": entry((1,), 4, 8)}), "not a whole safetensors file"),
    "twice": (packed(TWICE), "names a twice"),
    "size": (packed({"a": entry((3,))}), "not a whole safetensors file"),
    "overflow": (packed({"a": entry((2**62, 4))}), "not a whole safetensors file"),
    "negative": (packed({"a": entry((-2, -1))}), "not a whole safetensors file"),
    "fraction": (packed({"a": entry((2.0,))}), "not a whole safetensors file"),
    "backwards": (packed({"a": entry((0,), 8, 0)}, b""), "not a whole safetensors file"),
    "no entry": (packed({"a": [1, 2]}), "not a whole safetensors file"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [2]}}), "not a whole safetensors file"),
    "dtype": (packed({"a": entry((1,), dtype="C64")}), "a is C64; read are F64"),
    "no shape": (packed({"a": entry("")}), "not a whole safetensors file"),
    "shape a table": (packed({"a": entry() | {"shape": {}}}), "not a whole safetensors file"),
    "shape beyond counting": (packed({"a": entry((0, 2**63), 0, 0)}, b""), "a has the shape .0, 9223372036854775808."),
    "shape of many digits": (packed({"a": entry((10**4000,))}), "not a whole safetensors file"),
    "header of gigabytes": ((10**9).to_bytes(8, "little") + WHOLE[8:], "not a whole safetensors file"),
    "dtype no text": (packed({"a": entry(dtype=[1])}), "not a whole safetensors file"),
    "metadata": (packed({"__metadata__": {"x": 1}, "a": entry()}), "not a whole safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, case):
    content, reason = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_tensors(path)
    assert "broken.safetensors" in str(error.value)


def test_the_whole_file_reads(tmp_path):
    (tmp_path / "whole.safetensors").write_bytes(WHOLE)
    assert torch.equal(read_tensors(tmp_path / "whole.safetensors")["a"], torch.zeros(2))


def test_numbers_that_are_not_finite_pass_where_that_is_asked_for(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(BROKEN["nan"][0])
    assert read_tensors(tmp_path / "x.safetensors", finite=False)["a"].isnan().tolist() == [True, False]


def test_every_precision_is_read_wherever_it_lies(tmp_path):
    """Odd offsets, scalars, nothing at all: the same as the published library reads."""
    kinds = [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
    tensors = {str(kind): torch.randn(3, 5).to(kind) for kind in kinds}
    tensors |= {
        "ids": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "yes": torch.ones(3) > 0,
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    odd = (int.from_bytes(content[:8], "little") + 1).to_bytes(8, "little") + content[8:]
    at = 8 + int.from_bytes(content[:8], "little")
    (tmp_path / "odd.safetensors").write_bytes(odd[:at] + b" " + odd[at:])
    for name in ("x.safetensors", "odd.safetensors"):
        back = read_tensors(tmp_path / name)
        assert list(back) == list(safetensors.torch.load_file(tmp_path / "x.safetensors"))
        for key, tensor in tensors.items():
            assert back[key].dtype == tensor.dtype and torch.equal(back[key].double(), tensor.double())


def test_tensors_stay_in_the_file_and_the_file_stays_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(1000), "b": torch.ones(1000)}, torch.float32)
    before = path.read_bytes()
    tensors = read_tensors(path)
    assert tensors["a"].untyped_storage().data_ptr() == tensors["b"].untyped_storage().data_ptr()
    tensors["a"].mul_(2)
    assert path.read_bytes() == before and (read_tensors(path)["a"] == 1).all()


def test_shards_are_put_together_and_must_be_what_the_index_says(tmp_path):
    save_tensors(tmp_path / "m-1.safetensors", {"a": torch.ones(2), "b": torch.ones(3)})
    save_tensors(tmp_path / "m-2.safetensors", {"c": torch.ones(4)})
    index = tmp_path / "m.safetensors.index.json"
    places = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 18}, "weight_map": places}))
    assert {name: len(t) for name, t in read_tensors(index).items()} == {"a": 2, "b": 3, "c": 4}
    for wrong, reason in (
        (places | {"d": "m-2.safetensors"}, "disagree on d"),
        ({"a": "m-1.safetensors"}, "disagree on b"),
        (places | {"d": "m-3.safetensors"}, "m-3.safetensors: no such file"),
        (places | {"d": "../m-2.safetensors"}, "beside it"),
        (places | {"d": index.name}, "beside it"),
        (None, "not an index"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match=reason):
            read_tensors(index)


# .ckpt


def archive(program, members=(), compression=zipfile.ZIP_STORED, root="archive"):
    """A .ckpt of a pickle and storages, as torch.save lays it out."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as file:
        file.writestr(f"{root}/data.pkl", program)
        file.writestr(f"{root}/version", "3\n")
        for name, numbers in dict(members).items():
            file.writestr(f"{root}/{name}", numbers)
    return content.getvalue()


class ModelCheckpoint:
    """What Lightning leaves in a checkpoint, under the name it has there."""

    def __init__(self):
        self.best = np.float32(1.5)


def test_a_checkpoint_of_lightning_is_read_and_none_of_its_classes_is_needed(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setattr(ModelCheckpoint, "__module__", name)
    for i in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), types.ModuleType(name))
    monkeypatch.setitem(sys.modules, name, module)
    weight = torch.arange(6.0)
    state = collections.OrderedDict(a=weight.view(2, 3), tail=weight[4:], turned=weight.view(2, 3).T)
    state |= {"half": torch.randn(3).half(), "brain": torch.randn(3).bfloat16(), "ids": torch.arange(3)}
    state |= {"parameter": nn.Parameter(torch.ones(2)), "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}
    loaded = {
        "epoch": 3,
        "global_step": np.int64(875_000),
        "callbacks": {ModelCheckpoint: {"it": ModelCheckpoint()}, (1, 2): 0},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 1e-4, "betas": (0.9, 0.999)}],
        "state_dict": state,
    }
    for nested in (loaded, {"state_dict": loaded}, state):
        torch.save(nested, tmp_path / "x.ckpt")
        with monkeypatch.context() as without:
            without.delitem(sys.modules, name)
            back = read_tensors(tmp_path / "x.ckpt")
        assert list(back) == list(state)
        assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    torch.save(loaded, tmp_path / "x.ckpt")
    whole = read_pickle(tmp_path / "x.ckpt")
    assert whole["epoch"] == 3 and whole["optimizer_states"][0]["betas"] == (0.9, 0.999)
    assert whole["global_step"].name.endswith("multiarray.scalar")
    assert whole["callbacks"] == {}  # its keys are classes and tuples


def test_what_an_embedding_holds_can_be_told(tmp_path):
    parameters = nn.ParameterDict({"*": torch.ones(2, 4)})
    torch.save({"string_to_param": parameters, "string_to_token": {"*": 265}, "seen": {1, 2}}, tmp_path / "x.pt")
    whole = read_pickle(tmp_path / "x.pt")
    assert whole["string_to_param"].name == "torch.nn.modules.container.ParameterDict"
    assert torch.equal(whole["string_to_param"].state["_parameters"]["*"], torch.ones(2, 4))
    assert whole["string_to_token"] == {"*": 265}
    torch.save({"string_to_param": {"*": torch.ones(2, 4)}}, tmp_path / "x.pt")
    assert list(read_tensors(tmp_path / "x.pt")) == ["string_to_param.*"]


def tensor_program(count=4, offset=0, size=(4,), stride=(1,), kind="FloatStorage", end=b"."):
    """The pickle of {"a": a tensor}."""

    def tuple_of(numbers):
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in numbers) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n%s\nX\x01\0\0\0000X\x03\0\0\0cpu" % kind.encode()
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset)
    made += tuple_of(size) + tuple_of(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}X\x01\0\0\0a" + made + b"s" + end


FLOATS = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}
GOOD = archive(tensor_program(), FLOATS)
BROKEN_CKPT = {
    "compressed": (archive(tensor_program(), FLOATS, zipfile.ZIP_DEFLATED), "compressed"),
    "no pickle": (archive(tensor_program(), FLOATS).replace(b"data.pkl", b"date.pkl"), "no data.pkl"),
    "no storage": (archive(tensor_program()), "KeyError"),
    "storage too short": (archive(tensor_program(count=5), FLOATS), "has 4 numbers, not 5"),
    "storage too long": (archive(tensor_program(count=3, size=(3,)), FLOATS), "has 4 numbers, not 3"),
    "kind": (archive(tensor_program(kind="OddStorage"), FLOATS), "OddStorage"),
    "beyond": (archive(tensor_program(size=(5,)), FLOATS), "reaches beyond"),
    "beyond by offset": (archive(tensor_program(offset=1), FLOATS), "reaches beyond"),
    "beyond by stride": (archive(tensor_program(size=(2,), stride=(4,)), FLOATS), "reaches beyond"),
    "repeated": (archive(tensor_program(size=(2**30,), stride=(0,)), FLOATS), "reaches beyond"),
    "backwards": (archive(tensor_program(offset=3, stride=(-1,)), FLOATS), "reaches beyond"),
    "negative": (archive(tensor_program(size=(-1, -4), stride=(1, 1)), FLOATS), "reaches beyond"),
    "no end": (archive(tensor_program(end=b""), FLOATS), "not a whole .ckpt"),
    "nothing": (archive(b""), "not a whole .ckpt"),
    "big-endian": (archive(tensor_program(), FLOATS | {"byteorder": b"big"}), "big-endian"),
    "nan": (archive(tensor_program(), {"data/0": struct.pack("<4f", 1, 2, 3, float("nan"))}), "a holds NaN"),
    "truncated": (GOOD[:-30], "not a whole .ckpt"),
    "no list of members": (GOOD[:60], "not a whole .ckpt"),
}


@pytest.mark.parametrize("case", BROKEN_CKPT)
def test_broken_checkpoints_are_refused_by_name(tmp_path, case):
    content, reason = BROKEN_CKPT[case]
    (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_tensors(tmp_path / "broken.ckpt")
    assert "broken.ckpt" in str(error.value)


def long_number(digits):
    """A number of so many digits, for the memo of a pickle."""
    return b"\x8b" + struct.pack("<i", digits) + b"\x7f" * digits + b"q\1"


def table_in_many_places(names, entries):
    """The pickle of one table with names to no numbers, put under many names of another one."""
    inner = b"}q\0(" + b"".join(text(str(i)) + b"K\0" for i in range(entries)) + b"u"
    return b"\x80\x02" + inner + b"}(" + b"".join(text(str(i)) + b"h\0" for i in range(names)) + b"u."


def tensors_on_one_storage(count):
    """Many tensors on one storage, which does not lie at a multiple of its numbers' size."""
    program = b"\x80\x02}(" + b"".join(text(str(i)) + tensor_program(count=50_000)[9:-2] for i in range(count)) + b"u."
    for shift in range(1, 9):
        content = archive(program, {"x" * shift: b"", "data/0": bytes(200_000)})
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            info = file.getinfo("archive/data/0")
        if (info.header_offset + 30 + len(info.filename)) % 4:
            return content
    raise AssertionError("it is aligned")


def test_small_files_cannot_take_much_time_or_memory(tmp_path):
    path = tmp_path / "x.ckpt"
    nested = b"(K\1K\1t" + b"q\0h\0\x86" * 60
    for program, reason in (
        (b"\x80\x02" + long_number(10**6) + b"(" + b"h\1" * 10_000 + b"t.", "it holds a number of 7999999 bits"),
        (tensor_program(size=(1,) * 10_000, stride=(0,) * 10_000), "10000 dimensions"),
        (b"\x80\x04" + text("a" * 10**6) + b"q\0" + b"h\0h\0\x93" * 10_000 + b".", "letters"),
        (b"\x80\x04" + nested + b"q\0h\0h\0\x93.", "no text"),
        (tensor_program().replace(text("0"), nested), "no text"),
        (table_in_many_places(20_000, 20_000), "more than 100000 tensors"),
    ):
        path.write_bytes(archive(program, FLOATS))
        start = time.perf_counter()
        with pytest.raises(CheckpointError, match=reason):
            read_tensors(path)
        assert time.perf_counter() - start < 5
    names = [json.dumps({str(i): entry((0,), 0, 0)})[1:-1] for i in (*range(30_000), 29_999)]
    (tmp_path / "x.safetensors").write_bytes(packed(f"{{{','.join(names)}}}".encode(), b""))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="names 29999 twice"):
        read_tensors(tmp_path / "x.safetensors")
    assert time.perf_counter() - start < 5


def test_what_is_written_is_for_everybody_the_umask_lets(tmp_path):
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        save_tensors(tmp_path / f"{mask}.safetensors", {"a": torch.ones(2)})
        os.umask(before)
        assert (tmp_path / f"{mask}.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_sum_that_overflows_is_looked_at_again():
    """Finite numbers whose sum is none; and one NaN or infinity among them, wherever it is."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        full = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
        assert not full.sum().isfinite() and is_finite(full)
        for wrong in (float("nan"), float("inf"), float("-inf")):
            for at in (0, 57, 99):
                for numbers in (full.clone(), torch.zeros(100, dtype=dtype)):
                    numbers[at] = wrong
                    assert not is_finite(numbers)


def test_a_storage_that_is_not_aligned_is_copied_once(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(tensors_on_one_storage(200))
    tensors = read_tensors(tmp_path / "x.ckpt", finite=False)
    assert len(tensors) == 200 and len({t.untyped_storage().data_ptr() for t in tensors.values()}) == 1


def test_members_that_overlap_are_refused(tmp_path):
    """The list of members names one stretch of the file twice: each name could be asked for a copy of its own."""
    content = archive(tensor_program(count=1000, size=(1000,)), {"data/0": bytes(4000)})
    (tmp_path / "x.ckpt").write_bytes(content)
    assert len(read_tensors(tmp_path / "x.ckpt")["a"]) == 1000
    end = content.rindex(b"PK\5\6")
    record = content[content.rindex(b"PK\1\2", 0, end) : end]
    head, tail = content[: end - len(record)] + record + record.replace(b"data/0", b"data/1"), bytearray(content[end:])
    count, size = struct.unpack("<HI", tail[10:16])
    tail[8:16] = struct.pack("<HHI", count + 1, count + 1, size + len(record))
    (tmp_path / "x.ckpt").write_bytes(head + bytes(tail))
    with pytest.raises(CheckpointError, match="overlap"):
        read_tensors(tmp_path / "x.ckpt")


def test_the_checkpoint_made_here_is_whole(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(GOOD)
    assert (
        read_tensors(tmp_path / "x.ckpt")["a"].tolist() == torch.load(tmp_path / "x.ckpt")["a"].tolist() == [1, 2, 3, 4]
    )


def test_the_format_before_zip_files_is_refused_with_the_way_out(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6.*weights_only=True"):
        read_tensors(tmp_path / "old.ckpt")


# Nothing in a pickle runs


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def calls(module, name, *arguments):
    """The same call in the five ways a pickle can say it."""
    given = b"".join(text(a) if isinstance(a, str) else pickle.dumps(a, 2)[2:-1] for a in arguments)
    function = f"c{module}\n{name}\n".encode()
    return {
        "reduce": b"\x80\x02" + function + b"(" + given + b"tR.",
        "stack global": b"\x80\x04" + text(module) + text(name) + b"\x93(" + given + b"tR.",
        "inst": b"(" + given + f"i{module}\n{name}\n.".encode(),
        "obj": b"\x80\x02(" + function + given + b"o.",
        "new object": b"\x80\x02" + function + b"(" + given + b"t\x81.",
    }


def malicious(marker):
    """Programs that would leave a file, or run for ever, on Python's own machine."""
    write = f"open({str(marker)!r}, 'w')"
    programs = {
        f"{module}.{name} by {way}": program
        for module, name, arguments in (
            ("builtins", "exec", [write]),
            ("builtins", "eval", [write]),
            ("builtins", "open", [str(marker), "w"]),
            ("os", "system", [f"touch {marker}"]),
            ("posix", "mkdir", [str(marker)]),
        )
        for way, program in calls(module, name, *arguments).items()
    }
    for module, name, arguments in (
        ("subprocess", "getoutput", [f"touch {marker}"]),
        ("pathlib", "Path.touch", [str(marker)]),
        ("timeit", "timeit", [write]),
        ("cProfile", "run", [write]),
        ("pickle", "loads", [calls("builtins", "exec", write)["reduce"]]),
        ("torch", "save", [[1], str(marker)]),
        ("numpy", "save", [str(marker), [1]]),
        ("minisd_evil", "x", []),
        ("shutil", "copy", [__file__, str(marker)]),
    ):
        programs[f"{module}.{name}"] = calls(module, name, *arguments)["reduce"]
    run = calls("builtins", "exec", write)["reduce"][2:-1]
    reduce = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    programs |= {
        "arguments of a tensor": reduce + b"(" + run + b"tR.",
        "state of a class": b"\x80\x02ccollections\nOrderedDict\n}" + text("__init__") + run + b"sb.",
        "state of a function": reduce + b"N}" + text("__defaults__") + run + b"s\x86b.",
        "key of a table": b"\x80\x02}" + run + b"I1\ns.",
        "persistent name": b"\x80\x02" + run + b"Q.",
        "persistent text": b"\x80\x02P" + write.encode() + b"\n.",
        "registered extension": b"\x80\x02\x82\x01)R.",
        "call of what was made": b"\x80\x02" + run + b")R.",
        "table in itself": b"\x80\x02}q\0" + text("state_dict") + b"h\0s.",
        "key that takes for ever to hash": b"\x80\x02}(K\x01K\x01\x86" + b"q\0h\0\x86" * 60 + b"K\x01u.",
        "tensors in tensors": b"\x80\x02}q\0" + b"".join(text("ab"[i % 2]) + b"h\0s" for i in range(40)) + b".",
    }
    return programs


def test_nothing_in_a_pickle_runs(tmp_path, monkeypatch):
    (tmp_path / "minisd_evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    marker, path = tmp_path / "marker", tmp_path / "x.ckpt"
    programs = malicious(marker)
    pickle.loads(programs["builtins.exec by reduce"])  # they do what they say on Python's own machine
    assert marker.exists()
    marker.unlink()
    assert len(programs) >= 30
    for name, program in programs.items():
        path.write_bytes(archive(program))
        before = set(sys.modules)
        try:
            assert read_tensors(path) == {}, name
        except CheckpointError:
            pass
        assert not marker.exists(), name
        assert set(sys.modules) == before, name


# Broken at random


def mutations(whole, seed):
    """Files one to three changes away from a whole one: bytes, cuts, insertions, copies, numbers of another size."""
    rng = random.Random(seed)
    while True:
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content) + 1)
            length = rng.choice([1, 1, 1, 2, 4, 8, 50])
            match rng.randrange(5):
                case 0:
                    content[at : at + length] = rng.randbytes(length)
                case 1:
                    del content[at : at + length]
                case 2:
                    content[at:at] = content[rng.randrange(len(content) + 1) :][:length]
                case 3:
                    del content[at:]
                case 4:
                    content[at : at + 1] = rng.choice([b"\0", b"\xff", b"9", b"-", b'"', b"}", b"(", b"t", b"R", b"."])
        yield bytes(content)


def read_broken(whole, count, seed):
    """How many of the broken files are refused; any other end than CheckpointError or tensors is an error."""
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for content, _ in zip(mutations(whole, seed), range(count), strict=False):
            path.write_bytes(content)
            try:
                tensors = read_tensors(path)
            except CheckpointError as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert sum(t.numel() for t in tensors.values()) <= len(whole) + 200
            path.unlink()
    return refused


def samples():
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(3).half(), "c": torch.arange(4), "d": torch.zeros(())}
    content = io.BytesIO()
    torch.save({"state_dict": tensors | {"t": tensors["a"].T}, "epoch": 3, "lr": [1e-4, None, True]}, content)
    return safetensors.torch.save(tensors, {"format": "pt"}), content.getvalue()


def test_files_broken_at_random_end_in_one_kind_of_error():
    single, pickled = samples()
    assert 1000 < read_broken(single, 2000, seed=0) < 2000
    assert 500 < read_broken(pickled, 1000, seed=0) < 1000


if __name__ == "__main__":
    for name, whole, count in zip(("safetensors", ".ckpt"), samples(), map(int, sys.argv[1:]), strict=True):
        start = time.perf_counter()
        refused = read_broken(whole, count, seed=1)
        print(f"{name}: {refused} of {count} refused, the others read; {time.perf_counter() - start:.1f} s")
