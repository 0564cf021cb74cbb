"""The training loop: a run is a function of its config, whether stopped and resumed or shared among processes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.files import replacing
from minisd.train import TrainConfig, fit
from minisd.train.loop import batch_indices, learning_rate, step_generator
from minisd.weights import CheckpointError

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

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


def test_settings_that_make_no_sense_are_refused():
    for name, value in [("steps", 0), ("batch_size", 0.5), ("lr", -1), ("cooldown", 2), ("seed", -1), ("bf16", "no")]:
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            dataclasses.replace(RUN, **{name: value})


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


def with_parts(module, batch):
    return square_error(module, batch)[0], {"mean": batch["y"].mean()}


TWO = """
import signal, sys
from dataclasses import asdict
from pathlib import Path
import torch
from test_train import RUN, Line, fit, network, with_parts
from minisd.train.loop import share, start_processes

class Counted(Line):
    calls = 0

    def batch(self, indices, generator):
        self.calls += 1
        return super().batch(indices, generator)

start_processes()
folder, rank = sys.argv[1], share()[0]
module, data = network(), Counted()
records = [asdict(record) for record in fit(module, with_parts, data, RUN)]

def interrupted(module, batch):  # Ctrl-C comes to the second process alone, in step 5
    interrupted.steps += 1
    if interrupted.steps == 5 and rank == 1:
        signal.raise_signal(signal.SIGINT)
    return with_parts(module, batch)

interrupted.steps, stopped = 0, False
try:
    list(fit(network(), interrupted, Line(), RUN, Path(folder, "run.pt")))
except KeyboardInterrupt:
    stopped = True
