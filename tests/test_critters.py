"""Critters: scenes, captions and renders agree with each other, and a scene is always the same picture."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

from minisd.critters import (
    PARTS,
    WORDS,
    Scene,
    batches,
    camera,
    caption,
    captions,
    field,
    prompt,
    render,
    styles,
    trace,
)
from minisd.critters.anatomy import DISTANCE, GROUND, anatomy
from minisd.critters.scene import EYES, FURS, PATTERN_WEIGHTS, PATTERNS, SPECIES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Four scenes in each style, looking to the front."""
    random = generator(3)
    drawn = [Scene.sample(random, "all") for _ in range(20)]
    styles = itertools.cycle(WORDS["style"])
    return [dataclasses.replace(s, style=style, look="front") for s, style in zip(drawn, styles, strict=False)]


@pytest.fixture(scope="module")
def renders(scenes):
    return render(scenes, 64)


# Scenes


def test_scene_refuses_unknown_words_and_names_the_known():
    with pytest.raises(ValueError, match=r"fur='purple'.*orange, black, white"):
        Scene(fur="purple")
    with pytest.raises(ValueError, match=r"spotted.*not for a cat"):
        Scene(species="cat", pattern="spotted")
    with pytest.raises(ValueError, match="white chest"):
        Scene(fur="white", pattern="tuxedo")
    with pytest.raises(ValueError, match="seed=-1"):
        Scene(seed=-1)
    with pytest.raises(ValueError, match="split='test'"):
        Scene.sample(generator(), "test")


def test_scenes_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = [Scene.sample(generator(5)) for _ in range(3)]
    torch.manual_seed(2)
    assert first == [Scene.sample(generator(5)) for _ in range(3)]


def test_every_word_is_sampled():
    random = generator(1)
    drawn = [Scene.sample(random) for _ in range(600)]
    for name, words in WORDS.items():
        assert {getattr(s, name) for s in drawn} == set(words)


def test_one_combination_in_twenty_is_held_out():
    """Of 1200 combinations a fair coin of 1/20 holds out 60, give or take 3.3 standard deviations of 7.5."""
    names = ("species", "fur", "eyes", "background", "style")
    combinations = list(itertools.product(*(WORDS[name] for name in names)))
    held_out = [Scene(**dict(zip(names, words, strict=True))).held_out for words in combinations]
    deviation = math.sqrt(len(combinations) * 0.05 * 0.95)
    assert abs(sum(held_out) - 0.05 * len(combinations)) < 3.3 * deviation
    for i, name in enumerate(names):
        for word in WORDS[name]:
            share = [h for h, words in zip(held_out, combinations, strict=True) if words[i] == word]
            assert 0 < sum(share) < 0.2 * len(share), f"{word} must be seen in training"


def test_the_rule_is_the_same_on_every_machine():
    assert Scene("cat", "orange", eyes="blue", background="beach", style="watercolor").held_out
    assert not Scene("cat", "orange", eyes="green", background="beach", style="watercolor").held_out


def test_splits_do_not_overlap():
    random = generator(2)
    assert not any(Scene.sample(random).held_out for _ in range(300))
    assert all(Scene.sample(random, "held-out").held_out for _ in range(30))


# Captions

COLOUR_WORDS = {w for words in captions.FUR_WORDS.values() for w in words} | set(EYES) | set(WORDS["studio"]) | {"red"}


def test_captions_say_nothing_untrue():
    """Every word that stands for an attribute belongs to the scene's own."""
    random = generator(4)
    for _ in range(1500):
        scene = Scene.sample(random, "all")
        text = caption(scene, random)
        words = set(text.replace(",", "").split())
        for other in set(SPECIES) - {scene.species}:
            assert not words & set(captions.NOUNS[other]), text
        for other in set(FURS) - {scene.fur}:
            allowed = set(captions.FUR_WORDS[scene.fur]) | {scene.eyes, scene.studio} | set(scene.accessory.split())
            assert not (words & set(captions.FUR_WORDS[other])) - allowed, text
        for eyes in set(EYES) - {scene.eyes}:
            assert f"{eyes} eyes" not in text
        for pattern in set(PATTERNS) - {scene.pattern}:
            assert not words & set(captions.PATTERN_WORDS.get((scene.species, pattern), ())), text
        for background in set(captions.PLACES) - {scene.background}:
            assert not any(place in text for place in captions.PLACES[background]), text
        for style in set(WORDS["style"]) - {scene.style}:
            assert not any(s.removeprefix("a ") in text for s in captions.STYLE_WORDS[style]), text
        for look in {"left", "right"} - {scene.look}:
            assert look not in words, text
        assert ("collar" in words) <= ("collar" in scene.accessory)


