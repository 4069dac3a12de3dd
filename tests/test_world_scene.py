"""The world: scenes keep their promises, maps are exact by independent formulas, captions come back as said."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from minipic.common import InputError, rng
from minipic.world import scene as world
from minipic.world.camera import Camera, directions, extrinsics, eyes, intrinsics, plucker, project
from minipic.world.caption import (
    NOUNS, PLURALS, WORDS, Description, Thing, ask, ask_counts, caption, compare, describe, parse, say)
from minipic.world.scene import (
    COLORS, HELD_OUT, PLACES, SHAPES, SIZES, Light, Object, Scene, View, centres, hull, is_held_out,
    layout, render, sample_scene)
from minipic.world.solids import CONE, CUBE, CYLINDER, DIAMOND, TORUS

SCENES = [sample_scene(5, i) for i in range(60)]
ALIKE = [sample_scene(5, i, alike=True) for i in range(60)]

# Negative inside, 0 on the surface; written apart from the ray caster.
INSIDE = {
    "sphere": lambda x, y, z: (x * x + y * y + z * z).sqrt() - 1,
    "cube": lambda x, y, z: torch.stack([x.abs(), y.abs(), z.abs()]).amax(0) - CUBE,
    "cylinder": lambda x, y, z: torch.maximum(torch.hypot(x, z) - CYLINDER[0], y.abs() - CYLINDER[1]),
    "cone": lambda x, y, z: torch.maximum(torch.hypot(x, z) - CONE[0] * (CONE[1] - y) / (2 * CONE[1]), -CONE[1] - y),
    "torus": lambda x, y, z: torch.hypot(torch.hypot(x, y) - TORUS[0], z) - TORUS[1],
    "diamond": lambda x, y, z: (x.abs() + z.abs()) / DIAMOND[0] + y.abs() / DIAMOND[1] - 1,
}


def into(o, points):
    """World points [3,N] in the frame of one object."""
    angle = torch.tensor(o.turn).deg2rad()
    p = (points - centres([o])[0][:, None]) / SIZES[o.size]
    return angle.cos() * p[0] - angle.sin() * p[2], p[1], angle.sin() * p[0] + angle.cos() * p[2]


def seen_points(r):
    rays = directions(r.extrinsics, r.intrinsics, r.depth.shape[1:])
    return eyes(r.extrinsics)[:, :, None, None] + r.depth[:, None] * rays


def test_scenes_are_random_access():
    again = [sample_scene(5, i) for i in reversed(range(20))][::-1]
    assert again == SCENES[:20]
    assert len(set(SCENES)) == 60 and sample_scene(6, 0) != SCENES[0]
    assert [len(sample_scene(0, i, objects=k).objects) for i, k in enumerate((1, 2, 3))] == [1, 2, 3]
    with pytest.raises(InputError, match="objects: .* not 4"):
        sample_scene(0, 0, objects=4)


def test_scenes_of_alike_things_are_a_set_of_their_own():
    assert ALIKE[:5] == [sample_scene(5, i, alike=True) for i in range(5)] and not set(ALIKE) & set(SCENES)
    most = [Counter(o.shape for o in s.objects).most_common(1)[0][1] for s in ALIKE]
    assert min(most) == 2 and 10 < most.count(3) < 28  # a quarter, and those alike by chance
    assert 20 < sum(len(s.objects) == 3 for s in ALIKE) < 40
    looks = [len({(o.color, o.color2, o.pattern) for o in s.objects}) == 1 for s in ALIKE]
    assert 18 < sum(looks) < 48  # two thirds, but for third things that are of another shape
    assert not any(map(is_held_out, (o for s in ALIKE for o in s.objects)))
    assert all(o.pattern == "plain" for s in ALIKE for o in s.objects if o.size == "small")
    assert len(sample_scene(5, 0, objects=2, alike=True).objects) == 2
    with pytest.raises(InputError, match="objects: 1 object is like no other; choose 2, 3 or None"):
        sample_scene(0, 0, objects=1, alike=True)


def test_held_out_pairs_occur_only_on_request():
    assert len(HELD_OUT) == len({shape for _, shape in HELD_OUT}) == len({color for color, _ in HELD_OUT}) == 6
    assert not any(map(is_held_out, (o for s in SCENES for o in s.objects)))
    assert all(any(map(is_held_out, sample_scene(0, i, held_out="only").objects)) for i in range(20))
    allowed = [any(map(is_held_out, sample_scene(0, i, held_out="any").objects)) for i in range(60)]
    assert 5 < sum(allowed) < 40


def test_objects_are_apart_visible_and_clearly_placed():
    whole = render(SCENES + ALIKE, truth=True)
    for s, instances in zip(SCENES + ALIKE, whole.instances):
        across, aside, ahead = layout(centres(s.objects), s.camera, s.aspect)
        if len(s.objects) == 1:
            assert any(low <= across[0] <= high for low, high in PLACES.values())
        for k, o in enumerate(s.objects):
            alone = (View([replace(s, objects=(o,))], (64, 64), 1, shaded=False).surface.body >= 0).sum()
            assert (instances == k + 1).sum() >= 0.6 * alone > 12
            for j in range(k):
                assert abs(aside[k] - aside[j]) > world.ASIDE or abs(ahead[k] - ahead[j]) > world.AHEAD
                other = s.objects[j]
                gap = ((o.x - other.x) ** 2 + (o.z - other.z) ** 2) ** 0.5
                assert gap > 0.9 * min(SIZES[o.size], SIZES[other.size]) + 0.8 * max(SIZES[o.size], SIZES[other.size])


@pytest.mark.parametrize("shape", SHAPES)
def test_pictured_sizes_do_not_overlap(shape):
    def width(size, z, camera):
        points, _ = project(hull([Object(shape, "red", size, z=z)]), extrinsics([camera]), intrinsics((64, 64)))
        return (points[..., 0].max() - points[..., 0].min()).item()
    ends = (-1.2, Camera(0, 28, 6.8)), (1.0, Camera(0, 22, 6.4))      # the farthest and nearest that are drawn
    widths = {size: [width(size, *end) for end in ends] for size in SIZES}
    assert max(widths["small"]) < min(widths["medium"]) and max(widths["medium"]) < min(widths["large"])


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_and_normals_are_exact(shape):
    o = Object(shape, "red", "large", x=0.3, z=-0.2, turn=25)
    r = render(Scene((o,), camera=Camera(20, 24, 6.5)), (96, 96))
    points = seen_points(r)[0]
    on = r.instances[0] == 1
    rays = directions(r.extrinsics, r.intrinsics, (96, 96))[0][:, ~on]
    for t in torch.linspace(4, 9, 120):               # nothing is missed: all other rays pass by
        assert INSIDE[shape](*into(o, eyes(r.extrinsics)[0][:, None] + t * rays)).min() > -0.02
    local = torch.stack(into(o, points[:, on])).double().requires_grad_()
    value = INSIDE[shape](*local)
    assert value.abs().max() < 5e-3
    gradient, = torch.autograd.grad(value.sum(), local)
    angle = torch.tensor(o.turn).deg2rad().double()
    x, y, z = gradient / gradient.norm(dim=0)
    truth = torch.stack([angle.cos() * x + angle.sin() * z, y, angle.cos() * z - angle.sin() * x])
    close = (r.normals[0][:, on] * truth).sum(0) > 0.999
    assert close.float().mean() > 0.98                # at edges the gradient may belong to the face next to it
    floor = (r.instances[0] == 0) & r.depth[0].isfinite()
    assert points[1][floor].abs().max() < 1e-3 * r.depth[0][floor].max()
    assert (r.normals[0][:, floor].T == torch.tensor([0.0, 1, 0])).all()


def test_shadows_agree_with_marching_towards_the_light():
    s = Scene((Object("cone", "red", "large", x=-0.8), Object("torus", "blue", "medium", x=0.9, turn=30)),
              light=Light(-60, 30))
    view = View([s], (96, 96), 1)
    floor = (view.surface.body < 0) & (view.surface.depth < 12)
    start, light = view.surface.point[:, floor], view.sun[:, floor]
    dark = torch.zeros(start.shape[1], dtype=torch.bool)
    for t in torch.linspace(0.01, 5, 500):
        for o in s.objects:
            dark |= INSIDE[o.shape](*into(o, start + t * light)) < 0
    assert 100 < dark.sum() and ((view.surface.lit[floor] == 0) == dark).float().mean() > 0.995


def test_boxes_hold_the_solids_and_their_shadows(monkeypatch):
    tight = [View(SCENES[i:i + 4], (32, 48), 1).surface for i in (0, 4)]

    def whole_pictures(view, points):
        height, width = view.size
        return torch.tensor([[0, 0, width, height]] * len(points))

    monkeypatch.setattr(View, "boxes_around", whole_pictures)
    for i, surface in zip((0, 4), tight):
        full = View(SCENES[i:i + 4], (32, 48), 1).surface
        assert torch.equal(full.depth, surface.depth) and torch.equal(full.lit, surface.lit)


def test_a_picture_does_not_depend_on_its_batch_and_wider_ones_see_more():
    together, alone = render(SCENES[:5]), render(SCENES[3])
    assert (together.rgb[3] - alone.rgb[0]).abs().max() < 1e-4
    assert torch.equal(together.instances[3], alone.instances[0])
    wide = render(SCENES[3], (64, 128))
    assert (wide.rgb[..., 32:96] - alone.rgb).abs().max() < 1e-3
    assert -1 <= together.rgb.min() and together.rgb.max() <= 1


def test_edits_change_what_they_name():
    o = Object("sphere", "red", "large")
    before = render([Scene((o,)), Scene((replace(o, color="green"),))])
    on = before.instances[0] == 1
    assert torch.equal(before.depth[0], before.depth[1])
    changed = (before.rgb[0] - before.rgb[1]).abs().amax(0) > 0.02
    assert changed[on].float().mean() > 0.9 and changed[~on].float().mean() < 0.02     # soft outlines only
    after = render([Scene((replace(o, size="small"),)), Scene((replace(o, shape="cube"),)), Scene(())])
    assert (after.instances[0] > 0).sum() < 0.3 * on.sum() and not torch.equal(after.instances[1] > 0, on)
    empty = render(Scene(()))
    assert torch.equal(empty.rgb[0], after.rgb[2]) and not empty.instances.any() and empty.boxes[0].shape == (0, 4)


def test_cameras_and_rays_agree():
    cameras = [Camera(-40, 22, 6.0), Camera(170, 50, 8.0)]
    E, K = extrinsics(cameras), intrinsics((48, 80))
    assert torch.allclose(E[:, :, :3] @ E[:, :, :3].transpose(1, 2), torch.eye(3).expand(2, 3, 3), atol=1e-6)
    point = torch.tensor([0.4, 0.7, -0.3])
    for e, eye, rays in zip(E, eyes(E), plucker(E, K, (48, 80))):
        pixel, depth = project(point[None], e, K)
        x, y = pixel[0].floor().long().tolist()
        moment, toward = rays[:, y, x].chunk(2)
        nearest = eye + toward * ((point - eye) @ toward)
        assert (nearest - point).norm() < depth[0] / K[0, 0]              # within a pixel
        assert torch.allclose(torch.linalg.cross(eye, toward), moment, atol=1e-5)
    assert torch.allclose(eyes(extrinsics([Camera(90, 0, 5.0)]))[0], torch.tensor([5.0, 0, 0]), atol=1e-5)


def test_captions_are_true_short_and_parsed_exactly():
    scenes = [sample_scene(9, i) for i in range(120)] + SCENES
    kinds = set()
    for i in range(1500):
        s, g = scenes[i % len(scenes)], rng(9, "caption", i)
        asked = ask(s, g)
        text = say(asked, g)
        assert parse(text) == asked and compare(asked, describe(s))["whole"] == (1, 1), text
        words = re.findall(r"\w+|,", text)
        assert len(words) <= 36 and set(words) <= set(WORDS)
        kinds |= {w for w in ("between", "front", "behind", "left", "striped", "object", "night") if w in words}
    assert len(kinds) == 7
    assert parse("A small red sphere left of a large blue cube").relations == ((0, "left", 1),)
    assert caption(s, rng(1)) == caption(s, rng(1))


def test_captions_of_old_are_what_they_were():
    """Recorded numbers and trained weights depend on them, also those of equal things."""
    assert [caption(scene, rng(5, i)) for i, scene in enumerate(SCENES[:3])] == [
        "a yellow diamond in the middle",
        "a medium blue and green checkered sphere behind a blue ball on a brown floor",
        "an orange cube in front of a cyan torus, and a tiny green cube under a night sky"]
    cube, cone = Thing(shape="cube"), Thing(shape="cone")
    assert say(Description((cube, cube, cone)), rng(0)) == "a box, a box and a cone"


def counted(text):
    """How many things of each noun's shape a caption speaks of, read apart from the grammar."""
    shapes = {word: shape for words in (NOUNS, PLURALS) for shape, nouns in words.items() for word in nouns}
    counts, number = Counter(), None
    for word in re.findall(r"\w+", text.removeprefix("a picture of ").removeprefix("a rendering of ")):
        number = {"a": 1, "an": 1, "two": 2, "three": 3}.get(word, number)
        if word in shapes:
            counts[shapes[word]] += number
    return counts


