"""The course's figures: panels that draw into a pair of axes, and `show`, which makes one picture of them.

A panel is a function of matplotlib's axes; `points`, `arrows`, `paths`, `picture` and `curves` make some. Figures come
out as PIL images, so that a cell may end with one and a slider may draw one. Colours are Okabe and Ito's (2008), which
colour-blind readers can tell apart: cats are orange, dogs are blue.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .image import one_to_pil

Panel = Callable[[Axes], object]

COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
DRAWING = threading.RLock()  # matplotlib's settings are one for all threads; a slider draws in one of its own
GREY, PALE = "#666666", "#D8D8D8"
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
}


def show(
    *panels: Panel | Sequence[Panel],
    titles: Sequence[str] = (),
    columns: int | None = None,
    width: float = 2.3,
    height: float | None = None,
) -> Image.Image:
    """Panels in rows of `columns`, each `width` by `height` inches; a list of panels is drawn in one place."""
    columns = columns or len(panels)
    rows = math.ceil(len(panels) / columns)
    with DRAWING, matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(columns * width, rows * (height or width)), layout="constrained")
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            for layer in [panel] if callable(panel) else panel:
                layer(axes)
            if place < len(titles):
                axes.set_title(titles[place])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return Image.open(buffer)


def points(
    x: Float[Tensor, "n 2"],
    labels: Int[Tensor, "n"] | None = None,
    color: str = GREY,
    size: float = 3.0,
    limit: float = 2.6,
) -> Panel:
    """A cloud, coloured by label; `limit` is the half-width of the square that is shown, the same in every panel."""

    def draw(axes: Axes) -> None:
        colors = color if labels is None else np.array(COLORS)[labels.cpu().numpy()]
        across, up = x.detach().cpu().numpy().T
        axes.scatter(across, up, s=size, c=colors, linewidths=0)
        _plane(axes, limit)

    return draw


def arrows(x: Float[Tensor, "n 2"], dx: Float[Tensor, "n 2"], color: str = "black", limit: float = 2.6) -> Panel:
    """An arrow from each x to x + dx."""

    def draw(axes: Axes) -> None:
        start, step = (v.detach().cpu().numpy().T for v in (x, dx))
        axes.quiver(*start, *step, color=color, angles="xy", scale_units="xy", scale=1, width=0.004)
        _plane(axes, limit)

    return draw


def paths(x: Float[Tensor, "steps n 2"], color: str = GREY, limit: float = 2.6) -> Panel:
    """The way of each of n points through the steps."""

    def draw(axes: Axes) -> None:
        axes.plot(*x.detach().cpu().numpy().transpose(2, 0, 1), color=color, linewidth=0.7, alpha=0.7, zorder=0.5)
        _plane(axes, limit)

    return draw


def picture(x: Float[Tensor, "3 h w"]) -> Panel:
    """A picture in [-1, 1]; what lies outside is clamped."""

    def draw(axes: Axes) -> None:
        axes.imshow(np.asarray(one_to_pil(x)), interpolation="nearest")
        axes.axis("off")

    return draw


def curves(
    x: Sequence[float] | Tensor,
    lines: Mapping[str, Sequence[float] | Tensor],
    xlabel: str,
    ylabel: str,
    level: float | None = None,
    **scales: str,
) -> Panel:
    """Lines over a common x, each with its name at its right end; `level` draws a dashed line.

    `scales` are matplotlib's, such as `yscale="log"`.
    """

    def draw(axes: Axes) -> None:
        axes.set(xlabel=xlabel, ylabel=ylabel, **scales)
        if level is not None:
            axes.axhline(level, color=PALE, linestyle="--", linewidth=1.2)
        for y, color in zip(lines.values(), COLORS, strict=False):
            axes.plot(x, y, color=color)
        axes.autoscale_view()
        to_axes = axes.transData + axes.transAxes.inverted()
        ends = [to_axes.transform((float(x[-1]), float(y[-1])))[1] for y in lines.values()]
        heights = _apart(ends)
        for name, height, color in zip(lines, heights, COLORS, strict=False):
            axes.text(1.02, height, name, color=color, transform=axes.transAxes, va="center")

    return draw


def _plane(axes: Axes, limit: float) -> None:
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(PALE)


def _apart(heights: Sequence[float], gap: float = 0.09) -> list[float]:
    """The heights of labels, pushed up where the next lower one is too near."""
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed.tolist()