def test_half_of_the_captions_of_a_plain_coat_can_say_so_and_no_prompt_does():
    random, plain = generator(9), Scene("dog", "brown", "solid", background="beach")
    texts = [caption(plain, random, drop=0.0, plain=True) for _ in range(200)]
    assert 70 < sum("plain brown" in text for text in texts) < 130
    assert not any("plain" in caption(plain, random) for _ in range(100)) and "plain" not in prompt(plain)
    striped = Scene("cat", "brown", "striped", background="beach")
    assert not any("plain" in caption(striped, random, plain=True) for _ in range(100))


def test_pencil_sketches_have_no_colour_words():
    random = generator(5)
    for _ in range(300):
        scene = dataclasses.replace(Scene.sample(random), style="pencil sketch")
        for text in (caption(scene, random), prompt(scene)):
            assert not COLOUR_WORDS & set(text.replace(",", "").split()), text


def test_near_misses_are_false_by_one_attribute():
    random = torch.Generator().manual_seed(5)
    nouns = {noun: species for species, words in captions.NOUNS.items() for noun in words}
    seen = set()
    for _ in range(300):
        scene = Scene.sample(random)
        true, *false = captions.near_misses(scene, random, 3)
        assert len(false) == 3 and true not in false
        for text in false:
            changed = set(re.findall(r"[\w-]+", text)) ^ set(re.findall(r"[\w-]+", true))
            assert changed, (true, text)
            if changed & set(nouns):  # the other species
                assert len({nouns[word] for word in re.findall(r"\w+", text + true) if word in nouns}) == 2
            seen |= changed
    assert {"cat", "dog", "blue", "orange", "left", "collar", "beach", "cartoon", "sitting", "striped"} <= seen


def test_a_mirrored_scene_looks_the_other_way_and_renders_so():
    scene = Scene(look="left", seed=3)
    assert scene.mirrored() == Scene(look="right", seed=3) and scene.mirrored().mirrored() == scene
    assert Scene(seed=3).mirrored() == Scene(seed=3)


def test_captions_vary_and_stay_short():
    random = generator(6)
    scene = Scene("dog", "gray", "spotted", "blue", "red collar", "studio", "pink", "pixel art", "portrait", "left")
    texts = [caption(scene, random) for _ in range(200)]
    assert len(set(texts)) > 150
    assert max(len(t.split()) for t in texts) <= 30


def test_prompt_names_everything_visible():
    scene = Scene("cat", "orange", "solid", "blue", "none", "beach", style="watercolor", pose="portrait")
    assert prompt(scene) == "a watercolor portrait of an orange cat with blue eyes on a beach"
    scene = Scene("dog", "black", "spotted", "brown", "red collar", "studio", "mint", "pixel art", "standing", "left")
    words = (
        "pixel art of a black spotted dog with brown eyes and a red collar standing looking left on a mint background"
    )
    assert prompt(scene) == words


# Renders


def test_render_has_the_promised_shapes_and_ranges(scenes, renders):
    b = len(scenes)
    assert renders.image.shape == (b, 3, 64, 64)
    assert renders.depth.shape == renders.edges.shape == renders.parts.shape == (b, 1, 64, 64)
    assert renders.image.min() >= -1 and renders.image.max() <= 1
    assert renders.edges.min() >= 0 and renders.edges.max() <= 1
    assert all(torch.isfinite(getattr(renders, f.name)).all() for f in dataclasses.fields(renders))