def test_counting_captions_are_true_and_parsed_exactly():
    numbers = Counter()
    drawn = [len(instances.unique()) - 1 for instances in render(ALIKE, truth=True).instances]  # 0 is the rest
    for i in range(600):
        s, g = ALIKE[i % len(ALIKE)], rng(5, "count", i)
        asked = ask_counts(s, g)
        text = say(asked, g, plurals=True)
        assert parse(text) == asked and compare(asked, describe(s))["whole"] == (1, 1), text
        counts = counted(text)
        assert counts.total() == len(s.objects) == drawn[i % len(ALIKE)], text
        shapes = Counter(o.shape for o in s.objects)
        assert all(count == shapes[shape] for shape, count in counts.items() if shape and not counts[None]), text
        words = re.findall(r"\w+|,", text)
        assert len(words) <= 36 and set(words) <= set(WORDS)
        numbers += Counter(word for word in ("two", "three", "are", "is", "and") if word in words)
    assert numbers["two"] > 200 and numbers["three"] > 100 and numbers["are"] > 20, numbers


A_CUBE, A_BALL = Thing(shape="cube"), Thing(shape="sphere")
RED_CUBE = Thing("red", shape="cube", size="small", pattern="plain")


@pytest.mark.parametrize("text, expected", [
    ("three spheres", Description((A_BALL, A_BALL, A_BALL))),
    ("two small red cubes and a blue cone on a grey floor",
     Description((RED_CUBE, RED_CUBE, Thing("blue", shape="cone", pattern="plain")), floor="grey")),
    ("two striped balls", Description((replace(A_BALL, pattern="striped"),) * 2)),
    ("There are two red and white striped boxes, at night",
     Description((Thing("red", "white", "cube", None, "striped"),) * 2, sky="night")),
    ("a picture of a cube and two boxes", Description((A_CUBE, A_CUBE, A_CUBE))),
    ("two spheres on the left", Description((replace(A_BALL, place="left"),) * 2)),
    *((f"two {noun}", Description((Thing(shape=shape),) * 2)) for noun, shape in (
        ("cylinders", "cylinder"), ("cones", "cone"), ("diamonds", "diamond"), ("tori", "torus"), ("toruses", "torus"),
        ("rings", "torus"), ("objects", None)))])
