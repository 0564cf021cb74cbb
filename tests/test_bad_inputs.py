"""Whatever comes in: one clear error that says what came and what is allowed, before anything is done."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import tiny

import minisd
from minisd import __main__ as command_line
from minisd import image, samplers
from minisd.weights import save_module, write_config

ROOT = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")
PICTURE = Image.new("RGB", (64, 64), "orange")
MASK = Image.new("L", (64, 64), 255)

sd = functools.cache(tiny)


@pytest.fixture
def idle(monkeypatch):
    """The pipeline, with networks that must not be reached."""

    def reached(*_, **__):
        raise AssertionError("a network was run before the input was refused")

    for part in ("unet", "vae"):
        monkeypatch.setattr(getattr(sd(), part), "forward", reached)
    monkeypatch.setattr(sd().vae, "encode", reached)
    return sd()


# What came -> what the error must name. The prompt is "a cat" where a case gives none.
REFUSED = {
    "prompt": [
        (None, "None"),
        ([], "at least one"),
        (7, "7"),
        (b"a cat", "bytes|b'a cat'"),
        (["a cat", None], "number 1.*NoneType"),
        ("a cat \ud83d", "position 6"),
        (["a cat", "\udc00"], "number 1.*position 0"),
        ("(cat:nan)", "weight of 'cat' is nan.*as in"),
        ("(cat:1..2)", "weight '1..2'.*as in"),
    ],
    "negative": [
        (["a", "b"], "2 negative prompts for 1 prompt"),
        (None, "negative prompt.*None"),
        (3, "negative prompt.*3"),
        ("(cat:inf)", "weight of 'cat' is inf"),
    ],
    "size": [
        (0, "size is 0.*from 1"),
        (-64, "size is -64"),
        ("64", "'64'"),
        (True, "True"),
        (64.0, r"64\.0"),
        (NAN, "nan"),
        (60, "60 x 60.*multiples of 8.*(56|64)"),
        ((64, 3), "64 x 3.*64 x 8"),
        ((64,), "width and a height"),
        ((64, 64, 64), "width and a height"),
        (65_536, "65536 x 65536.*GiB.*smaller"),
        (10**9, "1000000000"),
    ],
    "steps": [
        *[(steps, f"steps is {steps!r}.*from 1 to 1000") for steps in (0, -1, True, 2.5, 1001, "20")],
    ],
    "guidance": [(value, f"guidance is {value!r}.*from 0") for value in (NAN, INF, -1, "7", True)],
    "rescale": [(value, f"rescale is {value!r}.*from 0 to 1") for value in (NAN, -0.1, 1.1)],
    "seed": [
        *[(seed, f"seed is {seed!r}.*from 0 to") for seed in (-1, 2**64, 1.5, True, "7")],
        ([1, 2], "2 seeds for 1 picture"),
        ([-1], "seed is -1"),
        ([], "0 seeds for 1 picture"),
    ],
    "tile": [(tile, f"tile is {tile!r}.*from 4") for tile in (0, 3, -8, True, 8.5, "8")],
    "clip_skip": [(skip, f"clip_skip is {skip!r}.*from 1") for skip in (0, -1, 99, True, 1.5)],
    "long_prompts": [("fold", "fold.*chunk"), (None, "None.*chunk")],
    "n": [*[(n, f"n is {n!r}.*from 1") for n in (0, -1, True, 2.5, "2", None)]],
    "sampler": [("euler", "'euler'.*samplers"), (3, "3.*samplers")],
    "schedule": [("nonsense", "nonsense.*karras"), (3, "3.*karras")],
}
CASES = [(name, value, message) for name, cases in REFUSED.items() for value, message in cases]


@pytest.mark.parametrize("name, value, message", CASES, ids=[f"{name}={value!a}" for name, value, _ in CASES])
def test_settings_that_cannot_be_are_refused(idle, name, value, message):
    settings = {"prompt": "a cat", "seed": 1, "steps": 2, "progress": False, name: value}
    with pytest.raises(ValueError, match=message):
        idle(**settings)


@pytest.mark.parametrize("eta", [-0.1, 1.5, NAN])
def test_eta_outside_its_range_is_refused(idle, eta):
    with pytest.raises(ValueError, match=r"eta.*from 0 to 1"):
        idle("a cat", seed=1, steps=2, sampler=functools.partial(samplers.ancestral, eta=eta), progress=False)


@pytest.mark.parametrize("order", [0, 5, 1.5])
def test_orders_that_cannot_be_are_refused(idle, order):
    with pytest.raises(ValueError, match=r"order .* from 1 to 4"):
        idle("a cat", seed=1, steps=2, sampler=functools.partial(samplers.lms, order=order), progress=False)


def test_a_setting_that_does_not_exist_is_named(idle):
    with pytest.raises(TypeError, match="stepz"):
        idle("a cat", stepz=3)


def test_more_pictures_than_the_memory_holds_are_refused(idle, monkeypatch):
    monkeypatch.setattr("minisd.pipeline.free_memory", lambda device: 2**30)
    with pytest.raises(ValueError, match=r"1000 pictures.*GiB.*fewer"):
        idle("a cat", n=1000, size=512, seed=1, progress=False)


SOURCES = {
    "strength": [(value, f"strength is {value!r}.*from 0 to 1") for value in (NAN, INF, -0.1, 1.5, True, "half", None)],
    "picture": [
        (None, "NoneType"),
        ("cat.png", r"str.*image\.read"),
        (np.zeros((64, 64, 3)), r"ndarray.*image\.read"),
        (torch.zeros(3, 64, 64), r"Tensor.*image\.read"),
    ],
    "mask": [(None, "mask.*NoneType|NoneType.*mask"), ("mask.png", r"mask.*str|str.*image\.read")],
}
SOURCE_CASES = [(name, value, message) for name, cases in SOURCES.items() for value, message in cases]


@pytest.mark.parametrize(
    "name, value, message", SOURCE_CASES, ids=[f"{n}={type(v).__name__}-{m[:16]}" for n, v, m in SOURCE_CASES]
)
def test_pictures_masks_and_strengths_that_cannot_be_are_refused(idle, name, value, message):
    settings = {"prompt": "a cat", "picture": PICTURE, "seed": 1, "steps": 2, "progress": False, name: value}
    with pytest.raises(ValueError, match=message):
        idle.inpaint(**{"mask": MASK, **settings})
    if name != "mask":
        with pytest.raises(ValueError, match=message):
            idle.img2img(**settings)


@pytest.mark.parametrize("dtype", ["float8", "half", torch.int8, "", 16])
def test_a_dtype_that_networks_do_not_compute_in_lists_those_they_do(dtype):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        minisd.load(dtype=dtype)


@pytest.mark.parametrize("device", ["tpu7", "cuda:99", "", None, 3.5, "meta"])
def test_a_device_that_is_not_there_lists_those_that_are(device):
    with pytest.raises(ValueError, match="choose one of: cpu"):
        minisd.load(device=device)


@pytest.mark.parametrize("model", ["nowhere", "", "../nowhere", 7])
def test_a_model_that_is_not_there_names_where_it_was_looked_for(model):
    with pytest.raises(minisd.CheckpointError, match="bundled"):
        minisd.load(model)


# What is odd and yet runs


@pytest.mark.parametrize(
    "prompt", ["", " ", "()", "(cat:0)", "(cat:-1)", "cat)])", "BREAK", "猫 😀", "\u202eright to left", "<|endoftext|>"]
)
def test_odd_prompts_draw(prompt):
    assert sd()(prompt, seed=1, steps=1, progress=False).size == (64, 64)


@pytest.mark.parametrize("prompt", ["((((" * 50, "(cat", "[[cat]", "\x1b[31mred"])
def test_brackets_that_are_never_closed_draw_and_say_so(prompt):
    with pytest.warns(UserWarning, match="never closed"):
        assert sd()(prompt, seed=1, steps=1, progress=False).size == (64, 64)


def test_ten_thousand_characters_draw_and_say_what_was_cut():
    with pytest.warns(UserWarning, match=r"kept 75 of \d+ tokens, dropped '"):
        sd()("cat\x1b[31m " * 1250, seed=1, steps=1, progress=False)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "LA", "P", "1", "I;16", "F", "I"])
def test_pictures_and_masks_of_every_mode_are_taken(mode):
    source = Image.new(mode, (64, 64))
    brightest = {"F": 1, "I": 65535, "I;16": 65535}
    mask = (
        Image.new(mode, (64, 64), brightest[mode])
        if mode in brightest
        else Image.new("RGB", (64, 64), "white").convert(mode)
    )
    assert sd().img2img("a cat", source, seed=1, steps=1, progress=False).size == (64, 64)
    assert sd().inpaint("a cat", source, mask, seed=1, steps=1, progress=False).size == (64, 64)


@pytest.mark.parametrize("size, drawn", [((1, 1), "8 x 8"), ((63, 200), "56 x 200")])
def test_pictures_of_odd_sizes_are_resized_and_that_is_said(size, drawn):
    with pytest.warns(UserWarning, match=drawn):
        sd().img2img("a cat", PICTURE.resize(size), seed=1, steps=1, progress=False)


def test_numbers_of_numpy_and_torch_are_numbers():
    first = sd()(
        "a cat", seed=np.int64(3), steps=torch.tensor(2), guidance=np.float32(2), size=np.int32(64), progress=False
    )
    assert first.tobytes() == sd()("a cat", seed=3, steps=2, guidance=2, size=64, progress=False).tobytes()


def test_out_of_memory_says_which_knob_to_turn_and_leaves_the_pipeline_usable():
    def hungry(denoise, x, sigmas, noise):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        yield

    with pytest.raises(MemoryError, match="smaller size"):
        sd()("a cat", seed=1, steps=1, sampler=hungry, progress=False)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("MPS backend out of memory (MPS allocated: 18.1 GB)", MemoryError),
        ("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried", MemoryError),
        ("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried", MemoryError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_only_what_says_that_memory_ran_out_is_taken_for_it(said, error):
    def failing(*_):
        raise RuntimeError(said)

    with pytest.raises(error) as raised:
        sd()("a cat", seed=1, steps=1, sampler=failing, progress=False)
    assert type(raised.value) is error
    assert sd()("a cat", seed=1, steps=1, progress=False).size == (64, 64)


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_config(folder, sd().config)
    sd().tokenizer.save(folder / "tokenizer.txt")
    for name in ("text", "unet", "vae"):
        save_module(getattr(sd(), name), folder / f"{name}.safetensors")
    return str(folder)


@pytest.fixture
def minisd_command(model, tmp_path, monkeypatch, capsys):
    """Runs `minisd ...` in an empty folder; gives exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        draws = arguments[0] not in ("info", "train")
        quick = {"--model": model, "--steps": "1"} if draws else {}
        given = [part for option in quick.items() if option[0] not in arguments for part in option]
        monkeypatch.setattr(sys, "argv", ["minisd", *arguments, *given])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        return (stopped.value.code, *capsys.readouterr())

    return run


