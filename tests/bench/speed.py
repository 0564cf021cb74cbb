"""How fast, and in how much memory: ours and diffusers' in turn, in one process, on the same random weights of v1.

From the folder `tests`: `python -m bench.speed`, on a GPU `python -m bench.speed --device cuda --dtype float16`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageStat
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minisd
from minisd import samplers
from minisd.config import SD1, ModelConfig
from minisd.devices import check_device, fast_dtype
from minisd.weights import empty_parts

from .parity import GUIDANCE, PROMPT, SEED, calls, load_theirs, pixel_difference, tiny, write_random

CRITTER = "a watercolor of an orange cat with blue eyes on a beach"


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given: it is told, and goes on, before it has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class Peak:
    """The memory in use at the most, in bytes above what was in use at the start.

    On CUDA by PyTorch's allocator; on the CPU by the resident set, where the system is Linux and lets its mark be reset
    (proc(5), clear_refs). Elsewhere None.
    """

    def __init__(self, device: torch.device):
        self.device, self.start = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
                self.start = resident("VmRSS")

    def above(self) -> int | None:
        if self.start is None:
            return None
        at_most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM")
        return at_most - self.start


def resident(mark: str) -> int:
    """The bytes of this process in memory, now ("VmRSS") or at the most ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(mark))


@dataclass(frozen=True)
class Race:
    """Ours against theirs: medians of seconds and of peak bytes, and the median of the ratios of the turns."""

    ours: float
    theirs: float
    ratio: float
    our_peak: float | None
    their_peak: float | None

    def row(self, name: str) -> str:
        peaks = ["-" if peak is None else f"{peak / 2**30:.3f}" for peak in (self.our_peak, self.their_peak)]
        return f"| {name} | {self.ours:.3g} | {self.theirs:.3g} | {self.ratio:.2f} | {' | '.join(peaks)} |"


HEADER = """
| what | ours, s | diffusers, s | ours / diffusers | ours, GiB | diffusers, GiB |
|---|---|---|---|---|---|"""


def measured(call: Callable[[], Any], device: torch.device) -> tuple[float, int | None]:
    """Seconds and peak bytes of one call."""
    gc.collect()
    synchronize(device)
    peak, start = Peak(device), time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start, peak.above()


@torch.no_grad()
def race(call_ours: Callable[[], Any], call_theirs: Callable[[], Any], repeats: int, device: torch.device) -> Race:
    """Run both in turn, so that what slows the machine down slows both. A first turn, which compiles, isn't counted."""
    turns = [(measured(call_ours, device), measured(call_theirs, device)) for _ in range(repeats + 1)][1:]
    ours, theirs = zip(*turns, strict=True)
    (our_seconds, our_peaks), (their_seconds, their_peaks) = zip(*ours, strict=True), zip(*theirs, strict=True)
    median = statistics.median
    return Race(
        ours=median(our_seconds),
        theirs=median(their_seconds),
        ratio=median(a / b for a, b in zip(our_seconds, their_seconds, strict=True)),
        our_peak=None if None in our_peaks else median(our_peaks),
        their_peak=None if None in their_peaks else median(their_peaks),
    )


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second in the product of two square matrices: what the chip gives at best, as measured here."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    seconds = [measured(lambda: a @ b, device)[0] for _ in range(10)]
    return 2 * side**3 / min(seconds)


@torch.no_grad()
def operations(model: ModelConfig, cells: tuple[int, int], batch: int) -> int:
    """Multiplications and additions in one call of the U-Net, counted without computing anything."""
    unet = empty_parts(model, "")["unet"]
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x_t, t = torch.empty(batch, model.unet.in_channels, *cells), torch.empty(batch)
        unet(x_t, t, torch.empty(batch, model.text.places, model.unet.context_dim))
    return counter.get_total_flops()


def bundled(device: torch.device, dtype: torch.dtype, steps: int) -> tuple[Image.Image, dict[str, float]]:
    """A picture of the bundled model on a device, and how far it is, in steps of 8 bits, from the CPU's in float32."""
    pipelines = minisd.load(), minisd.load(device=device, dtype=dtype)
    here, there = (sd(CRITTER, seed=SEED, steps=steps, progress=False) for sd in pipelines)
    mean = statistics.mean(ImageStat.Stat(ImageChops.difference(here, there)).mean)
    return there, {"largest": pixel_difference(there, here), "mean": mean}


