"""Figures come out at the size asked for, with every point and line in its colour, and no label on another."""

import threading

import matplotlib
import numpy as np
import pytest
import torch

from minisd import plots


def pixels_of(image, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.asarray(image.convert("RGB")) == rgb).all(-1)


def test_points_lie_where_they_should_in_their_own_colour():
    corners = torch.tensor([[-2.0, 2.0], [2.0, -2.0]])
    image = plots.show(plots.points(corners, torch.tensor([0, 1]), size=60))
    assert image.size == (230, 230)
    (top, left), (bottom, right) = (np.argwhere(pixels_of(image, color)).mean(0) for color in plots.COLORS[:2])
    assert top < 60 and left < 60 and bottom > 170 and right > 170


def test_panels_fill_rows_and_layers_share_one():
    black, white = torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)
    image = plots.show(plots.picture(black), plots.picture(white), plots.picture(black), columns=2, width=1.5, height=1)
    assert image.size == (300, 200)
    dark = np.asarray(image.convert("RGB")).mean(-1) < 128
    assert dark[:100, :150].any() and not dark[:100, 150:].any() and dark[100:, :150].any()
    assert plots.show([plots.points(torch.zeros(1, 2)), plots.paths(torch.zeros(2, 1, 2))]).size == (230, 230)


def test_labels_of_lines_that_meet_are_moved_apart():
    assert plots._apart([0.5, 0.1, 0.5], gap=0.1) == pytest.approx([0.5, 0.1, 0.6])
    lines = {"one": [0.0, 1.0], "other": [1.0, 1.0]}
    image = plots.show(plots.curves([0, 1], lines, "x", "y"), width=4)
    assert all(pixels_of(image, color).any() for color in plots.COLORS[:2])


def test_two_threads_leave_the_settings_as_they_were():
    before, first_in, second_in = dict(matplotlib.rcParams), threading.Event(), threading.Event()

    def first(axes):  # it goes on drawing while the second begins, if that may
        first_in.set()
        second_in.wait(0.5)

    slider = threading.Thread(target=plots.show, args=(first,))
    slider.start()
    first_in.wait(10)
    plots.show(lambda axes: second_in.set())
    slider.join(10)
    assert {name for name, value in matplotlib.rcParams.items() if before[name] != value} == set()
