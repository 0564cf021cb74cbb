"""The training loop: a generator that yields a record a step; the caller owns logging, plots and stopping.

All randomness of a step comes from a generator seeded by the run's seed and the step's number, and is drawn for the
whole batch before it is shared out among processes. So a run is a pure function of its config, unless that limits its
minutes: resuming needs no random state, and two processes see exactly the samples, times and noises that one would.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from .. import checks
from ..files import replacing
from ..weights import CheckpointError, load_strictly

INTEGERS = {"steps": (1, 10**9), "batch_size": (1, 10**6), "warmup": (0, 10**9), "seed": (0, 2**32 - 1)}  # from, to
NUMBERS = {
    "lr": (1e-9, 10), "cooldown": (0, 1), "weight_decay": (0, 10), "max_grad_norm": (1e-9, 1e9), "ema": (0, 1),
    "minutes": (0.01, 10**6),
}  # fmt: skip
LENGTH = ("steps", "minutes", "cooldown")  # may change when a run goes on: it may become longer or shorter

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

    def __post_init__(self):
        for name, limits in INTEGERS.items():
            checks.integer(name, getattr(self, name), *limits)
        for name, limits in NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                checks.number(name, value, *limits)
        if not isinstance(self.bf16, bool):
            raise ValueError(f"bf16 is {self.bf16!r}; it must be true or false")


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

    def before(self, step: int) -> float:
        """The share that is over before a step, the same in all processes: the clock is that of the first."""
        share_of_steps = step / self.config.steps
        if self.config.minutes is None:
            return min(1.0, share_of_steps)
        minutes = torch.tensor(self.minutes)
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
class Steps(Dataset):
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


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint that `save_checkpoint` wrote; nothing in it is executed. Raises CheckpointError for other files."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # unpickling may raise anything at all, and PyTorch's advice is to execute what it refused
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint of a training run; move it away to start anew")
    return state


class Training:
    """A module in training: its optimizer, its averaged weights, how many steps it has taken, how much is over."""

    def __init__(self, module: nn.Module, config: TrainConfig, samples: int, checkpoint: Path | None = None):
        self.module, self.config, self.settings = module, config, {**vars(config), "samples": samples}
        self.device = next(module.parameters()).device
        self.average = EMA(module, config.ema)
        self.optimizer = torch.optim.AdamW(
            module.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.steps, minutes = 0, 0.0
        if checkpoint is not None and checkpoint.exists():
            self.steps, minutes = self.restore(checkpoint)
        self.progress = Progress(config, minutes)
        self.over = self.progress.before(self.steps)
        module.train()

    def state(self) -> dict[str, object]:
        """All that a run needs to go on."""
        return {
            "config": self.settings,
            "step": self.steps,
            "minutes": self.progress.minutes,
            "model": self.module.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, checkpoint: Path) -> tuple[int, float]:
        """Weights, averages and optimizer as `state` had them; the steps and the minutes that it took to get there."""
        state = read_checkpoint(checkpoint, self.device)
        fixed = {name: value for name, value in self.settings.items() if name not in LENGTH}
        try:
            if differing := [name for name, value in fixed.items() if state["config"].get(name) != value]:
                names = ", ".join(differing)
                raise CheckpointError(f"{checkpoint} is of another run: {names} differ; give its, or another folder")
            load_strictly(self.module, state["model"], str(checkpoint))
            load_strictly(self.average.module, state["average"], str(checkpoint))
            self.optimizer.load_state_dict(state["optimizer"])
            return int(state["step"]), float(state["minutes"])
        except CheckpointError:
            raise
        except Exception as error:  # another program may have kept anything at all
            raise CheckpointError(
                f"{checkpoint} is a file of another program ({error!r}); move it away to start anew"
            ) from error

    def step(self, loss: Loss, batch: Batch) -> Record:
        """One step of AdamW. Raises FloatingPointError, and moves no weight, where loss or gradient is not finite."""
        rate = learning_rate(self.config, self.steps, self.over)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext():
            value, parts = loss(self.module, batch)
        value.backward()
        value, parts = average_gradients(self.module, value, parts)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        if not (math.isfinite(value.item()) and math.isfinite(norm.item())):
            raise FloatingPointError(
                f"at step {self.steps + 1} the loss is {value.item()}, the norm of its gradient {norm.item()}; "
                "the last checkpoint is intact"
            )
        self.optimizer.step()
        self.average.update(self.module, self.steps)
        self.steps += 1
        self.over = self.progress.before(self.steps)
        return Record(self.steps, value.item(), rate, norm.item(), {name: part.item() for name, part in parts.items()})


class Saver:
    """Writes a run's checkpoint: every `every` steps, when `seconds` have gone by since it last did, and at the end.

    Only the first process writes, so that its clock alone counts.
    """

    def __init__(self, checkpoint: Path | None, training: Training, every: int, seconds: float):
        self.checkpoint = checkpoint if share()[0] == 0 else None
        self.training, self.every, self.seconds = training, every, seconds
        self.steps, self.time = training.steps, time.monotonic()  # of the last save

    def due(self) -> bool:
        return (
            self.training.over == 1
            or self.training.steps % self.every == 0
            or time.monotonic() - self.time > self.seconds
        )

    def save(self) -> None:
        """Write the checkpoint, unless the last one is as new."""
        if self.checkpoint is not None and self.training.steps > self.steps:
            save_checkpoint(self.checkpoint, self.training.state())
            self.steps, self.time = self.training.steps, time.monotonic()


class Interrupt:
    """Ctrl-C, held back while a step is taken: `asked` says that it came. A second one is not held back.

    So is every signal that means the same: whose handler is Python's own for Ctrl-C. Only the main thread has signals.
    """

    def __init__(self):
        self.asked = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        meant, main = signal.default_int_handler, threading.current_thread() is threading.main_thread()
        signals = [s for s in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(s) is meant]

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(number, meant)

        for number in signals if not self.asked else []:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in signals:
                signal.signal(number, meant)

    def asked_anywhere(self) -> bool:
        """Whether it came to any process: all stop after the same step."""
        return bool(all_reduced(torch.tensor(self.asked), dist.ReduceOp.MAX))


@contextmanager
def locked(checkpoint: Path | None) -> Iterator[None]:
    """Keep a checkpoint to one run at a time: CheckpointError where another one has it. A killed one has it no more."""
    if checkpoint is None or share()[0] > 0:
        yield
        return
    lock = FileLock(checkpoint.with_name(f".{checkpoint.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"{checkpoint} is in use by another run that has not ended; wait for it, or use another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def fit(
    module: nn.Module,
    loss: Loss,
    data: Data,
    config: TrainConfig,
    checkpoint: Path | None = None,
    every: int = 500,
    seconds: float = 120.0,
    workers: int = 0,
) -> Generator[Record]:
    """Train `module` in place by AdamW, yielding a record after each step; at the end it holds the averaged weights.

    Where `checkpoint` exists the run goes on from it, bit for bit as if it had never stopped. It is written every
    `every` steps, when `seconds` have gone by since it was, and at the end; and, where a step has been taken since,
    when the generator is closed or Ctrl-C comes: the step that is being taken is finished first, then
    KeyboardInterrupt raised. A second Ctrl-C stops at once.

    Batches are made by `workers` processes, or between steps where there are none. Under torchrun each process takes
    its share of every batch, and gradients are averaged; `start_processes` sets up what that needs.

    Raises ValueError for an empty data set, CheckpointError for a checkpoint that is another run's or in use by one,
    and FloatingPointError when the loss is no longer finite: the last good checkpoint stays.
    """
    if len(data) == 0:
        raise ValueError("the data set is empty: there is nothing to train on")
    if config.batch_size % share()[1]:
        raise ValueError(f"a batch of {config.batch_size} can't be shared evenly among {share()[1]} processes")
    with locked(checkpoint):
        training, interrupt = Training(module, config, len(data), checkpoint), Interrupt()
        saver = Saver(checkpoint, training, every, seconds)
        batches = shares(Steps(data, config), range(training.steps, config.steps), training.device, workers)
        while training.over < 1:
            with interrupt.held_back():
                record = training.step(loss, next(batches))
                if saver.due():
                    saver.save()
                if stop := interrupt.asked_anywhere():
                    saver.save()
            if stop:
                raise KeyboardInterrupt
            try:
                yield record
            except GeneratorExit:
                saver.save()
                raise
    module.load_state_dict(training.average.module.state_dict())
    module.eval()


def shares(batches: Steps, steps: range, device: torch.device, workers: int) -> Iterator[Batch]:
    """This process's share of the batch of each step, on the device."""
    made: Iterable[Batch | None] = repeat(None, len(steps))
    if share()[0] == 0:
        made = DataLoader(
            batches, batch_size=None, sampler=steps, num_workers=workers, pin_memory=device.type == "cuda",
            worker_init_fn=ignore_interrupts,
        )  # fmt: skip
    for batch in made:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in scattered(batch).items()}


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which still asks this one for a batch when it has come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def scattered(batch: Batch | None) -> Batch:
    """A share of the batch for each process: the first one has made it, the others have None.

    Sample number i of the batch goes to process i modulo the number of processes.
    """
    ranks = share()[1]
    if ranks == 1:
        return batch
    shapes = [{name: (tensor[::ranks].shape, tensor.dtype) for name, tensor in batch.items()} if batch else None]
    dist.broadcast_object_list(shapes, src=0)
    mine = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes[0].items()}
    for name, tensor in mine.items():
        dist.scatter(tensor, [batch[name][r::ranks].contiguous() for r in range(ranks)] if batch else None, src=0)
    return mine