def machine(device: torch.device) -> str:
    """The chip that the figures are of, and what runs on it."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        chip = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    return f"{chip}; PyTorch {torch.__version__}, diffusers {diffusers.__version__}, {platform.system()}"


def read_all(model: minisd.StableDiffusion | DiffusionPipeline) -> None:
    """Look at every weight once: diffusers leaves them in the file until they are used."""
    for network in vars(model).values():
        if isinstance(network, nn.Module):
            for weight in network.parameters():
                weight.sum()


def compile_networks(sd: minisd.StableDiffusion, pipe: DiffusionPipeline) -> None:
    for network in (sd.unet, pipe.unet, sd.vae.decoder, pipe.vae.decoder):
        network.compile()


def compare(
    model: ModelConfig, options: argparse.Namespace, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Race]:
    """Race by race, each printed as it ends; with no dtype each side takes its own default."""
    races = {}

    def run(name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
        races[name] = race(ours, theirs, options.repeats, device)
        print(races[name].row(name), flush=True)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows deletes no file in use
        folder = Path(temporary) / "model"
        write_random(model, folder, dtype or torch.float32)  # as the default files of the published repositories
        chosen = {"dtype": dtype} if dtype else {}
        loads = (
            lambda: minisd.load(folder, device=device, **chosen),
            lambda: load_theirs(folder, **chosen).to(device),
        )
        print(HEADER)
        run("load", *loads)
        run("load, all weights read", lambda: read_all(loads[0]()), lambda: read_all(loads[1]()))
        sd, pipe = (load() for load in loads)
        if options.compile:
            compile_networks(sd, pipe)
        networks = calls(sd, pipe, (options.size, options.size), options.batch)
        run("U-Net, with guidance", *networks["U-Net"])
        run("VAE decoder", *networks["VAE decoder"])
        settings = {"size": options.size, "n": options.batch, "sampler": samplers.ddim, "schedule": "leading"}
        run(
            f"picture, {options.steps} steps",
            lambda: sd(PROMPT, seed=SEED, steps=options.steps, guidance=GUIDANCE, progress=False, **settings),
            lambda: pipe(
                PROMPT,
                height=options.size,
                width=options.size,
                num_images_per_prompt=options.batch,
                num_inference_steps=options.steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(SEED),
            ),
        )
    return races


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.speed", description="Time and memory of v1, ours and diffusers'.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=["default", "float32", "float16", "bfloat16"],
        default="float32",
        help="numbers of both, or each side's default (float32)",
    )
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (1)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (512; tiny: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are counted (5)")
    parser.add_argument("--steps", type=int, default=20, help="of the whole picture (20)")
    parser.add_argument("--compile", action="store_true", help="both U-Nets and decoders by torch.compile")
    parser.add_argument("--tiny", action="store_true", help="small networks, in seconds")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for speed.json and speed.png (here)")
    options = parser.parse_args(arguments)
    options.size = options.size or (64 if options.tiny else 512)
    device = check_device(options.device)
    dtype = None if options.dtype == "default" else getattr(torch, options.dtype)
    told = {"machine": machine(device)} | {n: v for n, v in vars(options).items() if n != "output"}
    print(", ".join(f"{name} {value}" for name, value in told.items()))

    model = tiny(SD1) if options.tiny else SD1
    races = compare(model, options, device, dtype)
    cells = [options.size // model.vae.factor] * 2
    rate = matrix_rate(device, dtype or fast_dtype(device), 8192 if device.type == "cuda" else 1024)
    done = operations(model, cells, 2 * options.batch)
    share = {who: done / getattr(races["U-Net, with guidance"], who) / rate for who in ("ours", "theirs")}
    picture, apart = bundled(device, dtype or fast_dtype(device), options.steps)
    print(
        f"\nU-Net: {1 / races['U-Net, with guidance'].ours:.3g} steps a second; {done / 1e12:.3g} Tflop a call, "
        f"{share['ours']:.0%} of the {rate / 1e12:.3g} Tflop/s that a product of matrices reaches "
        f"(diffusers: {share['theirs']:.0%})"
    )
    print(f"bundled model, {device} against CPU: at most {apart['largest']}/255, on average {apart['mean']:.2g}/255")

    options.output.mkdir(parents=True, exist_ok=True)
    picture.save(options.output / "speed.png")
    figures = {"races": {name: asdict(r) for name, r in races.items()}, "matrix_rate": rate, "unet_operations": done}
    (options.output / "speed.json").write_text(
        json.dumps(told | figures | {"share_of_matrix_rate": share, "bundled": apart}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