found = {"records": records, "model": module.state_dict(), "calls": data.calls, "stopped": stopped}
torch.save(found | {"steps": interrupted.steps}, f"{folder}/{rank}.pt")
"""


def test_two_processes_equal_one(tmp_path):
    """torchrun with two processes: the same losses and weights as one, but for the order of sums.

    Each batch is made once. Ctrl-C to one of them stops both after the same step, which is kept.
    """
    whole = network()
    records = list(fit(whole, with_parts, Line(), RUN))
    (tmp_path / "two.py").write_text(TWO)
    subprocess.run([*TORCHRUN, tmp_path / "two.py", tmp_path], check=True, timeout=600, env=ENVIRONMENT)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in found:
        assert [r["loss"] for r in rank["records"]] == pytest.approx([r.loss for r in records], rel=1e-6)
        means = [r["parts"]["mean"] for r in rank["records"]]
        assert means == pytest.approx([r.parts["mean"] for r in records], rel=1e-6, abs=1e-7)
        for name, weight in whole.state_dict().items():
            assert torch.allclose(weight, rank["model"][name], rtol=1e-6, atol=1e-7)
    assert [rank["calls"] for rank in found] == [RUN.steps, 0]
    assert [(rank["stopped"], rank["steps"]) for rank in found] == [(True, 5)] * 2
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 5


def saved(path):
    return torch.load(path, weights_only=True)["step"]


def test_it_saves_by_the_clock(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("minisd.train.loop.time.monotonic", lambda: now)
    kept = []
    for record in fit(network(), square_error, Line(), RUN, tmp_path / "run.pt", every=9, seconds=100):
        kept.append(saved(tmp_path / "run.pt") if (tmp_path / "run.pt").exists() else 0)
        now += {4: 90, 5: 20, 6: 90}.get(record.step, 0)  # 110 seconds without a save are over after step 5, then 90
    assert kept == [0, 0, 0, 0, 0, 6, 6, 6, 9, 9, 9, 12]


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which a shell's job in the background does not get."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def presses(*steps, signals=(signal.SIGINT,)):
    """A loss that signals come during, at some steps."""

    def loss(module, batch):
        loss.calls += 1
        if loss.calls in steps:
            for number in signals:
                signal.raise_signal(number)
        return square_error(module, batch)

    loss.calls = 0
    return loss


def test_ctrl_c_in_a_step_lets_it_finish_saves_and_stops(tmp_path, ctrl_c):
    whole = list(fit(network(), square_error, Line(), RUN))
    path, first = tmp_path / "run.pt", []
    with pytest.raises(KeyboardInterrupt):
        first.extend(fit(network(), presses(6), Line(), RUN, path))
    assert saved(path) == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(fit(network(), square_error, Line(), RUN, path)) == whole[6:]


def test_a_second_ctrl_c_is_not_held_back(tmp_path, ctrl_c):
    loss = presses(6, signals=(signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(fit(network(), loss, Line(), RUN, tmp_path / "run.pt", every=4))
    assert saved(tmp_path / "run.pt") == 4  # the step was left in the middle
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_of_signals_are_left_alone():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        assert len(list(fit(network(), presses(6), Line(), RUN))) == RUN.steps
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_means_ctrl_c_is_treated_as_ctrl_c(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(fit(network(), presses(6, signals=(signal.SIGTERM,)), Line(), RUN, tmp_path / "run.pt"))
        assert saved(tmp_path / "run.pt") == 6
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_that_is_closed_between_steps_saves(tmp_path):
    run = fit(network(), square_error, Line(), RUN, tmp_path / "run.pt")
    for _ in range(5):
        next(run)
    run.close()
    assert saved(tmp_path / "run.pt") == 5


def test_it_trains_outside_the_main_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        records = pool.submit(lambda: list(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))).result()
    assert len(records) == RUN.steps and saved(tmp_path / "run.pt") == RUN.steps


class Workers(Line):
    """Says which process made the batch, and whether it ignores Ctrl-C."""

    def batch(self, indices, generator):
        ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return super().batch(indices, generator) | {"by": torch.tensor([[os.getpid(), ignores]] * len(indices))}


def test_batches_come_from_worker_processes_that_leave_ctrl_c_to_the_first(ctrl_c):
    by = {}

    def loss(module, batch):
        by.setdefault(workers, set()).add(tuple(batch["by"][0].tolist()))
        return square_error(module, batch)

    for workers in (0, 2):
        records = list(fit(network(), loss, Workers(), RUN, workers=workers))
        assert records == list(fit(network(), square_error, Line(), RUN))
    assert by[0] == {(os.getpid(), 0)}
    assert len(by[2]) == 2 and all(process != os.getpid() and ignores for process, ignores in by[2])


def test_a_checkpoint_is_for_one_run_at_a_time(tmp_path):
    first = fit(network(), square_error, Line(), RUN, tmp_path / "run.pt")
    next(first)
    with pytest.raises(CheckpointError, match=r"run\.pt is in use by another run"):
        next(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))
    first.close()
    assert len(list(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))) == RUN.steps - 1


def test_a_killed_run_leaves_its_checkpoint_to_the_next(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from test_train import *\n"
        "next(fit(network(), square_error, Line(), RUN, Path(sys.argv[1]), every=1)); os._exit(9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "run.pt"], env=ENVIRONMENT, timeout=120)
    assert killed.returncode == 9 and saved(tmp_path / "run.pt") == 1
    assert len(list(fit(network(), square_error, Line(), RUN, tmp_path / "run.pt"))) == RUN.steps - 1


def test_two_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    path = tmp_path / "x.bin"
    with replacing(path) as slow:
        slow.write_bytes(b"the slow one's")
        with replacing(path) as fast:
            fast.write_bytes(b"the fast one's")
        assert path.read_bytes() == b"the fast one's"
    assert path.read_bytes() == b"the slow one's"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="on Windows age tells, not whether the process runs")
def test_what_a_killed_writer_left_is_removed_and_no_other_writers(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from minisd.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary: temporary.write_bytes(b'half'); os._exit(9)"
    )
    path = tmp_path / "x.bin"
    subprocess.run([sys.executable, "-c", code, path], env=ENVIRONMENT, timeout=120)
    (left,) = tmp_path.iterdir()
    alive = [tmp_path / f".x.bin.{os.getppid()}.0.part", tmp_path / ".x.bin.other.0.part", tmp_path / ".y.1.part"]
    for other in alive:
        other.touch()
    with replacing(path) as temporary:
        temporary.write_bytes(b"whole")
    assert not left.exists() and set(tmp_path.iterdir()) == {path, *alive}


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


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(Path(self.path, "executed")),)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path, malicious = tmp_path / "run.pt", Malicious()
    malicious.path = tmp_path
    half = {"config": {**vars(RUN), "samples": 40}, "model": network().state_dict()}
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        next(fit(network(), square_error, Line(), RUN, path))
    for content in (malicious, network().state_dict(), {"config": 3}, [1, 2], torch.zeros(3), half):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"run\.pt is .*move it away") as error:
            next(fit(network(), square_error, Line(), RUN, path))
        shown = "".join(traceback.format_exception(error.value))
        assert "weights_only" not in shown
    assert not (tmp_path / "executed").exists()


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
    run = subprocess.Popen([*TORCHRUN, str(script)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "died").exists():
        assert run.poll() is None
        time.sleep(0.1)
    assert run.wait(timeout=30) != 0