def test_plurals_are_equal_things(text, expected):
    assert parse(text) == expected


def test_only_neighbours_that_are_equal_and_unrelated_are_counted():
    cone = Thing(shape="cone")
    for things, relations, text in (
            ((A_CUBE, A_CUBE, cone), (), "two cubes and a cone"), ((cone, A_CUBE, A_CUBE), (), "a cone and two cubes"),
            ((A_CUBE, cone, A_CUBE), (), "a cube, a cone and a cube"),
            ((A_CUBE, A_CUBE), ((0, "left", 1),), "a cube left of a cube"),
            ((cone, A_CUBE, A_CUBE), ((0, "right", 1), (0, "left", 2)), "a cone between a cube and a cube")):
        asked = Description(things, relations)
        said = [say(asked, rng(i), plurals=True) for i in range(40)]
        assert text in said and all(parse(words) == asked for words in said)
    openings = {say(Description((A_BALL, A_BALL)), rng(i), plurals=True).split("two")[0] for i in range(60)}
    assert openings == {"", "a picture of ", "a rendering of ", "there are "}


def test_compare_counts_the_wrong_facts():
    s = Scene((Object("cube", "blue", "large", x=1.2), Object("sphere", "red", "small", x=-1.2)), "pink", "night")
    asked = parse("a small red sphere left of a large blue cube on a pink floor at night")
    assert compare(asked, describe(s))["whole"] == (1, 1)
    wrong = {"color": "a small green sphere left of a large blue cube",
             "size": "a medium red sphere left of a large blue cube", "relation": "a red sphere right of a blue cube",
             "floor": "a red sphere and a blue cube on a grey floor",
             "pattern": "a red and white striped sphere and a cube",
             "place": "a red sphere on the right and a blue cube", "count": "a red sphere"}
    for fact, text in wrong.items():
        score = compare(parse(text), describe(s))
        assert score["whole"] == (0, 1) and score[fact][0] < score[fact][1]
        assert all(right == total for f, (right, total) in score.items() if f not in (fact, "whole", "color")), text
    three = compare(parse("a red sphere, a blue cube and a white cone"), describe(s))
    assert three["color"] == three["shape"] == (2, 3) and three["count"] == (0, 1)


@pytest.mark.parametrize("text", ["", "a red dog", "a red sphere over a blue cube", "photo of a red sphere",
                                  "a red sphere on a green floor", "a red sphere between a cube and a cone, smiling",
                                  "four spheres", "two sphere", "a spheres", "a cube and two sphere", "two boxs",
                                  "two cubes left of a cone", "a cone between two cubes"])
def test_words_outside_the_grammar_are_refused(text):
    with pytest.raises(InputError, match="caption"):
        parse(text)


def test_colours_and_floors_are_apart():
    named = torch.tensor([*COLORS.values(), *world.FLOORS.values()])
    assert (torch.cdist(named, named) + 9 * torch.eye(len(named))).min() > 0.25
