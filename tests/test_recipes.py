"""The recipes of the bundled model, run in miniature from the renders to a picture."""

import dataclasses
import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ENVIRONMENT, TORCHRUN
from tiny import CONFIG

import minisd
from minisd.__main__ import app
from minisd.adapters import controlnet
from minisd.config import CRITTERS_HINT
from minisd.critters import recipes, stages
from minisd.critters.data import (
    Renders,
)
from minisd.critters.workshop import Workshop
from minisd.train import TrainConfig, loop, losses
from minisd.vae import VAE
from minisd.weights import read_tensors

SHORT = {"steps": 2, "batch_size": 4, "bf16": False}
PRESET = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocabulary=560, projection=128))


def few(monkeypatch):
    """Few captions for the tokenizer, and few renders a file."""
    monkeypatch.setattr(recipes, "CAPTIONS", 200)
    monkeypatch.setattr("minisd.critters.data.CHUNK", 24)


def test_recipes_make_a_model_that_draws(tmp_path, monkeypatch):
    few(monkeypatch)
    shop = Workshop(tmp_path, torch.device("cpu"), renders=24, preset=PRESET)
    for name, (recipe, run) in recipes.RECIPES.items():
        before = read_tensors(shop.model / "vae.safetensors") if name == "decoder" else None
        records = list(recipe(shop, dataclasses.replace(run, **SHORT)))
        assert [r.step for r in records] == [1, 2], name
        assert all(torch.isfinite(torch.tensor(r.loss)) for r in records)
        rows = [row.split(",") for row in (tmp_path / f"tiny-{name}.csv").read_text().splitlines()]
        assert [(int(step), float(loss)) for step, loss, *_ in rows] == [(r.step, round(r.loss, 5)) for r in records]
        if before:
            same = {k for k, tensor in read_tensors(shop.model / "vae.safetensors").items() if tensor.equal(before[k])}
            moved = {k.split(".")[0] for k in before.keys() - same}
            assert "decoder" in moved and moved <= {"decoder", "post_quant"}  # the latents mean what they meant

    sd = minisd.load(tmp_path / "tiny")
    picture = sd("a cat", seed=1, steps=2, progress=False)
    assert picture.size == (64, 64)
    settings = {"seed": 1, "steps": 2, "guidance": 3, "progress": False}
    for name in ("inpaint", "depth", "upscale", "distilled"):
        variant = minisd.load(tmp_path / f"tiny-{name}")
        assert all(a.equal(b) for a, b in zip(variant.vae.parameters(), sd.vae.parameters(), strict=True))
        if name == "depth":
            drawn = variant.depth2img("a cat", picture, strength=1, **settings)
        elif name == "upscale":
            drawn = variant.upscale("a cat", picture.resize((8, 8)), **settings)
        else:
            drawn = variant("a cat", **settings)
        assert drawn.info["model"] == f"tiny-{name}"
        # Two steps of training at a rising rate move it a little from where it starts, which is the model itself.
        assert 0 < np.abs(np.asarray(drawn, np.float32) - np.asarray(picture, np.float32)).mean() < 20, name
    control = controlnet.read(shop.model / "control.lora.safetensors", sd.unet, CRITTERS_HINT)
    assert any(zero.weight.abs().max() > 0 for zero in control.zeros)
    pixels = shop.data().pictures(torch.arange(24))
    assert abs(sd.encode(pixels).std() - 1) < 0.1  # the scaling factor was measured on these very pictures

    again = list(recipes.vae(shop, dataclasses.replace(recipes.VAE_RUN, **SHORT)))
    assert again == []  # the run is over: resuming has nothing left to do


def test_a_name_stands_for_its_recipes():
    assert recipes.chosen("unet") == [("unet", recipes.unet, recipes.UNET_RUN)]
    assert [name for name, *_ in recipes.chosen("all")] == ["vae", "unet", "clip", "decoder"]
    with pytest.raises(ValueError, match="unknown; choose"):
        recipes.chosen("everything")


def in_a_row(folder):
    """The losses of some recipes whose losses are means over samples, one building on the other; then clip is run."""
    shop, losses = Workshop(folder, torch.device("cpu"), renders=24, preset=PRESET), {}
    for name in ("vae", "unet", "decoder", "inpaint", "clip"):
        recipe, run = recipes.RECIPES[name]
        losses[name] = [record.loss for record in recipe(shop, dataclasses.replace(run, **SHORT))]
    return losses