def test_same_scene_same_bytes_in_any_company(scenes, renders):
    """Neither the global random state nor the neighbours in the batch may show in a picture."""
    torch.manual_seed(99)
    for i in (0, 7, 18):
        alone = render([scenes[i]], 64)
        for f in dataclasses.fields(alone):
            assert torch.equal(getattr(alone, f.name)[0], getattr(renders, f.name)[i]), f.name
    assert torch.equal(render(scenes[4:9], 64, chunk=2).image, renders.image[4:9])


def test_another_seed_is_another_picture():
    one, two = render([Scene(seed=1), Scene(seed=2)], 32).image
    assert (one - two).abs().mean() > 0.02


@pytest.mark.parametrize("name", [n for n in WORDS if n not in ("species", "pattern")])
def test_every_word_shows(name):
    """Changing one word, all else equal, changes the picture."""
    base = Scene(background="studio" if name == "studio" else "grass", seed=4)
    pictures = render([dataclasses.replace(base, **{name: word}) for word in WORDS[name]], 32).image
    for one, two in itertools.combinations(pictures, 2):
        assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("species", SPECIES)
def test_every_pattern_shows(species):
    patterns = [p for p, weight in zip(PATTERNS, PATTERN_WEIGHTS[species], strict=True) if weight]
    pictures = render([Scene(species=species, fur="brown", pattern=p, seed=2) for p in patterns], 32).image
    for one, two in itertools.combinations(pictures, 2):
        assert (one - two).abs().max() > 0.2


def test_render_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at least one Scene"):
        render([])
    for size in (0, -64, 100, 64.0):
        with pytest.raises(ValueError, match="multiple of 8"):
            render([Scene()], size)


def test_style_changes_the_picture_not_the_ground_truth():
    a, b = render([Scene(style="3d render", seed=3)], 64), render([Scene(style="watercolor", seed=3)], 64)
    for name in ("depth", "normals", "parts", "edges"):
        assert torch.equal(getattr(a, name), getattr(b, name))


# Geometry


def test_tracing_finds_the_surface():
    """Hits lie on the surface to a twentieth of a pixel (half of one, if inside it), and no miss passes through."""
    a = anatomy([Scene("cat", pose=p, seed=i) for i, p in enumerate(WORDS["pose"])])
    size = 64
    hits = trace.trace(a, size)
    pixels = field.field(a, hits.point) / (2 * a.half_height / size)
    solid = pixels[hits.coverage == 1]
    assert solid.max() < 0.061 and solid.min() > -0.5
    origin, direction = camera.rays(a, camera.screen(size, "cpu"))
    mask = torch.zeros(4, size * size).scatter(1, hits.pixel, hits.coverage)
    lowest = torch.stack([field.field(a, origin + direction * t) for t in torch.linspace(5.6, 10.5, 120)]).amin(0)
    assert (lowest[mask == 0] > 0).all()


def test_sphere_depth_is_the_closed_form():
    """A lone eye is a sphere: its depth and normals are known."""
    a = anatomy([Scene("dog", look="front", seed=2)])
    result = render([Scene("dog", look="front", seed=2)], 256)
    place, _ = camera.eyes(a)
    centre = camera.head_to_world(a, a.eye * torch.tensor([-1.0, 1, 1])[:, None, None])[:, 0, 0]
    radius = float(a.eye_radius * a.head_size)
    column, row = ((place[0, 0] * torch.tensor([1.0, -1.0]) + 1) * 128).int().tolist()
    assert PARTS[result.parts[0, 0, row, column]] == "eyes"
    uv = camera.screen(256, "cpu").reshape(2, 1, 256, 256)[:, :, row, column, None]
    origin, direction = (x[:, 0, 0] for x in camera.rays(a, uv))
    along = direction @ (centre - origin)
    t = along - (radius**2 - ((centre - origin) @ (centre - origin) - along**2)).sqrt()
    assert result.depth[0, 0, row, column] == pytest.approx(float(t), abs=1e-3)
    expected = (origin + t * direction - centre) / radius
    assert torch.allclose(result.normals[0, :, row, column], expected, atol=5e-3)  # the fold is soft: 1e-4 / x


