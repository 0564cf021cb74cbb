"""The training loop: a run is a function of its config, whether stopped and resumed or shared among processes."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.files import CheckpointError
from minisd.train import TrainConfig, fit
from minisd.train.loop import batch_indices, learning_rate, step_generator

RUN = TrainConfig(steps=12, batch_size=8, lr=0.01, warmup=3, ema=0.9)


class Line:
    """Points of a noisy line; every visit adds fresh noise."""

    def __init__(self, samples=40):
        self.x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return len(self.x)

    def batch(self, indices, generator):
        x = self.x[indices]
        y = x.sum(1, keepdim=True) + 0.1 * torch.randn(len(x), 1, generator=generator)
        return {"x": x, "y": y}


def square_error(module, batch):
    return F.mse_loss(module(batch["x"]), batch["y"]), {}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))


def test_learns_and_ends_with_the_averaged_weights():
    config = dataclasses.replace(RUN, steps=300)
    module, losses = network(), []
    for record in fit(module, square_error, Line(), config):
        losses.append(record.loss)
        last = [p.detach().clone() for p in module.parameters()]
    assert sum(losses[-20:]) / 20 < 0.1 * losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(last, module.parameters(), strict=True))


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resume_is_bit_equal_in_every_part(tmp_path, stop):
    whole, halves = network(), network()
    records = list(fit(whole, square_error, Line(), RUN, tmp_path / "whole.pt"))
    run = fit(halves, square_error, Line(), RUN, tmp_path / "halves.pt", every=1)
    first = [next(run) for _ in range(stop)]
    run.close()
    torch.manual_seed(stop)  # the state of the global generator must not matter
    resumed = network()
    second = list(fit(resumed, square_error, Line(), RUN, tmp_path / "halves.pt"))
    assert first + second == records
    a, b = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "halves"))
    for part in ("model", "average"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[name], b["optimizer"]["state"][key][name]) for name in state)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_data_order_and_randomness_depend_on_the_step_alone():
    order = torch.cat([batch_indices(RUN, step, 20) for step in range(5)])
    assert sorted(order[:20].tolist()) == sorted(order[20:].tolist()) == list(range(20))
    assert order[:20].tolist() != order[20:].tolist()
    draws = [torch.randn(4, generator=step_generator(RUN, step)) for step in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_learning_rate_rises_stays_and_falls():
    config = TrainConfig(steps=100, batch_size=1, lr=1.0, warmup=10, cooldown=0.2)
    rates = [learning_rate(config, step, step / 100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("stop", [None, 7])
def test_minutes_end_a_run_at_a_rate_of_zero(tmp_path, monkeypatch, stop):
    now = 0.0

    def six_seconds(module, batch):
        nonlocal now
        now += 6
        return square_error(module, batch)

    monkeypatch.setattr("minisd.train.loop.time.monotonic", lambda: now)
    timed = dataclasses.replace(RUN, steps=1_000, minutes=2, cooldown=0.5, warmup=1)
    records = []
    if stop:
        run = fit(network(), six_seconds, Line(), timed, tmp_path / "run.pt", every=1)
        records = [next(run) for _ in range(stop)]
        run.close()
        now += 3600  # nobody trains in this hour
    records += fit(network(), six_seconds, Line(), timed, tmp_path / "run.pt")
    assert [record.step for record in records] == list(range(1, 21))
    falling = [timed.lr * (20 - step) / 10 for step in range(10, 20)]
    assert [record.lr for record in records] == pytest.approx([timed.lr] * 10 + falling)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["minutes"] == pytest.approx(2)
    assert list(fit(network(), six_seconds, Line(), timed, tmp_path / "run.pt")) == []


def test_empty_data_and_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data set is empty"):
        next(fit(network(), square_error, Line(0), RUN))
    list(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))
    with pytest.raises(CheckpointError, match="batch_size"):
        next(fit(network(), square_error, Line(), dataclasses.replace(RUN, batch_size=4), tmp_path / "run.pt"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def breaks(module, batch):
        value, parts = square_error(module, batch)
        breaks.calls += 1
        return (value * float("nan") if breaks.calls == 6 else value), parts

    breaks.calls = 0
    with pytest.raises(FloatingPointError, match="step 6"):
        list(fit(network(), breaks, Line(), RUN, tmp_path / "run.pt", every=1))
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["step"] == 5
    assert all(t.isfinite().all() for t in state["model"].values())


def test_two_processes_equal_one(tmp_path):
    """torchrun with two processes: the same losses and weights as one, but for the order of sums."""
    whole = network()
    records = list(fit(whole, square_error, Line(), RUN))
    script = tmp_path / "two.py"
    script.write_text(
        "import torch\n"
        "from test_train import RUN, Line, fit, network, square_error\n"
        "from minisd.train.loop import start_processes\n"
        "start_processes()\n"
        "module = network()\n"
        "losses = [r.loss for r in fit(module, square_error, Line(), RUN)]\n"
        f"torch.save((losses, module.state_dict()), r'{tmp_path}/' + str(torch.distributed.get_rank()) + '.pt')\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for rank in (0, 1):
        losses, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert losses == pytest.approx([r.loss for r in records], rel=1e-6)
        for name, weight in whole.state_dict().items():
            assert torch.allclose(weight, state[name], rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(tmp_path):
    def breaks(module, batch):
        value, parts = square_error(module, batch)
        breaks.calls += 1
        if breaks.calls == 6:
            value.register_hook(lambda gradient: gradient * float("inf"))  # the loss itself stays finite
        return value, parts

    breaks.calls = 0
    with pytest.raises(FloatingPointError, match="step 6"):
        list(fit(network(), breaks, Line(), RUN, tmp_path / "run.pt", every=1))
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["step"] == 5
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "run.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        next(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from minisd.train.loop import read_checkpoint, save_checkpoint

path, clock = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)
saved, lost, corrupt = 0, 0, 0
for _ in range(200):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(saved + 1, sys.maxsize):
            save_checkpoint(path, {"step": step, "model": {str(i): torch.full((1 << 15,), step) for i in range(4)}})
            os.write(tell, step.to_bytes(8, "little"))
    os.close(tell)
    acknowledged = int.from_bytes(os.read(told, 8), "little")  # the first save of this child is done
    time.sleep(clock.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(told, 8):
        acknowledged = int.from_bytes(more, "little")
    os.close(told)
    state = read_checkpoint(path, torch.device("cpu"))
    corrupt += any((tensor != state["step"]).any() for tensor in state["model"].values())
    lost += state["step"] < acknowledged
    saved = state["step"]
print(saved, lost, corrupt)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked 200 times, which Windows can't")
def test_killed_200_times_while_saving_it_loses_no_step_and_spoils_no_file(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run.pt")]
    output = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
    saved, lost, corrupt = map(int, output.split())
    assert saved >= 200
    assert (lost, corrupt) == (0, 0)
    assert len(list(tmp_path.iterdir())) <= 2  # the checkpoint, and what the last kill left half written


def test_a_killed_process_ends_the_whole_run_within_30_seconds(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal\n"
        "from dataclasses import replace\n"
        "from test_train import RUN, Line, fit, network, square_error\n"
        "from minisd.train.loop import share, start_processes\n"
        "start_processes()\n"
        "for record in fit(network(), square_error, Line(), replace(RUN, steps=10**6)):\n"
        "    if record.step == 5 and share()[0] == 1:\n"
        f"        open(r'{tmp_path / 'died'}', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "died").exists():
        assert run.poll() is None
        time.sleep(0.1)
    assert run.wait(timeout=30) != 0