def average_gradients(module: nn.Module, loss: Tensor, parts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Replace each gradient by its mean over all processes; the same means of the loss and of its parts.

    Shares are equal, so that these are the gradient and the loss of the whole batch where the loss is a mean over
    samples. Some are not: a contrastive loss sees the negatives of its own share alone, `unexplained` (in `vae_loss`)
    a share's own covariances, and `misreadings` divides by how many samples of a share show an attribute. Their
    gradients differ a little from those of one process.
    """
    numbers = torch.stack([loss, *parts.values()]).detach().float()
    if share()[1] > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = all_reduced(torch.cat([g.flatten() for g in gradients] + [numbers]), dist.ReduceOp.SUM) / share()[1]
        *averaged, numbers = flat.split([*(g.numel() for g in gradients), len(numbers)])
        for gradient, mean in zip(gradients, averaged, strict=True):
            gradient.copy_(mean.view_as(gradient))
    return numbers[0], dict(zip(parts, numbers[1:], strict=True))


def all_reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """The tensors of all processes, reduced to one that all have."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def share() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) but under torchrun. The first one writes files and shows progress."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes() -> torch.device:
    """Join the other processes when started by torchrun; the device this process trains on.

    Gradients on a GPU go by NCCL. Batches, which the first process makes on its CPU and shares out, go by Gloo.
    """
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device
