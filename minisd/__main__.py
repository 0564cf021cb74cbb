"""The command line: `minisd "a prompt"`, or img2img, inpaint, depth2img, upscale, train, eval, info, download."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import checks, samplers
from . import image as images
from .schedule import SPACINGS
from .weights import download as downloads

if TYPE_CHECKING:
    from .pipeline import StableDiffusion
    from .settings import Pictures

SAMPLERS = {
    name: getattr(samplers, name)
    for name in "ancestral ddim ddpm dpmpp_2m dpmpp_2m_sde dpmpp_sde euler euler_a heun lcm lms plms unipc".split()
}
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

MODEL = click.option("--model", help="A model's file or folder, or the name of a bundled one.")
DEVICE = click.option("--device", default="cpu", help="cpu, cuda, cuda:1, mps.")
STEPS = click.option("--steps", type=int, help="Steps of the sampler; by default the model's own, mostly 20.")
GUIDANCE = click.option("--guidance", type=float, help="How strongly to follow the prompt; 1 is plain.")
DRAWING = (  # what every way to draw can be told
    click.option("--output", "-o", type=Path, default="picture.png", help="A PNG; several are numbered."),
    click.option("--negative", default="", help="What to steer away from."),
    click.option("--seed", type=int, help="Same seed, same picture; drawn and noted if left out."),
    STEPS,
    GUIDANCE,
    click.option("--rescale", type=float, default=0.0, help="Against glaring colours at strong guidance, 0 to 1."),
    click.option("--sampler", help=f"One of: {', '.join(SAMPLERS)}; by default the model's own."),
    click.option("--schedule", help=f"Which noise levels to visit: {', '.join(SPACINGS)}."),
    click.option("--long-prompts", default="cut", help="cut: keep 75 tokens; chunk: read on in further chunks."),
    click.option("--clip-skip", type=int, help="Read the text tower's last block (1), the one before (2), ..."),
    click.option("--tile", type=int, help="Encode and decode in tiles of so many latent cells: less memory."),
    click.option("--n", "-n", type=int, default=1, help="How many pictures, with seeds counting on."),
    MODEL,
    DEVICE,
    click.option("--dtype", help="float32, float16, bfloat16; by default what suits the model."),
    click.option("--force", is_flag=True, help="Overwrite the output if it exists."),
)
PROMPT = click.argument("prompt")
PICTURE = click.argument("picture", type=Path)
STRENGTH = "0 keeps the picture, 1 forgets it."


@click.group(context_settings={"help_option_names": ["--help"], "show_default": True})
def app() -> None:
    """Stable Diffusion from scratch. Draw a picture: minisd "an orange cat on a beach" """


def drawing(way: Callable) -> click.Command:
    """Make a command of a way to draw, with the options that every way has."""
    for option in reversed(DRAWING):
        way = option(way)
    return app.command()(way)


@drawing
@PROMPT
@click.option("--size", help="A side, or width x height: 128, 128x192.")
def draw(prompt: str, size: str | None, **told: Any) -> None:
    """Draw a picture from a prompt. (This is what `minisd "a prompt"` does.)"""
    sides = _size(size)
    _draw(lambda sd, settings: sd(prompt, size=sides, **settings), told)


@drawing
@PROMPT
@PICTURE
@click.option("--strength", type=float, default=0.6, help=STRENGTH)
def img2img(prompt: str, picture: Path, strength: float, **told: Any) -> None:
    """Redraw a picture towards a prompt."""
    source = images.read(picture)
    _draw(lambda sd, settings: sd.img2img(prompt, source, strength=strength, **settings), told, picture=picture)


@drawing
@PROMPT
@PICTURE
@click.argument("mask", type=Path)
@click.option("--strength", type=float, default=1.0, help=STRENGTH)
def inpaint(prompt: str, picture: Path, mask: Path, strength: float, **told: Any) -> None:
    """Redraw a picture where a mask is white."""
    source, white = images.read(picture), images.read(mask, background="black")
    _draw(
        lambda sd, settings: sd.inpaint(prompt, source, white, strength=strength, **settings),
        told,
        picture=picture,
        mask=mask,
    )


@drawing
@PROMPT
@PICTURE
@click.option("--depth", type=Path, help="How near everything is, the nearest white; else it is estimated.")
@click.option("--strength", type=float, default=0.9, help=STRENGTH)
def depth2img(prompt: str, picture: Path, depth: Path | None, strength: float, **told: Any) -> None:
    """Redraw a picture and keep its depths.

    The model is critters-512-depth where none is named.
    """
    source, near = images.read(picture), None if depth is None else images.read_depth(depth)
    told["model"] = told["model"] or "critters-512-depth"
    _draw(
        lambda sd, settings: sd.depth2img(prompt, source, depth=near, strength=strength, **settings),
        told,
        picture=picture,
        depth=depth,
    )


@drawing
@PROMPT
@PICTURE
@click.option(
    "--noise-level", type=int, default=20, help="Noise added to the small picture, 0 to 350: more invents more."
)
def upscale(prompt: str, picture: Path, noise_level: int, **told: Any) -> None:
    """Enlarge a picture with an upscaling model."""
    source = images.read(picture)
    _draw(lambda sd, settings: sd.upscale(prompt, source, noise_level=noise_level, **settings), told, picture=picture)


def _draw(
    way: Callable[[StableDiffusion, dict[str, Any]], Pictures], told: dict[str, Any], **files: Path | None
) -> None:
    """Draw and save, and say where. What can be refused without the model is refused before it is loaded.

    told: the options that every way has; the rest of them are the settings. files: what was read, to be noted.
    """
    from .pipeline import load

    output, force = told.pop("output"), told.pop("force")
    paths = _outputs(output, told["n"], force)
    model = {name: told.pop(name) for name in ("model", "device", "dtype")}
    told["sampler"] = _sampler(told["sampler"])
    pictures = way(load(model.pop("model"), **model), told)
    for picture, path in zip(pictures if isinstance(pictures, list) else [pictures], paths, strict=True):
        settings = {str(name): value for name, value in picture.info.items()}
        settings |= {name: file for name, file in files.items() if file is not None}
        saved = images.save(picture, path if force else images.free_name(path), settings, force=force)
        click.echo(f"{_printable(str(saved.resolve()))}  (seed {picture.info['seed']})")


def _outputs(output: Path, n: int, force: bool) -> list[Path]:
    """The file of each picture, checked before any work is done: out.png, or out-1.png, out-2.png ..."""
    n = checks.integer("n", n, 1, 10_000)
    paths = [output] if n == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(1, n + 1)]
    return [images.check_output(path, force=force) for path in paths]


def _sampler(name: str | None) -> Callable | None:
    if name is None:
        return None
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _size(text: str | None) -> int | tuple[int, int] | None:
    """ "128" or "128x192" (width x height)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise ValueError(f"size is {text!r}; write a side such as 128, or width x height such as 128x192")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


