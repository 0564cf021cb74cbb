"""The command line: `minisd "a prompt"`, or img2img, inpaint, depth2img, upscale, train, eval, info, download."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import checks, samplers
from . import image as images
from .weights import download as downloads

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipeline import StableDiffusion

    Pictures = Image | list[Image]

SAMPLERS = {
    name: getattr(samplers, name)
    for name in "ancestral ddim ddpm dpmpp_2m dpmpp_2m_sde dpmpp_sde euler euler_a heun lcm lms plms unipc".split()
}

app = typer.Typer(
    name="minisd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Stable Diffusion from scratch. Draw a picture: minisd "an orange cat on a beach"',
)

Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="The PNG to write; several are numbered.")]
Negative = Annotated[str, typer.Option(help="What to steer away from.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same picture; drawn and noted if left out.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler; by default the model's own, mostly 20.")]
Guidance = Annotated[float | None, typer.Option(help="How strongly to follow the prompt; 1 is plain.")]
Rescale = Annotated[float, typer.Option(help="Against glaring colours at strong guidance, 0 to 1.")]
Sampler = Annotated[str | None, typer.Option(help=f"One of: {', '.join(SAMPLERS)}; by default the model's own.")]
Schedule = Annotated[
    str | None, typer.Option(help="Which noise levels to visit: karras, linspace, trailing, leading, ...")
]
LongPrompts = Annotated[str, typer.Option(help="cut: keep 75 tokens; chunk: read on in further chunks.")]
ClipSkip = Annotated[int | None, typer.Option(help="Read the text tower's last block (1), the one before (2), ...")]
Tile = Annotated[int | None, typer.Option(help="Encode and decode in tiles of so many latent cells: less memory.")]
Count = Annotated[int, typer.Option("--n", "-n", help="How many pictures, with seeds counting on.")]
Size = Annotated[str | None, typer.Option(help="A side, or width x height: 128, 128x192.")]
Model = Annotated[str | None, typer.Option(help="A model's file or folder, or the name of a bundled one.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16, bfloat16; by default what suits the model.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output if it exists.")]
Strength = Annotated[float, typer.Option(help="0 keeps the picture, 1 forgets it.")]
Picture = Annotated[Path, typer.Argument(help="The picture to start from.", show_default=False)]
Mask = Annotated[Path, typer.Argument(help="White where the picture is redrawn.", show_default=False)]
Depth = Annotated[Path | None, typer.Option(help="How near everything is, the nearest white; else it is estimated.")]
NoiseLevel = Annotated[
    int, typer.Option(help="Noise added to the small picture: more leaves more to invent, 0 to 350.")
]


def drawing(way: Callable[..., Callable[[StableDiffusion], Pictures]]) -> None:
    """Make a command of a way to draw. It takes the arguments of `way`, then the options that every way has.

    `way` reads its files and returns what to do with the model, which is loaded only then.
    """

    def command(
        output: Output = Path("picture.png"),
        negative: Negative = "",
        seed: Seed = None,
        steps: Steps = None,
        guidance: Guidance = None,
        rescale: Rescale = 0.0,
        sampler: Sampler = None,
        schedule: Schedule = None,
        long_prompts: LongPrompts = "cut",
        clip_skip: ClipSkip = None,
        tile: Tile = None,
        n: Count = 1,
        model: Model = None,
        device: Device = "cpu",
        dtype: Dtype = None,
        force: Force = False,
        **own: Any,
    ) -> None:
        from .pipeline import load

        paths = _outputs(output, n, force)
        draw = way(
            **own, negative=negative, seed=seed, n=n, steps=steps, guidance=guidance, rescale=rescale,
            sampler=_sampler(sampler), schedule=schedule, long_prompts=long_prompts, clip_skip=clip_skip, tile=tile,
        )  # fmt: skip
        pictures = draw(load(model, device=device, dtype=dtype))
        for picture, path in zip(pictures if isinstance(pictures, list) else [pictures], paths, strict=True):
            images.save(picture, path, picture.info, force=force)
            typer.echo(f"{path.resolve()}  (seed {picture.info['seed']})")

    every = [p for function in (way, command) for p in inspect.signature(function, eval_str=True).parameters.values()]
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in every if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = inspect.Signature(named)
    command.__annotations__ |= way.__annotations__
    app.command(way.__name__, help=way.__doc__)(command)


@drawing
def draw(prompt: Prompt, size: Size = None, **settings: Any):
    """Draw a picture from a prompt. (This is what `minisd "a prompt"` does.)"""
    sides = _size(size)
    return lambda sd: sd(prompt, size=sides, **settings)


@drawing
def img2img(prompt: Prompt, picture: Picture, strength: Strength = 0.6, **settings: Any):
    """Redraw a picture towards a prompt."""
    source = images.read(picture)
    return lambda sd: sd.img2img(prompt, source, strength=strength, **settings)


@drawing
def inpaint(prompt: Prompt, picture: Picture, mask: Mask, strength: Strength = 1.0, **settings: Any):
    """Redraw the masked part of a picture."""
    source, white = images.read(picture), images.read(mask, background="black")
    return lambda sd: sd.inpaint(prompt, source, white, strength=strength, **settings)


@drawing
def depth2img(prompt: Prompt, picture: Picture, depth: Depth = None, strength: Strength = 0.9, **settings: Any):
    """Redraw a picture and keep its depths."""
    source, near = images.read(picture), None if depth is None else images.read(depth)
    return lambda sd: sd.depth2img(prompt, source, depth=near, strength=strength, **settings)


@drawing
def upscale(prompt: Prompt, picture: Picture, noise_level: NoiseLevel = 20, **settings: Any):
    """Enlarge a picture with an upscaling model."""
    source = images.read(picture)
    return lambda sd: sd.upscale(prompt, source, noise_level=noise_level, **settings)


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
def train(
    recipe: Annotated[str, typer.Argument(help="vae, unet, clip, decoder; or all, these four.", show_default=False)],
    folder: Annotated[Path, typer.Option(help="Where renders, checkpoints and the model go.")] = Path("runs"),
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes a recipe, if not before.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples a step, of all processes together.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate at its highest.")] = None,
    cooldown: Annotated[float | None, typer.Option(help="Share of the run, at its end, in which it falls.")] = None,
    ema: Annotated[float | None, typer.Option(help="Of the moving average of the weights that is kept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights, of noise and of the order.")] = None,
    bf16: Annotated[bool | None, typer.Option(help="Compute in bfloat16, or in float32.", show_default=False)] = None,
    renders: Annotated[int | None, typer.Option(help="Learn from so many rendered pictures.")] = None,
    render_seed: Annotated[int | None, typer.Option(help="Of what these pictures show.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that make batches: some, to keep a GPU busy.")] = 0,
) -> None:
    """Train the bundled model or a part of it, best on a GPU or under torchrun on many.

    What is not given is as the recipe has it. A run that was stopped, by Ctrl-C as well, goes on when the same command
    is given again.

    When the model is whole: refine; its variants inpaint, depth, estimator, upscale, distilled; control,
    classifier. Alone: oracle, segmenter, pixels.
    """
    from .critters.stages import carry_out, stages
    from .train.loop import start_processes

    settings = {
        "steps": steps, "minutes": minutes, "batch_size": batch, "lr": lr, "cooldown": cooldown, "ema": ema,
        "seed": seed, "bf16": bf16, "renders": renders, "render_seed": render_seed,
    }  # fmt: skip
    chosen = stages(recipe, **{name: value for name, value in settings.items() if value is not None})
    workers = checks.integer("workers", workers, 0, 1_000)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a checkpoint is written first
    carry_out(chosen, folder, start_processes(), workers)


@app.command("eval")
def evaluate(
    n: Annotated[int, typer.Option("--n", "-n", help="How many prompts.")] = 200,
    split: Annotated[str, typer.Option(help="Which combinations of words: train, held-out, all.")] = "held-out",
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts.")] = 0,
    model: Model = None,
    device: Device = "cpu",
) -> None:
    """Draw from many prompts and count what independent networks see in the pictures.

    One reads the words back. The other counts parts: is everything there as often as in renders of the same kind?
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
        typer.echo(f"{title}:")
        for name, count in counts.items():
            low, high = count.interval()
            share = f"{count.right:4} of {count.total:4}  {count.share:6.1%}  (99%: {low:.1%} to {high:.1%})"
            typer.echo(f"  {name:11} {share}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A PNG, a file of weights, or a model's folder.", show_default=False)],
    keys: Annotated[bool, typer.Option("--keys", help="Show where each tensor of a checkpoint goes.")] = False,
) -> None:
    """Show a picture's settings, or what weights hold."""
    if file.is_dir() or file.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        from .weights import describe

        for line in describe(file, keys):
            typer.echo(_printable(line))
        return
    settings = images.read_metadata(file)
    if not settings:
        typer.echo(f"{file} holds no settings")
    for key, value in settings.items():
        typer.echo(f"{_printable(key)}: {_printable(value)}")


@app.command()
def download(
    model: Annotated[
        str, typer.Argument(help=f"One of: {', '.join(m.key for m in downloads.MODELS)}.", show_default=False)
    ],
    folder: Annotated[Path | None, typer.Option(help="Where to put the file; else in the Hugging Face cache.")] = None,
) -> None:
    """Fetch published weights; prints the file's path."""
    published = downloads.find(model)
    typer.echo(f"{published.name}, {published.size / 1e9:.2f} GB, licence: {published.licence}", err=True)
    path = downloads.download(model, folder)
    typer.echo(path)
    typer.echo(f"next: {published.next_step(path)}", err=True)


def _printable(text: str) -> str:
    """Control, ANSI and bidirectional characters escaped, so that a file can't play tricks on the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def main() -> None:
    """Run the command line; a prompt in the place of a command draws it. Bad input ends with one line and status 2."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in commands | {"--help"}:
        arguments.insert(0, "draw")
    try:
        app(arguments)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        typer.echo(f"minisd: {_printable(str(error))}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
