"""Parts are labelled where they are, counted piece by piece, and compared with what renders of their kind show."""

import math

import pytest
import torch
import torch.nn.functional as F

from minisd.critters import PARTS, Scene, camera, render, segmenter
from minisd.critters.anatomy import anatomy
from minisd.critters.segmenter import (
    COUNTED,
    Segmenter,
    Segments,
    count,
    group,
    patched,
    pieces,
    segmentation_loss,
    usual,
)

INDEX = {name: i for i, name in enumerate(PARTS)}


def drawn(*squares: tuple[str, int, int, int]) -> torch.Tensor:
    """A map of parts with squares in it: part, row, column, side."""
    parts = torch.zeros(1, 128, 128, dtype=torch.long)
    for name, row, column, side in squares:
        parts[0, row : row + side, column : column + side] = INDEX[name]
    return parts


def test_pieces_are_connected_at_corners_too_and_each_picture_has_its_own():
    mask = torch.zeros(2, 9, 9, dtype=torch.bool)
    mask[0, 0:2, 0:2] = mask[0, 2, 2] = True  # touches at a corner: one piece of 5
    mask[0, 5, 1:8] = True  # a row of 7
    mask[0, 6:9, 7] = True  # hangs on its end
    assert [sorted(sizes.tolist()) for sizes in pieces(mask)] == [[5, 10], []]


def test_pieces_of_a_long_spiral_are_one():
    mask = torch.zeros(1, 15, 15, dtype=torch.bool)
    row, column, step = 0, 0, (0, 1)
    mask[0, 0, 0] = True
    for length in (14, 14, 14, 12, 12, 10, 10, 8, 8, 6, 6):
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            mask[0, row, column] = True
        step = (step[1], -step[0])
    assert len(pieces(mask)[0]) == 1


def test_counts_are_of_pieces_that_are_large_enough():
    cat = [("head", 40, 40, 40), ("ears", 30, 40, 10), ("ears", 30, 70, 10), ("eyes", 50, 45, 8), ("eyes", 50, 65, 8)]
    body = [("body", 80, 50, 20), ("legs", 100, 50, 8), ("legs", 100, 62, 8), ("tail", 90, 70, 6)]
    names = list(COUNTED)
    assert dict(zip(names, count(drawn(*cat, *body))[0].tolist(), strict=True)) == {
        "eyes": 2, "ears": 2, "heads": 1, "legs": 2, "tails": 1, "animals": 1,
    }  # fmt: skip
    third_eye, speck = ("eyes", 65, 55, 5), ("eyes", 75, 45, 2)
    floats, second_head = ("legs", 110, 10, 8), ("head", 0, 100, 12)
    found = count(drawn(*cat, *body, third_eye, speck, floats, second_head))[0].tolist()
    assert found == [3, 2, 2, 3, 1, 3]


def test_ears_legs_and_tails_are_labelled_where_they_are():
    """The tips of the ears, the paws and the end of the tail of standing critters, projected onto the picture."""
    scenes = [
        Scene(species=s, pose="standing", look=look, seed=5) for s in ("cat", "dog") for look in ("left", "right")
    ]
    parts, a = render(scenes, 256).parts[:, 0], anatomy(scenes)

    def label(points) -> list[str]:
        (u, v), _ = camera.project(a, points)
        rows, columns = ((1 - v) * 128).long()[:, 0], ((u + 1) * 128).long()[:, 0]
        return [PARTS[parts[i, r, c]] for i, (r, c) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))]

    def of_body(point):
        return camera.out_of(a.body_axes, point)

    assert label(of_body(a.tail[:, -1])) == ["tail"] * 4
    near = torch.where(a.body_axes[2, 0] > 0, 1.0, -1.0)  # the side that is turned to the viewer
    for paw in (a.fore_paw, a.hind_paw):
        side = paw * torch.stack([near, torch.ones_like(near), torch.ones_like(near)])
        assert label(of_body(side)) == ["legs"] * 4
    upright = 0.25 * a.ear_root + 0.75 * a.ear_tip
    for side in (1, -1):  # a cat's are seen from everywhere
        mirror = torch.tensor([side, 1, 1])[:, None, None]
        assert label(camera.head_to_world(a, upright * mirror))[:2] == ["ears"] * 2