@app.command()
@click.argument("recipe")
@click.option("--folder", type=Path, default="runs", help="Where renders, checkpoints and the model go.")
@click.option("--steps", type=int, help="Stop after so many steps.")
@click.option("--minutes", type=float, help="Stop after so many minutes a recipe, if not before.")
@click.option("--batch", "batch_size", type=int, help="Samples a step, of all processes together.")
@click.option("--lr", type=float, help="The learning rate at its highest.")
@click.option("--cooldown", type=float, help="Share of the run, at its end, in which it falls.")
@click.option("--ema", type=float, help="Of the moving average of the weights that is kept.")
@click.option("--seed", type=int, help="Of the first weights, of noise and of the order.")
@click.option("--bf16/--no-bf16", default=None, help="Compute in bfloat16, or in float32.")
@click.option("--renders", type=int, help="Learn from so many rendered pictures.")
@click.option("--render-seed", type=int, help="Of what these pictures show.")
@click.option("--workers", type=int, default=0, help="Processes that make batches: some, to keep a GPU busy.")
def train(recipe: str, folder: Path, workers: int, **settings: Any) -> None:
    """Train the bundled model or a part of it.

    It is done best on a GPU, or under torchrun on many.

    RECIPE: vae, unet, clip, decoder; or all, these four. When the model is whole: refine; its variants inpaint, depth,
    estimator, upscale, distilled; control, classifier. Alone: oracle, segmenter, pixels.

    What is not given is as the recipe has it. A run that was stopped, by Ctrl-C as well, goes on when the same command
    is given again.
    """
    from .critters.stages import carry_out, stages
    from .train.loop import start_processes

    chosen = stages(recipe, **{name: value for name, value in settings.items() if value is not None})
    workers = checks.integer("workers", workers, 0, 1_000)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a checkpoint is written first
    carry_out(chosen, folder, start_processes(), workers)


