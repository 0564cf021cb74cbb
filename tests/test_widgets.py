"""The sliders in a real kernel, moved by the messages that a browser sends."""

import json
import time

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image

from minisd.widgets import explorer, strip

CELL = """
import time
from PIL import Image
from minisd.widgets import explorer
drawn = []
def draw(t, word):
    drawn.append(t)
    time.sleep(0.2)
    if t == 13:
        raise RuntimeError("thirteen")
    return Image.new("RGB", (8, 8), (t, 0, 0))
view = explorer(draw, stills=3, t=range(101), word=["a", "b"])
drawn.clear()
slider, menu = view._controls.values()
print(slider.model_id)
"""


class Kernel:
    """A kernel, and the two things a person does to it: run code and move a slider."""

    def __init__(self):
        self.manager, self.client = start_new_kernel()

    def run(self, code):
        printed = []

        def collect(message):
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(code, timeout=60, output_hook=collect)
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip()

    def move(self, model, index):
        data = {"method": "update", "state": {"index": index}, "buffer_paths": []}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", {"comm_id": model, "data": data}))

    def settled(self):
        """Waits until no picture is being drawn."""
        self.run("import asyncio\nawait asyncio.sleep(0.1)\nwhile view._rendering: await asyncio.sleep(0.05)")


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


@pytest.fixture
def slider(kernel):
    return kernel.run(CELL)


def drawn(kernel):
    return json.loads(kernel.run("print(drawn)"))


def test_the_latest_position_wins(kernel, slider):
    for index in range(60, 100):
        kernel.move(slider, index)
    kernel.settled()
    positions = drawn(kernel)
    assert positions[-1] == 99 and len(positions) < 20  # 3 on an idle machine; 40 pictures would take 8 s
    assert kernel.run("import io; print(Image.open(io.BytesIO(view._picture.value)).getpixel((0, 0)))") == "(99, 0, 0)"


def test_positions_seen_are_not_drawn_again(kernel, slider):
    for index in (100, 61, 100, 50, 61):  # 0, 50 and 100 are the stills of the strip
        kernel.move(slider, index)
        kernel.settled()
    assert drawn(kernel) == [61]


def test_an_exception_is_shown_and_the_next_position_draws_again(kernel, slider):
    kernel.move(slider, 13)
    kernel.settled()
    assert "RuntimeError: thirteen" in kernel.run("print(view._error.value)")
    kernel.move(slider, 70)
    kernel.settled()
    assert drawn(kernel) == [13, 70] and kernel.run("print(view._error.value)") == ""


def test_an_interrupt_leaves_kernel_and_slider_usable(kernel, slider):
    kernel.move(slider, 62)
    time.sleep(0.12)  # the picture of 62 takes 0.2 s
    kernel.manager.interrupt_kernel()
    kernel.move(slider, 80)
    kernel.settled()
    assert drawn(kernel)[-1] == 80


def picture(t, word="a"):
    return Image.new("RGB", (20, 10), (t, 0, 0))


def test_a_strip_runs_along_the_first_slider():
    row = strip(picture, stills=3, t=range(201), word=["a", "b"])
    assert row.size == (20 * 3 + 4 * 2, 10 + 22)
    assert [row.getpixel((x, 27)) for x in (10, 34, 58)] == [(0, 0, 0), (100, 0, 0), (200, 0, 0)]
    assert np.asarray(row.convert("L"))[:22].min() < 128  # captions


def test_without_a_kernel_the_cell_shows_the_strip():
    bundle = explorer(picture, t=[1, 2, 3])._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}


def test_controls_follow_the_values():
    seen = []
    explorer(lambda **values: (seen.append(values), picture(0))[1], t=[0.1, 0.5, 0.9], flag=[False, True], text="cat")
    assert {"t": 0.5, "flag": False, "text": "cat"} in seen