TWO = """
import sys, time
from pathlib import Path
import pytest, torch
from test_recipes import few, in_a_row, losses
from minisd.critters import workshop
from minisd.train.loop import share, start_processes

start_processes()
with pytest.MonkeyPatch.context() as patch:
    few(patch)
    patch.setattr(losses, "COLOUR_WEIGHT", 0)
    write = workshop.write_config if share()[0] == 0 else lambda *_: pytest.fail("the second process writes, too")
    # Files are late: they must not be read before they are there.
    patch.setattr(workshop, "write_config", lambda *arguments: (time.sleep(0.5), write(*arguments)))
    torch.save(in_a_row(Path(sys.argv[1], "two")), f"{sys.argv[1]}/{share()[0]}.pt")
"""


def test_recipes_in_a_row_are_the_same_in_two_processes(tmp_path, monkeypatch):
    few(monkeypatch)
    monkeypatch.setattr(losses, "COLOUR_WEIGHT", 0)  # of a part that is no mean over samples
    Renders(tmp_path / "one/renders", 24, PRESET.size)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    alone = in_a_row(tmp_path / "one")
    (tmp_path / "two.py").write_text(TWO)
    subprocess.run([*TORCHRUN, tmp_path / "two.py", tmp_path], check=True, timeout=600, env=ENVIRONMENT)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in ("vae", "unet", "decoder", "inpaint"):
            assert found[name] == pytest.approx(alone[name], rel=1e-5), name  # measured: 2e-7
    one, two = (
        {path.relative_to(folder) for path in folder.rglob("*") if "renders" not in path.parts}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


def test_a_name_with_a_dot_is_kept_apart_by_recipe(tmp_path, monkeypatch):
    few(monkeypatch)
    shop = Workshop(tmp_path, torch.device("cpu"), 24, dataclasses.replace(PRESET, name="tiny-0.5"))
    for name in ("vae", "pixels"):
        recipe, run = recipes.RECIPES[name]
        assert len(list(recipe(shop, dataclasses.replace(run, **SHORT)))) == 2
        assert all((tmp_path / f"tiny-0.5-{name}.{kind}").exists() for kind in ("pt", "csv"))


ALONE = ("oracle", "segmenter", "estimator", "pixels")  # recipes that need no other one's parts


def test_a_recipe_says_at_once_which_other_must_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(Renders, "__init__", lambda *_, **__: pytest.fail("renders are made"))
    monkeypatch.setattr(recipes.Tokenizer, "train", lambda *_, **__: pytest.fail("a tokenizer is trained"))
    shop, alone = Workshop(tmp_path, torch.device("cpu"), 24, PRESET), {"vae", *ALONE}
    for name in recipes.RECIPES.keys() - alone:
        with pytest.raises(ValueError, match=r"tiny has no .*vae\.safetensors yet: run vae first"):
            next(recipes.RECIPES[name][0](shop))
    shop.keep(PRESET, vae=VAE(PRESET.vae))
    for name in recipes.RECIPES.keys() - alone - {"decoder", "unet"}:
        with pytest.raises(ValueError, match=r"tiny has no tokenizer\.txt.* yet: run unet first"):
            next(recipes.RECIPES[name][0](shop))


@pytest.fixture
def terminable():
    """What the programs make of SIGTERM is theirs alone."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def carried_out(monkeypatch, terminable):
    """What `minisd train` and `make.py` would do."""
    seen = []

    def recipe(shop, run):
        seen.append((shop, run))
        yield from ()

    monkeypatch.setattr(recipes, "RECIPES", {name: (recipe, run) for name, (_, run) in recipes.RECIPES.items()})
    monkeypatch.setattr(stages, "RECIPES", recipes.RECIPES)
    return seen


def test_settings_of_the_command_line_arrive(tmp_path, carried_out):
    options = "--steps 7 --batch 8 --lr 0.01 --cooldown 0.5 --ema 0.9 --seed 3 --no-bf16 --minutes 2 --renders 9"
    arguments = ["train", "unet", "--folder", str(tmp_path), *options.split(), "--render-seed", "4", "--workers", "2"]
    app(arguments, standalone_mode=False)
    ((shop, run),) = carried_out
    given = {"steps": 7, "batch_size": 8, "lr": 0.01, "cooldown": 0.5, "ema": 0.9, "seed": 3, "bf16": False}
    assert run == dataclasses.replace(recipes.UNET_RUN, **given, minutes=2.0)
    assert (shop.folder, shop.renders, shop.render_seed, shop.workers) == (tmp_path, 9, 4, 2)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    app(["train", "all", "--folder", str(tmp_path)], standalone_mode=False)
    assert [run for _, run in carried_out[1:]] == [run for *_, run in recipes.chosen("all")]
    assert carried_out[1][0] == Workshop(tmp_path, shop.device)


@pytest.mark.parametrize("option, value", [
    ("batch", "0"), ("lr", "0"), ("lr", "nan"), ("cooldown", "1.5"), ("ema", "-1"), ("seed", "-1"),
    ("render-seed", "-1"), ("workers", "-1"),
])  # fmt: skip
def test_settings_of_the_command_line_are_checked(tmp_path, carried_out, option, value):
    name = {"batch": "batch_size", "render-seed": "render_seed"}.get(option, option)
    with pytest.raises(ValueError, match=rf"{name} is {value}(\.0)?; it must be"):
        app(["train", "vae", "--folder", str(tmp_path), f"--{option}", value], standalone_mode=False)
    assert carried_out == []


MODELS = Path(__file__).parents[1] / "assets/models"


def make(*arguments, **options):
    """`assets/models/make.py`, in this process."""
    spec = importlib.util.spec_from_file_location("make", MODELS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments], **options)


def test_the_run_file_says_what_the_card_says(tmp_path, carried_out):
    make("--folder", tmp_path)
    tables = tomllib.loads((MODELS / "run.toml").read_text())
    runs = {name: run for name, (_, run) in zip(tables, carried_out, strict=True)}
    settings = {"renders", "render_seed", *(field.name for field in dataclasses.fields(TrainConfig))}
    for name, (shop, run) in zip(tables, carried_out, strict=True):
        assert tables[name].keys() == settings - {"betas", "max_grad_norm", "minutes"}, name
        assert {**vars(run), "renders": shop.renders, "render_seed": shop.render_seed}.items() >= tables[name].items()
    card = (MODELS / "README.md").read_text()
    rows = re.findall(r"^\| `minisd train (\w+)` \| ([^|]+) \|", card, re.MULTILINE)
    assert {name for name, _ in rows} == runs.keys()
    stand_ins = {"vae", "pixels", "oracle"}  # for what can't be made again so
    for name, length in rows:
        assert name in stand_ins or length == f"{runs[name].steps:,} x {runs[name].batch_size}"

    carried_out.clear()
    make("--folder", tmp_path, "--only", "refine", "unet", "--workers", "3")
    assert [run for _, run in carried_out] == [runs["unet"], runs["refine"]] and carried_out[0][0].workers == 3
    with pytest.raises(SystemExit):
        make("--only", "everything")


@pytest.mark.parametrize("text, problem", [
    ("[everything]\nsteps = 2", "'everything' is unknown"),
    ("[vae]\nstepz = 2", "vae has no setting stepz"),
    ("[vae]\nsteps = 0", "steps is 0"),
    ("[vae]\nlr = '1e-3'", "lr is '1e-3'"),
    ("[vae]\nrenders = 2.5", "renders is 2.5"),
    ("steps = 2", "steps is no table"),
    ("[vae", "Expected"),
])  # fmt: skip
def test_a_wrong_run_file_is_refused(tmp_path, text, problem):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.toml: .*{problem}"):
        stages.read_stages(tmp_path / "run.toml")


def test_a_run_file_is_carried_out(tmp_path, monkeypatch, terminable):
    few(monkeypatch)
    short = "steps = 2\nbatch_size = 4\nbf16 = false\nrenders = 24\nrender_seed = 3\n"
    (tmp_path / "run.toml").write_text(f"[vae]\n{short}\n[unet]\n{short}")
    workers, loader = [], loop.DataLoader
    monkeypatch.setattr(loop, "DataLoader", lambda *a, **k: workers.append(k["num_workers"]) or loader(*a, **k))
    make(tmp_path / "run.toml", "--folder", tmp_path, "--workers", "1", preset=PRESET)
    assert workers == [1, 1]
    assert minisd.load(tmp_path / "tiny")("a cat", seed=1, steps=2, progress=False).size == (64, 64)
    assert list((tmp_path / "renders").glob("64-3-0000*")) and not list((tmp_path / "renders").glob("64-0-*"))


def test_a_stage_that_fails_ends_the_program_and_is_named(tmp_path):
    (tmp_path / "run.toml").write_text("[unet]\n")
    command = [sys.executable, MODELS / "make.py", tmp_path / "run.toml", "--folder", tmp_path]
    ended = subprocess.run(command, env=ENVIRONMENT, timeout=120, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "run vae first" in ended.stderr and "ended the stage unet" in ended.stderr