@app.command("eval")
@click.option("--n", "-n", type=int, default=200, help="How many prompts.")
@click.option("--split", default="held-out", help="Which combinations of words: train, held-out, all.")
@STEPS
@GUIDANCE
@click.option("--seed", type=int, default=0, help="Of the choice of prompts.")
@MODEL
@DEVICE
def evaluate(
    n: int, split: str, steps: int | None, guidance: float | None, seed: int, model: str | None, device: str
) -> None:
    """Draw from many prompts and count what is right.

    Two independent networks look at the pictures. One reads the words back. The other counts parts: is everything there
    as often as in renders of the same kind?
    """
    import torch

    from .critters import Scene
    from .evaluate import anatomy, draw_scenes, load_oracle, load_segmenter, measure
    from .pipeline import load

    generator = torch.Generator().manual_seed(checks.integer("seed", seed, 0, checks.MAX_SEED))
    scenes = [Scene.sample(generator, split) for _ in range(checks.integer("n", n, 1, 100_000))]
    drawn = draw_scenes(load(model, device=device), scenes, steps=steps, guidance=guidance)
    tables = {
        "words that were read back": measure(load_oracle(), scenes, drawn),
        "parts that are there as often as in renders": anatomy(*load_segmenter(), scenes, drawn),
    }
    for title, counts in tables.items():
        click.echo(f"{title}:")
        for name, count in counts.items():
            low, high = count.interval()
            share = f"{count.right:4} of {count.total:4}  {count.share:6.1%}  (99%: {low:.1%} to {high:.1%})"
            click.echo(f"  {name:11} {share}")


@app.command()
@click.argument("file", type=Path)
@click.option("--keys", is_flag=True, help="Show where each tensor of a checkpoint goes.")
def info(file: Path, keys: bool) -> None:
    """Show a picture's settings, or what weights hold.

    FILE: a PNG, of which the command that draws it again is shown, too; a file of weights, or a model's folder.
    """
    if _is_weights(file):
        from .weights import describe

        for line in describe(file, keys):
            click.echo(_printable(line))
        return
    settings = images.read_metadata(file)
    if not settings:
        click.echo(f"{_printable(str(file))} holds no settings")
    for key, value in settings.items():
        click.echo(f"{_printable(key)}: {_printable(value)}")
    if again := _again(settings):
        click.echo(f"again: {_printable(again)}")


def _is_weights(file: Path) -> bool:
    """Whether a file is of weights, not a picture: by its name, and by its first bytes where that says nothing."""
    if file.is_dir() or file.suffix.lower() in WEIGHTS:
        return True
    with file.open("rb") as opened:
        first = opened.read(9)
    return first[8:] == b"{" or first.startswith(b"PK\x03\x04")


def _again(settings: dict[str, str]) -> str | None:
    """The command that draws a picture again, from what it remembers; None where it remembers something else."""
    way = settings.get("way", "")
    command = app.commands.get("draw" if way == "text_to_image" else way)
    if command is None:
        return None
    words = ["minisd", *([] if way == "text_to_image" else [way])]
    for asked in sorted(command.params, key=lambda asked: isinstance(asked, click.Option)):  # the prompt comes first
        if value := settings.get(asked.name):
            words += [value] if isinstance(asked, click.Argument) else [asked.opts[0], value]
    return shlex.join(words)


@app.command()
@click.argument("model")
@click.option("--folder", type=Path, help="Where to put the file; else in the Hugging Face cache.")
def download(model: str, folder: Path | None) -> None:
    """Fetch published weights; prints the file's path."""
    published = downloads.find(model)
    click.echo(f"{published.name}, {published.size / 1e9:.2f} GB, licence: {published.licence}", err=True)
    path = downloads.download(model, folder)
    click.echo(path)
    click.echo(f"next: {published.next_step(path)}", err=True)


download.help += f"\n\nMODEL: one of {', '.join(model.key for model in downloads.MODELS)}."


def _printable(text: str) -> str:
    """Control, ANSI and bidirectional characters escaped, so that a file can't play tricks on the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _speak() -> None:
    """A terminal that can't print a letter shows it escaped; one that is closed hears nothing; warnings are a line."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: click.echo(f"minisd: {_printable(str(message))}", err=True)


def main() -> None:
    """Run the command line; a prompt in the place of a command draws it. Bad input ends with one line and status 2."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in {*app.commands, "--help"}:
        arguments.insert(0, "draw")
    _speak()
    try:
        app(arguments or ["--help"], prog_name="minisd")
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        click.echo(f"minisd: {_printable(str(error))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