def test_the_command_draws_says_where_and_never_overwrites(minisd_command, tmp_path):
    status, said, _ = minisd_command("an orange cat", "--seed", "7")
    assert status == 0 and str(tmp_path / "picture.png") in said
    drawn = (tmp_path / "picture.png").read_bytes()
    status, said, error = minisd_command("a dog", "--seed", "8")
    assert status == 2 and "picture.png exists" in error and "--force" in error and not said
    assert (tmp_path / "picture.png").read_bytes() == drawn
    assert minisd_command("a dog", "--seed", "8", "--force")[0] == 0
    assert (tmp_path / "picture.png").read_bytes() != drawn
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_info_gives_the_settings_back_with_nothing_that_moves_a_terminal(minisd_command, tmp_path):
    minisd_command("a \x1b[31mred\u202e cat — 猫\nseed: 9", "--seed", "7", "-o", "cat.png")
    status, said, _ = minisd_command("info", "cat.png")
    assert status == 0 and "seed: 7\n" in said and "steps: 1\n" in said and "猫" in said
    assert "\\x1b[31mred\\u202e" in said and "\x1b" not in said and "\u202e" not in said and "\nseed: 9" not in said


def test_info_lists_what_a_file_of_weights_holds(minisd_command, model, tmp_path):
    status, said, _ = minisd_command("info", f"{model}/vae.safetensors")
    assert status == 0 and "float16" in said and re.search(r"\d+ tensors, [\d,]+ numbers", said)
    safetensors.torch.save_file({"\x1b[31mred": torch.zeros(2)}, tmp_path / "odd.safetensors")
    status, said, _ = minisd_command("info", "odd.safetensors")
    assert status == 0 and "\\x1b[31mred" in said and "\x1b" not in said


