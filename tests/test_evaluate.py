"""Measures against closed forms."""

import math

import pytest
import torch

from minisd.critters import PARTS, Scene
from minisd.critters.segmenter import COUNTED
from minisd.evaluate import Count, adherence, anatomy, diversity, frechet_distance, psnr


def test_interval_covers_the_true_share_as_often_as_it_says():
    draws = torch.distributions.Binomial(200, torch.tensor(0.97))
    torch.manual_seed(0)
    inside = [low <= 0.97 <= high for low, high in (Count(int(k), 200).interval() for k in draws.sample((2000,)))]
    assert sum(inside) / 2000 >= 0.985


def test_adherence_counts_what_the_style_shows():
    scenes = [Scene(fur="orange"), Scene(fur="black", style="pencil sketch"), Scene(fur="gray")]
    readings = [{"species": "cat", "fur": fur} for fur in ("orange", "white", "white")]
    assert adherence(scenes, readings) == {"species": Count(3, 3), "fur": Count(1, 2)}


def test_anatomy_is_right_where_every_part_shows_as_often_as_it_does_in_renders():
    def eyes(*columns: int) -> torch.Tensor:
        parts = torch.zeros(128, 128, dtype=torch.long)
        parts[30:90, 30:100] = PARTS.index("head")
        for column in columns:
            parts[50:58, column : column + 8] = PARTS.index("eyes")
        return parts

    class Segmenter:
        def parts(self, drawn):
            return torch.stack([eyes(40, 60), eyes(40, 60, 80), eyes(40), eyes(40)])

    scenes = [Scene(), Scene(), Scene(), Scene(look="left")]
    front = [(2, 2), (0, 0), (1, 1), (0, 0), (0, 0), (1, 1)]
    usual = {"cat, sitting, front": front, "cat, sitting, left": [(1, 2), *front[1:]]}
    found = anatomy(Segmenter(), usual, scenes, torch.zeros(4, 3, 128, 128))
    assert found["eyes"] == found["whole"] == Count(2, 4)
    assert all(found[name] == Count(4, 4) for name in COUNTED if name != "eyes")


def test_psnr_of_a_known_error_and_inside_a_mask():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[..., :2] = 0.2
    assert psnr(a, b).item() == pytest.approx(-10 * math.log10(0.02 / 4), abs=1e-4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    assert psnr(a, b, mask).item() == pytest.approx(20.0, abs=1e-4)


def test_frechet_distance_of_gaussians_with_known_moments():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    b = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 3.0]) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(2 + 1 + 4, rel=0.02)  # |1,1|^2 + (2-1)^2 + (3-1)^2


def test_diversity_is_the_mean_distance():
    assert diversity(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])) == pytest.approx((5 + 8 + 5) / 3)


def test_nothing_counted_says_nothing():
    assert Count(0, 0).interval() == (pytest.approx(0, abs=1e-12), pytest.approx(1))
