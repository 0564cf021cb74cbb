"""The training loop: a generator that yields a record a step; the caller owns logging, plots and stopping.

All randomness of a step comes from a generator seeded by the run's seed and the step's number, and is drawn for the
whole batch before it is shared out among processes. So a run is a pure function of its config, unless that limits its
minutes: resuming needs no random state, and two processes see exactly the samples, times and noises that one would.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ..files import CheckpointError, load_strictly, replacing

LENGTH = ("steps", "minutes", "cooldown")  # may change when a run goes on: it may become longer or shorter
WORKERS = 10  # processes that make batches where there is a GPU to be kept busy

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


class Data(Protocol):
    """What a run learns from: a number of samples, and a way to make a batch of some of them."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """The samples at `indices`, with everything random (noise, times, dropped captions) drawn from `generator`."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to learn."""

    steps: int
    batch_size: int
    lr: float = 1e-3  # AdamW's learning rate at its highest
    warmup: int = 200  # steps of rising rate at the start
    cooldown: float = 0.3  # share of the run, at its end, over which the rate falls to zero
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # greatest norm of the gradient
    ema: float = 0.999  # of the moving average of the weights that is the result
    seed: int = 0
    bf16: bool = False  # forward and backward in bfloat16; weights, averages and optimizer stay in float32
    minutes: float | None = None  # where given, the run ends after so long, all its sittings together, or before


@dataclass(frozen=True)
class Record:
    """One step: its number (from 1), its loss, learning rate, the norm of its gradient, and the parts of its loss."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    parts: dict[str, float]


def learning_rate(config: TrainConfig, step: int, over: float) -> float:
    """Linear rise over `warmup` steps, level, then linear fall to zero over the last `cooldown` of the run.

    `over` is the share of the run that is over before this step.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (1 - over) / max(config.cooldown, 1 / config.steps))
    return config.lr * rise * fall


class Progress:
    """How much of a run is over: of its steps or, where that is more, of its minutes.

    With a limit in minutes the rates, and so the result, are the machine's: such a run can't be repeated bit by bit.
    """

    def __init__(self, config: TrainConfig, minutes: float):
        self.config = config
        self.begun = time.monotonic() - 60 * minutes  # `minutes` have gone by in earlier sittings

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60

    def before(self, step: int, device: torch.device) -> float:
        """The share that is over before a step, the same in all processes: the clock is that of the first."""
        share_of_steps = step / self.config.steps
        if self.config.minutes is None:
            return share_of_steps
        minutes = torch.tensor(self.minutes, device=device)
        if dist.is_initialized():
            dist.broadcast(minutes, 0)
        return min(1.0, max(share_of_steps, minutes.item() / self.config.minutes))


def batch_indices(config: TrainConfig, step: int, samples: int) -> Tensor:
    """Which samples step number `step` sees: every epoch is a fresh permutation of all of them."""
    positions = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = positions // samples
    order = {
        int(e): torch.randperm(samples, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + int(e)))
        for e in epochs.unique()
    }
    return torch.cat([order[e][positions[epochs == e] % samples] for e in order])


def step_generator(config: TrainConfig, step: int) -> torch.Generator:
    """The source of everything random in one step."""
    return torch.Generator().manual_seed((config.seed + 1) * 1_000_000_007 + step)


@dataclass(frozen=True)
class Steps:
    """The batch of every step by the step's number: what a DataLoader calls a dataset."""

    data: Data
    config: TrainConfig

    def __getitem__(self, step: int) -> Batch:
        indices = batch_indices(self.config, step, len(self.data))
        return self.data.batch(indices, step_generator(self.config, step))


class EMA:
    """An exponential moving average of a module's weights, with a shorter memory in the first steps."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    def update(self, module: nn.Module, step: int) -> None:
        move = get_ema_multi_avg_fn(min(self.decay, (step + 1) / (step + 10)))
        move(list(self.module.parameters()), list(module.parameters()), None)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, object]:
    """A checkpoint that `save_checkpoint` wrote. Raises CheckpointError where the file is none."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling may raise anything at all
        raise CheckpointError(f"{path} is not a checkpoint ({error}); move it away to start anew") from error