def test_info_says_how_to_draw_the_picture_again(minisd_command, tmp_path):
    image.save(PICTURE, tmp_path / "start it.png")
    image.save(MASK, tmp_path / "mask.png")
    for arguments in (
        ["it's a cat", "--size", "64x32", "--sampler", "heun", "--tile", "8", "--clip-skip", "1"],
        ["img2img", "a cat", "start it.png", "--strength", "0.5", "--negative", "a dog"],
        ["inpaint", "a cat", "start it.png", "mask.png", "--schedule", "trailing"],
    ):
        status, _, error = minisd_command(*arguments, "-o", "first.png", "--force")
        assert status == 0, error
        _, said, _ = minisd_command("info", "first.png")
        (again,) = (line.removeprefix("again: ") for line in said.splitlines() if line.startswith("again: "))
        words = shlex.split(again)
        assert words[0] == "minisd"
        model = words.index("--model")  # its name is no path
        status, _, error = minisd_command(*words[1:model], *words[model + 2 :], "-o", "second.png", "--force")
        assert status == 0, error
        first, second = (Image.open(tmp_path / f"{name}.png") for name in ("first", "second"))
        assert first.tobytes() == second.tobytes() and first.info == second.info


def test_info_looks_at_a_files_first_bytes(minisd_command, model, tmp_path):
    shutil.copy(f"{model}/vae.safetensors", tmp_path / "weights")
    status, said, _ = minisd_command("info", "weights")
    assert status == 0 and re.search(r"\d+ tensors, [\d,]+ numbers", said)