def test_what_is_usual_leaves_out_one_in_a_hundred_at_either_end():
    scenes = [Scene(seed=i) for i in range(300)] + [Scene("dog", look="left", seed=i) for i in range(4)]
    counts = torch.full((304, len(COUNTED)), 2)
    counts[:2, 0], counts[2:6, 0], counts[6:8, 1], counts[300, 5] = 9, 3, 0, 1
    table = usual(scenes, counts)
    assert set(table) == {"cat, sitting, front", "dog, sitting, left"} == {group(s) for s in scenes}
    assert table["cat, sitting, front"] == [(2, 3), *[(2, 2)] * 5]  # two nines and two noughts in 300 are not usual
    assert table["dog, sitting, left"] == [*[(2, 2)] * 5, (1, 2)]


def test_segments_are_mirrored_with_their_pictures(monkeypatch):
    monkeypatch.setattr(segmenter, "patched", lambda image, parts, generator: (image, parts))
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    images[..., :40] = 255
    parts = torch.zeros(1, 128, 128, dtype=torch.uint8)
    parts[..., :40] = INDEX["head"]
    batch = Segments(images, parts).batch(torch.zeros(40, dtype=torch.long), torch.Generator().manual_seed(0))
    left = batch["image"].mean((1, 2))[:, :30].mean(1) > 0
    assert 8 < left.sum() < 32
    for on_the_left, labels in zip(left, batch["parts"], strict=True):
        assert (labels == INDEX["head"]).any(0).nonzero()[:, 0].tolist() == (
            list(range(40)) if on_the_left else list(range(88, 128))
        )
    assert batch["image"].abs().max() <= 1


def test_half_of_the_segments_have_a_patch_of_their_neighbour_moved_with_its_parts():
    number = torch.arange(60)[:, None, None] * 128**2 + torch.arange(128**2).view(128, 128)  # of every pixel of a batch
    image, parts = patched(number[:, None].expand(-1, 3, -1, -1).float(), number, torch.Generator().manual_seed(0))
    assert (image == parts[:, None]).all()
    changed, sizes, moves = parts != number, [], []
    for i in changed.flatten(1).any(1).nonzero()[:, 0].tolist():
        rows, columns = changed[i].any(1).nonzero()[:, 0], changed[i].any(0).nonzero()[:, 0]
        patch = parts[i, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert changed[i].sum() == patch.numel() and (patch // 128**2 == (i - 1) % 60).all()
        place = patch % 128**2
        assert place.equal(place[0, 0] + 128 * torch.arange(len(rows))[:, None] + torch.arange(len(columns)))
        sizes += patch.shape
        moves.append(int(place[0, 0]) - int(rows[0] * 128 + columns[0]))
    assert 18 <= len(moves) <= 42 and sum(move == 0 for move in moves) < 3
    assert 16 <= min(sizes) < 22 and 58 < max(sizes) <= 64


def test_segmentation_loss_is_the_mean_surprise_at_every_pixel():
    logits = torch.randn(2, len(PARTS), 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = torch.randint(len(PARTS), (2, 4, 4), generator=torch.Generator().manual_seed(1))
    value, _ = segmentation_loss(lambda images: logits, {"image": None, "parts": parts})
    right = logits.gather(1, parts[:, None])[:, 0]
    assert value.item() == pytest.approx((logits.exp().sum(1).log() - right).mean().item(), rel=1e-5)
    even, _ = segmentation_loss(lambda images: torch.zeros(2, len(PARTS), 4, 4), {"image": None, "parts": parts})
    assert even.item() == pytest.approx(math.log(len(PARTS)))


def test_the_segmenter_can_learn_a_picture():
    """Its two halves fit together: a few steps on two pictures, and it knows nearly every pixel."""
    scenes = [Scene(seed=1), Scene("dog", pose="standing", seed=2)]
    r = render(scenes, 128)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Segmenter(widths=(16, 32, 32), groups=4)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(100):
        loss = F.cross_entropy(module(r.image), r.parts[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (module.parts(r.image) == r.parts[:, 0]).float().mean()
    assert right > 0.9