def fit(
    module: nn.Module,
    loss: Loss,
    data: Data,
    config: TrainConfig,
    checkpoint: Path | None = None,
    every: int = 500,
) -> Iterator[Record]:
    """Train `module` in place by AdamW, yielding a record after each step; at the end it holds the averaged weights.

    Where `checkpoint` exists the run goes on from it, bit for bit as if it had never stopped; it is written every
    `every` steps and at the end. Under torchrun each process takes its share of every batch and gradients are averaged.

    Raises ValueError for an empty data set, CheckpointError for a checkpoint of another run, and FloatingPointError
    when the loss is no longer finite: the last good checkpoint stays.
    """
    if len(data) == 0:
        raise ValueError("the data set is empty: there is nothing to train on")
    rank, ranks = share()
    if config.batch_size % ranks:
        raise ValueError(f"a batch of {config.batch_size} can't be shared evenly among {ranks} processes")
    device = next(module.parameters()).device
    average = EMA(module, config.ema)
    optimizer = torch.optim.AdamW(
        module.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
    )
    first, minutes = 0, 0.0
    settings = {**vars(config), "samples": len(data)}
    if checkpoint is not None and checkpoint.exists():
        state = read_checkpoint(checkpoint, device)
        if differing := [k for k, v in settings.items() if k not in LENGTH and state["config"].get(k) != v]:
            raise CheckpointError(
                f"{checkpoint} is of another run: {', '.join(differing)} differ; use its settings, or another folder"
            )
        load_strictly(module, state["model"], str(checkpoint))
        load_strictly(average.module, state["average"], str(checkpoint))
        optimizer.load_state_dict(state["optimizer"])
        first, minutes = state["step"], state["minutes"]

    module.train()
    steps, gpu = range(first, config.steps), device.type == "cuda"
    batches = DataLoader(
        Steps(data, config), batch_size=None, sampler=steps, num_workers=WORKERS if gpu else 0, pin_memory=gpu
    )
    progress = Progress(config, minutes)
    over = progress.before(first, device)
    for step, batch in zip(steps, batches, strict=True):
        if over == 1:
            break
        rate = learning_rate(config, step, over)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {name: tensor[rank::ranks].to(device, non_blocking=True) for name, tensor in batch.items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext():
            value, parts = loss(module, batch)
        value.backward()
        if ranks > 1:
            value = average_gradients(module, value, ranks)
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        if not (math.isfinite(value.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"at step {step + 1} the loss is {value.item()}, the norm of its gradient {norm.item()}; "
                "the last checkpoint is intact"
            )
        optimizer.step()
        average.update(module, step)
        over = progress.before(step + 1, device)
        if checkpoint is not None and rank == 0 and (over == 1 or (step + 1) % every == 0):
            save_checkpoint(
                checkpoint,
                {
                    "config": settings,
                    "step": step + 1,
                    "minutes": progress.minutes,
                    "model": module.state_dict(),
                    "average": average.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
        yield Record(step + 1, value.item(), rate, norm.item(), {k: v.item() for k, v in parts.items()})
    module.load_state_dict(average.module.state_dict())
    module.eval()


def average_gradients(module: nn.Module, loss: Tensor, ranks: int) -> Tensor:
    """Mean of gradients and loss over all processes: with equal shares and a loss that is a mean, those of one process.

    A contrastive loss is no such mean: it sees the negatives of its own share alone.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients] + [loss.detach().reshape(1)])
    dist.all_reduce(flat)
    flat /= ranks
    for gradient, averaged in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))
    return flat[-1]


def share() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) but under torchrun. The first one writes files and shows progress."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes() -> torch.device:
    """Join the other processes when started by torchrun; the device this process trains on."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device