def test_ground_depth_is_the_closed_form():
    scene = Scene(seed=6)
    a = anatomy([scene])
    result = render([scene], 128)
    origin, direction = (x[:, 0].reshape(3, -1) for x in camera.rays(a, camera.screen(128, "cpu")))
    corner = 127 * 128  # bottom left
    t = (GROUND - origin[1]) / direction[1, corner]
    assert result.parts[0, 0, 127, 0] == 0
    assert result.depth[0, 0, 127, 0] == pytest.approx(float(t), rel=1e-6)


def test_normals_are_unit_and_agree_with_depth(scenes):
    """Off edges the normal stands upright on the surface that the depth describes: n . (p(x + 1) - p(x - 1)) = 0."""
    result = render(scenes[:4], 256)
    a = anatomy(scenes[:4])
    origin, direction = camera.rays(a, camera.screen(256, "cpu"))
    point = (origin + direction * result.depth.flatten(1)).reshape(3, 4, 256, 256)
    normals = result.normals.transpose(0, 1)
    inside = (result.parts > 0)[:, 0]
    assert torch.allclose(normals.square().sum(0)[inside], torch.tensor(1.0), atol=1e-4)
    way = point[..., 2:] - point[..., :-2]
    far = way.square().sum(0).sqrt()
    smooth = inside[..., 2:] & inside[..., :-2] & (far < 0.04)
    cosine = (normals[..., 1:-1] * way).sum(0) / far
    assert cosine[smooth].abs().mean() < 0.03


def test_eyes_look_out_of_every_front_face(scenes, renders):
    """Both eyes are labelled where the scene says they are, and nothing is labelled that is not worn."""
    places, _ = camera.eyes(anatomy(scenes))
    for scene, parts, eyes in zip(scenes, renders.parts[:, 0], places, strict=True):
        for u, v in eyes.tolist():
            column, row = int((u + 1) * 32), int((1 - v) * 32)
            assert PARTS[parts[row, column]] == "eyes", scene
        seen = {PARTS[i] for i in parts.unique()}
        assert {"background", "head", "body", "eyes", "nose"} <= seen, scene
        assert ("hat" in seen) == (scene.accessory == "party hat"), scene
        assert ("tag" in seen) <= ("collar" in scene.accessory), scene


def test_ink_divides_parts_but_not_what_grows_out_of_another():
    def ink(left, right):
        parts = torch.full((1, 1, 64, 64), PARTS.index(left))
        parts[..., 32:] = PARTS.index(right)
        known = {"mask": torch.ones(1, 1, 64, 64), "depth": torch.full((1, 1, 64, 64), 8.0), "part": parts.float()}
        others = styles.Layers._fields
        return styles.ink(styles.Layers(**{name: known.get(name, torch.zeros(1, 1, 64, 64)) for name in others})).max()

    for one, other in (("head", "ears"), ("body", "legs"), ("body", "tail"), ("legs", "tail")):
        assert ink(one, other) == 0, (one, other)
    for one, other in (("head", "eyes"), ("ears", "legs"), ("tail", "neckwear")):
        assert ink(one, other) > 0.5, (one, other)


def test_worn_things_are_seen():
    """Collars, bows and scarves show in all poses of both animals (they once sat inside the neck)."""
    worn = [
        Scene(species=s, pose=p, accessory=a, seed=seed)
        for seed, (s, p, a) in enumerate(itertools.product(SPECIES, WORDS["pose"], WORDS["accessory"][2:]))
    ]
    parts = render(worn, 64).parts
    for scene, mask in zip(worn, parts, strict=True):
        label = PARTS.index("hat" if scene.accessory == "party hat" else "neckwear")
        assert (mask == label).sum() >= 12, scene


def test_depth_lies_between_critter_and_sky(renders):
    critter = renders.parts > 0
    assert (renders.depth[critter] > DISTANCE - 2.4).all() and (renders.depth[critter] < DISTANCE + 3).all()
    assert (renders.depth[~critter] <= 16).all()


def test_batches_go_on_without_end():
    first, second = itertools.islice(batches(generator(8), 32, batch=2), 2)
    assert len(first[0]) == 2 and first[1].image.shape == (2, 3, 32, 32)
    assert first[0] != second[0]