def test_a_warning_is_one_line_that_speaks_of_the_command(minisd_command, tmp_path):
    status, _, error = minisd_command("(a cat")
    (said,) = (line for line in error.splitlines() if "brackets" in line)
    assert status == 0 and said.startswith("minisd: brackets never closed: 1; they last to the end")
    assert "Warning" not in error and ".py" not in error


def test_a_file_that_comes_up_meanwhile_is_kept_and_the_pictures_have_other_names(
    minisd_command, tmp_path, monkeypatch
):
    load = minisd.pipeline.load

    def meanwhile(*arguments, **settings):
        (tmp_path / "b-2.png").write_text("another's")
        return load(*arguments, **settings)

    monkeypatch.setattr(minisd.pipeline, "load", meanwhile)
    status, said, _ = minisd_command("a cat", "-n", "3", "-o", "b.png")
    assert status == 0 and [Path(line.split("  ")[0]).name for line in said.splitlines()] == [
        "b-1.png", "b-2-2.png", "b-3.png",
    ]  # fmt: skip
    assert (tmp_path / "b-2.png").read_text() == "another's"


def test_the_command_shows_nothing_that_moves_a_terminal(minisd_command, tmp_path):
    status, said, _ = minisd_command("a cat", "-o", "\x1b[31mred.png")
    assert status == 0 and "\\x1b[31mred.png" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("closed", "environment"),
    [("2>&-", {}), (">&-", {}), ("", {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"})],
    ids=["no standard error", "no standard output", "latin-1"],
)
def test_the_command_draws_whatever_it_speaks_to(model, tmp_path, closed, environment):
    command = f'"{sys.executable}" -m minisd "(猫" --model "{model}" --steps 1 --seed 1 -o 猫.png {closed}'
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "猫.png").exists()


USAGE = [
    (["a cat", "--steps", "0"], "steps is 0"),
    (["a cat", "--steps", "many"], "--steps.*valid integer"),
    (["a cat", "--seed", "-1"], "seed is -1"),
    (["a cat", "--guidance", "nan"], "guidance is nan"),
    (["a cat", "--size", "60"], "60 x 60"),
    (["a cat", "--size", "64xx64"], "64xx64"),
    (["a cat", "--size", "-64"], "-64"),
    (["a cat", "--n", "0"], "n is 0"),
    (["depth2img", "a cat", "start.png", "--model", "critters-512", "--steps", "1"], "draws from prompts"),
    (["a cat", "--sampler", "magic"], "'magic'.*euler"),
    (["a cat", "--schedule", "magic"], "schedule is 'magic'.*karras"),
    (["a cat", "--device", "tpu"], "'tpu'.*cpu"),
    (["a cat", "--dtype", "int4"], "'int4'.*bfloat16"),
    (["a cat", "--model", "nowhere"], "'nowhere'"),
    (["a cat", "--colour", "red"], "--colour"),
    (["a cat", "-o", "cat.jpg"], r"cat\.jpg.*\.png"),
    (["a cat", "-o", "none/cat.png"], "no folder none"),
    (["a cat", "-o", "folder.png"], "is a folder"),
    (["a cat \udce9"], "position 6"),
    (["img2img", "a cat", "missing.png"], r"missing\.png"),
    (["img2img", "a cat", "text.png"], r"text\.png: not a picture"),
    (["img2img", "a cat", "start.png", "--strength", "1.5"], "strength is 1.5"),
    (["inpaint", "a cat", "start.png", "missing.png"], r"missing\.png"),
    (["upscale", "a cat", "missing.png"], r"missing\.png"),
    (["upscale", "a cat", "start.png"], "draws from prompts"),
    (["upscale", "a cat", "start.png", "--noise-level", "much"], "--noise-level.*valid integer"),
    (["a cat", "--long-prompts", "fold"], "fold.*chunk"),
    (["a cat", "--clip-skip", "0"], "clip_skip is 0"),
    (["a cat", "--rescale", "2"], "rescale is 2"),
    (["info", "missing.png"], r"missing\.png"),
    (["info", "text.png"], r"text\.png"),
    (["info", "missing.safetensors"], r"missing\.safetensors"),
    (["info", "text.safetensors"], r"text\.safetensors"),
    (["train", "everything"], "'everything'.*unet"),
    (["train", "vae", "--steps", "0"], "steps is 0"),
    (["train", "vae", "--renders", "0"], "renders is 0"),
    (["train", "vae", "--minutes", "0"], "minutes is 0"),
]


@pytest.mark.parametrize(
    "arguments, message", USAGE, ids=[" ".join(a).encode("ascii", "replace").decode() for a, _ in USAGE]
)
def test_bad_commands_end_with_one_line_and_status_2(minisd_command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("minisd.critters.workshop.Workshop", lambda *_: pytest.fail("the training was begun"))
    (tmp_path / "text.png").write_text("a cat")
    (tmp_path / "text.safetensors").write_text("a cat")
    (tmp_path / "folder.png").mkdir()
    image.save(PICTURE, tmp_path / "start.png")
    before = sorted(tmp_path.iterdir())
    status, said, error = minisd_command(*arguments)
    assert (status, said) == (2, "")
    assert re.search(message, " ".join(error.split())), error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before
