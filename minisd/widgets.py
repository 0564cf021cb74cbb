"""The course's sliders: a function that draws a picture, live in a notebook and as a strip of stills elsewhere."""

from __future__ import annotations

import asyncio
import base64
import html
import io
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
from PIL import Image, ImageDraw, ImageFont

Draw = Callable[..., Image.Image]
Values = Sequence[Any] | str


def strip(draw: Draw, stills: int = 5, **sliders: Values) -> Image.Image:
    """A row of captioned stills: the first slider at evenly spaced values, the others where `explorer` starts them."""
    start = {name: _start(values) for name, values in sliders.items()}
    name, values = next(iter(sliders.items()))
    values = [values] if isinstance(values, str) else values
    stills = min(stills, len(values))
    chosen = [values[round(i * (len(values) - 1) / max(stills - 1, 1))] for i in range(stills)]
    return _row([_captioned(draw(**{**start, name: value}), f"{name} = {value}") for value in chosen])


def explorer(draw: Draw, stills: int = 5, **sliders: Values) -> Explorer:
    """Sliders over the arguments of `draw`, and its picture beneath. Make it the last line of a cell.

    Numbers make a slider that starts in the middle, other values a menu that starts with the first, a text a field:
    `explorer(draw, t=range(0, 1000, 50), sampler=["euler", "heun"], prompt="a cat")` first shows
    `draw(t=500, sampler="euler", prompt="a cat")`.

    The latest position wins: those passed over while a picture is drawn are never drawn. An exception is shown where
    the picture would be. Where no kernel is alive, the cell shows `strip(draw, stills, **sliders)`.
    """
    return Explorer(draw, stills, sliders)


class Explorer(ipywidgets.VBox):
    """What `explorer` returns."""

    def __init__(self, draw: Draw, stills: int, sliders: dict[str, Values]):
        self._draw = lru_cache(256)(draw)  # positions seen, those of the strip among them, answer at once
        self._still = strip(self._draw, stills, **sliders)
        self._controls = {name: _control(name, values) for name, values in sliders.items()}
        self._picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # its own size
        self._error = ipywidgets.HTML()
        self._rendering: asyncio.Task | None = None
        self._stale = True
        super().__init__([*self._controls.values(), self._picture, self._error])
        self._render()
        for control in self._controls.values():
            control.observe(self._changed, "value")

    def _changed(self, _change: dict) -> None:
        self._stale = True
        if self._rendering is None:
            self._rendering = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """Draws until the picture shows the sliders' position; between pictures the kernel hears of newer positions."""
        try:
            while self._stale:
                await asyncio.sleep(0.02)
                self._render()
        finally:
            self._rendering = None

    def _render(self) -> None:
        self._stale = False
        values = {name: control.value for name, control in self._controls.items()}
        try:
            self._picture.value = _png(self._draw(**values))
            self._error.value = ""
        except Exception:
            self._error.value = f"<pre style='color: firebrick'>{html.escape(traceback.format_exc())}</pre>"

    def _repr_mimebundle_(self, **kwargs) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["image/png"] = base64.b64encode(_png(self._still)).decode()
        bundle["text/plain"] = f"explorer({', '.join(self._controls)})"
        return bundle


def _is_range(values: Values) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _start(values: Values) -> Any:
    if isinstance(values, str):
        return values
    return values[len(values) // 2] if _is_range(values) else values[0]


def _control(name: str, values: Values) -> ipywidgets.Widget:
    if isinstance(values, str):
        return ipywidgets.Text(values, description=name, continuous_update=False)
    kind = ipywidgets.SelectionSlider if _is_range(values) else ipywidgets.Dropdown
    return kind(options=list(values), value=_start(values), description=name)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(14)
    framed = Image.new("RGB", (image.width, image.height + 22), "white")
    framed.paste(image, (0, 22))
    ImageDraw.Draw(framed).text((image.width / 2, 11), caption, "black", font, anchor="mm")
    return framed


def _row(images: list[Image.Image], gap: int = 4) -> Image.Image:
    row = Image.new("RGB", (sum(image.width + gap for image in images) - gap, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row
