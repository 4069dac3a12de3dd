"""The tasks' pairs are what they say: maps read back exactly, edits do what their words say, views share one world."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minipic.world import maps, tasks
from minipic.world.camera import Camera, extrinsics, eyes, intrinsics, project
from minipic.world.caption import describe
from minipic.world.edits import EDITS, refer, valid
from minipic.world.metrics import camera_from_plucker
from minipic.world.scene import (
    COLORS, PLACES, SIZES, Object, Scene, centres, is_held_out, layout, render)
from minipic.world.styles import ORNAMENTS, Ornamented, ornate


def saved(picture):
    """As it comes back from a file of 8 bits."""
    return ((picture + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_pair_does_not_depend_on_its_batch(name):
    task = tasks.TASKS[name]
    one, two = task(3, torch.tensor([5])), task(3, [4, 5])
    for a, b in ((one.source, two.source), (one.target, two.target)):
        assert a.shape == (1, 3, 64, 64) and a.amin() >= -1 and a.amax() <= 1
        assert torch.allclose(a[0], b[1], atol=1e-5)
    assert one.prompts == two.prompts[1:] and one.scenes == two.scenes[1:] and two.prompts[0] != two.prompts[1]
    assert not torch.equal(two.target[0], two.target[1])


@pytest.mark.parametrize("name", ["segmentation", "masked", "edit", "wear"])
def test_other_sizes(name):
    pairs = tasks.TASKS[name](0, [1], size=(64, 96))
    assert pairs.source.shape == pairs.target.shape == (1, 3, 64, 96) and pairs.scenes[0].aspect == 1.5


# ---- maps -------------------------------------------------------------------------------------------------------


def test_edges_read_back_and_surround_the_labels():
    pairs = tasks.edges(0, range(6))
    assert torch.equal(maps.picture_to_edges(saved(pairs.source)), pairs.truth["edges"])
    labels = torch.zeros(1, 6, 7, dtype=torch.long)
    labels[0, 2:4, 3:5] = 1
    normals = torch.zeros(1, 3, 6, 7)
    normals[:, 1] = 1
    wanted = torch.zeros(6, 7, dtype=torch.bool)
    wanted[1, 3:5] = wanted[3, 3:5] = wanted[2:4, 2] = wanted[2:4, 4] = True
    assert torch.equal(maps.borders(labels, normals)[0], wanted)
    normals[:, :, :, 6] = torch.tensor([1.0, 0, 0])[:, None]       # a crease inside one label
    wanted[:, 5] = True
    assert torch.equal(maps.borders(labels, normals)[0], wanted)


def test_depth_reads_back_and_is_that_of_the_floor():
    pairs = tasks.depth(0, range(6))
    true, read = pairs.truth["depth"], maps.picture_to_depth(pairs.source)
    assert torch.equal(read.isinf(), true.isinf()) and true.amin() > maps.NEAR
    known = true.isfinite() & (true < 50)       # farther is one grey level from the sky
    assert ((read - true).abs() / true)[known].max() < 1e-4
    assert ((maps.picture_to_depth(saved(pairs.source)) - true).abs() / true)[known & (true < 12)].max() < 0.01
    seen = render(Scene((Object("sphere", "red", "small", x=3.0),), camera=Camera(0.0, 30.0, 6.0)), (65, 65))
    # the middle ray starts at height 6 sin 30 = 3 and sinks to 1.1 over the distance to the camera's target
    reach = math.hypot(6 * math.cos(math.radians(30)), 3 - 1.1)
    assert seen.depth[0, 32, 32].item() == pytest.approx(reach * 3 / (3 - 1.1), rel=1e-5)


def test_normals_read_back_in_the_camera_frame():
    pairs = tasks.normals(0, range(6))
    true = pairs.truth["normals"]
    assert torch.allclose(maps.picture_to_normals(pairs.source), true, atol=1e-4)
    angle = (maps.picture_to_normals(saved(pairs.source)) * true).sum(1)[true.norm(dim=1) > 0]
    assert angle.min() > 0.9999
    floor = true.permute(0, 2, 3, 1)[:, -1, 0]  # bottom left
    assert floor[:, 0].abs().max() < 1e-5 and (floor[:, 1] > 0.8).all() and (floor[:, 2] > 0.2).all()
    ball = Scene((Object("sphere", "red", "large"),))
    seen = render(ball)
    normal = maps.normals_of(seen)[0]
    x0, y0, x1, y1 = seen.boxes[0][0].tolist()
    assert normal[0, (y0 + y1) // 2, x1 - 2] > 0.8 and normal[1, y0 + 1, (x0 + x1) // 2] > 0.8
    assert normal[2, (y0 + y1) // 2, (x0 + x1) // 2] > 0.99


def test_segmentation_reads_back_and_the_prompt_names_its_colours():
    pairs = tasks.segmentation(0, range(6))
    labels, colors = pairs.truth["labels"], pairs.truth["colors"]
    noisy = saved(pairs.source) + 0.1 * torch.randn(pairs.source.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(maps.picture_to_labels(saved(pairs.source), colors), labels)
    assert (maps.picture_to_labels(noisy, colors) == labels).float().mean() > 0.99
    for scene, prompt, label, picture in zip(pairs.scenes, pairs.prompts, labels, pairs.source):
        said = [re.fullmatch(r"(\w+) (?:is )?the (.+)", part).groups() for part in prompt.split(", ")]
        assert len(said) == 2 + len(scene.objects) and prompt.count(" is the ") == 1
        assert said[-1] == ("cyan", f"{scene.sky} sky") and said[-2] == ("white", f"{scene.floor} floor")
        for k, (color, name) in enumerate(said[::-1]):
            shown = picture[:, label == k]
            assert torch.allclose(shown, 2 * torch.tensor(COLORS[color])[:, None] - 1, atol=1e-6)
            assert k < 2 or (scene.objects[k - 2].shape in name and scene.objects[k - 2].size in name)
    assert len({names[2] for names in colors}) > 2


def test_boxes_read_back():
    pairs = tasks.boxes(0, range(30))
    read = maps.picture_to_boxes(saved(pairs.source), pairs.truth["colors"])
    off = torch.cat([(a - b).abs().amax(1) for a, b in zip(read, pairs.truth["boxes"])])
    assert (off == 0).float().mean() > 0.97 and off.max() <= 2       # sides of two boxes that coincide
    inside = [torch.tensor([[2, 10, 12, 20], [2, 2, 30, 30]]), torch.tensor([[2, 2, 30, 30], [2, 10, 12, 20]])]
    names = [["red", "blue"]] * 2
    assert all(map(torch.equal, maps.picture_to_boxes(maps.boxes_to_picture(inside, names, (64, 64)), names), inside))
    assert maps.picture_to_boxes(-torch.ones(1, 3, 8, 8), [["red"]])[0].tolist() == [[0, 0, 0, 0]]


# ---- damaged pictures -------------------------------------------------------------------------------------------


def test_blur_spreads_a_point_by_sigma():
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    spread, far = tasks.gaussian_blur(point, torch.tensor(2.5))[0, 0], torch.arange(41) - 20.0
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    for share in (spread.sum(0), spread.sum(1)):
        assert (share * far**2).sum().item() == pytest.approx(2.5**2, rel=0.03)
    pairs = tasks.blur(0, range(4))
    again = torch.cat([tasks.gaussian_blur(t[None], s) for t, s in zip(pairs.target, pairs.truth["sigma"])])
    assert torch.equal(again, pairs.source) and all(1.6 <= s <= 4 for s in pairs.truth["sigma"])


def test_small_keeps_the_means_of_blocks():
    pairs = tasks.small(0, range(4))
    assert torch.allclose(F.avg_pool2d(pairs.source, 4), F.avg_pool2d(pairs.target, 4), atol=1e-6)
    assert torch.equal(pairs.source[:, :, ::4, ::4], pairs.source[:, :, 3::4, 3::4])


def test_masked_hides_an_object_and_nothing_else_changes():
    pairs = tasks.masked(0, range(8))
    mask, seen = pairs.truth["mask"], render(pairs.scenes)
    assert torch.equal(pairs.source, torch.where(mask, -1.0, pairs.target))
    assert torch.equal((pairs.source == -1).all(1), mask[:, 0])
    for m, instances in zip(mask[:, 0], seen.instances):
        assert max(m[instances == k].float().mean() for k in instances.unique() if k) > 0.9
        assert 0.01 < m.float().mean() < 0.6


# ---- edits ------------------------------------------------------------------------------------------------------


def test_refer_uses_the_fewest_words_that_mean_one_object():
    red, blue = Object("cube", "red", "small", x=-1.0), Object("cube", "blue", "small", x=1.0)
    ball = Object("sphere", "red", "large")
    assert [refer(Scene((red, blue, ball)), k) for k in range(3)] == ["red cube", "blue cube", "sphere"]
    assert refer(Scene((red, replace(red, size="large", x=1.0))), 0) == "small red cube"
    assert refer(Scene((red, replace(red, x=1.0))), 0) is None
    assert not valid(Scene((red, replace(red, x=1.2)))) and valid(Scene((red, replace(blue, x=1.2))))
    assert not valid(Scene((red, replace(blue, x=-0.9)))) and not valid(Scene((red, replace(blue, x=9.0))))


SAYS = {"recolour": "color", "remove": "remove", "move": "place", "resize": "size", "reshape": "shape"}


def follow(words, before):
    """What the instruction asks for, read from its words: (object's number, attribute, value)."""
    patterns = {"color": r"(?:make|paint) the (.+?) (?:plain )?(%s)" % "|".join(COLORS), "remove":
                r"(?:remove|take away) the (.+)()", "place": r"move the (.+) to the (%s)" % "|".join(PLACES),
                "size": r"make the (.+) (%s)" % "|".join(SIZES), "shape": r"(?:turn|change) the (.+) into a (\w+)"}
    what, (name, value) = next((k, m.groups()) for k, p in patterns.items() if (m := re.fullmatch(p, words)))
    return [refer(before, k) for k in range(len(before.objects))].index(name), what, value


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_does_what_it_says_and_nothing_else(kind):
    pairs = tasks.edit(1, range(5), kinds=(kind,))
    for before, after, words in zip(pairs.truth["before"], pairs.scenes, pairs.prompts):
        k, what, value = follow(words, before)
        assert what == SAYS[kind]
        others = [o for o in after.objects if o in before.objects]
        assert [o for n, o in enumerate(before.objects) if n != k] == others
        assert len(after.objects) == len(before.objects) - (what == "remove")
        if what == "color":
            assert after.objects[k] == replace(before.objects[k], color=value, color2=None, pattern="plain")
        elif what in ("size", "shape"):
            assert after.objects[k] == replace(before.objects[k], **{what: value}) != before.objects[k]
        elif what == "place":
            spots = [layout(centres(s.objects), s.camera, s.aspect) for s in (before, after)]
            assert describe(after).things[k].place == value != describe(before).things[k].place
            assert abs(spots[0][2][k] - spots[1][2][k]) < 1e-4      # sideways only
        assert valid(after) and replace(after, objects=before.objects) == before
        assert not any(map(is_held_out, after.objects))
    seen = render(pairs.truth["before"] + pairs.scenes, truth=False).rgb
    assert torch.equal(seen, torch.cat([pairs.source, pairs.target]))
    changed = ((pairs.source - pairs.target).abs().amax(1) > 0.05).float().mean((1, 2))
    assert (changed > 0.005).all() and (changed < 0.6).all()


# ---- views, subjects, clothes -----------------------------------------------------------------------------------


def test_views_show_one_world():
    pairs = tasks.view(0, range(5), views=3)
    moves, rays = pairs.truth["extrinsics"], pairs.truth["rays"]
    assert torch.equal(pairs.truth["pictures"][:, 1], pairs.target) and rays.shape == (5, 3, 6, 64, 64)
    assert torch.allclose(moves[:, 0], torch.eye(3, 4).expand(5, 3, 4), atol=1e-5)
    assert torch.allclose((rays[:, :, :3] * rays[:, :, 3:]).sum(2), torch.zeros(()), atol=1e-4)
    centre = camera_from_plucker(rays.flatten(0, 1)).float()
    assert torch.allclose(centre, eyes(moves.flatten(0, 1)), atol=1e-3)
    assert centre.view(5, 3, 3)[:, 0].abs().max() < 1e-3
    first = [tasks.view(0, [b], views=3).truth["pictures"][0, 0] for b in range(2)]
    assert torch.allclose(torch.stack(first), pairs.source[:2], atol=1e-5)
    for words, new, move in zip(pairs.prompts, pairs.scenes, moves[:, 1]):
        said = re.fullmatch(r"the camera moves (\d+) degrees to the (\w+)(?: and 10 degrees (\w+))?", words).groups()
        x, y, _ = eyes(move[None])[0].tolist()          # right and down of the first camera
        assert (x > 0) == (said[1] == "right") and valid(new)
        # turning back by what was said gives the first camera: it sees the objects where the first picture shows them
        turn = int(said[0]) * (1 if said[1] == "right" else -1)
        lift = {None: 0, "up": 10, "down": -10}[said[2]]
        old = Camera(new.camera.azimuth - turn, new.camera.elevation - lift, new.camera.distance)
        here = extrinsics([old, new.camera])
        points = centres(new.objects)
        local = points @ here[0, :, :3].T + here[0, :, 3]
        for a, b in zip(project(points, here[1], intrinsics((64, 64))), project(local, move, intrinsics((64, 64)))):
            assert torch.allclose(a, b, atol=1e-3)


def test_a_subject_keeps_its_ornament():
    pairs = tasks.subject(0, range(4), references=2)
    assert pairs.truth["references"].shape == (4, 2, 3, 64, 64)
    assert torch.equal(pairs.truth["references"][:, 0], pairs.source)
    assert not torch.equal(pairs.source, pairs.truth["references"][:, 1])
    for scene, words, mask, target in zip(pairs.scenes, pairs.prompts, pairs.truth["mask"], pairs.target):
        first = scene.objects[0]
        assert isinstance(first, Ornamented) and words.count("the same ") == 1 and valid(scene)
        gone = replace(scene, objects=(Object("cube", "white", "small", x=50.0), *scene.objects[1:]))
        bare = render(gone, shade=ornate)
        away = (bare.rgb[0] - target).abs().amax(0) > 0.1
        assert (away & mask[0]).sum() > 0.8 * mask.sum() > 20       # it is gone where the mask says
    # the ornament is the solid's own: turning solid, camera and light together changes nothing
    dress = ("zigzag", 0.3, ("red", "white", "blue"))
    scenes = [Scene((Ornamented("cube", "red", "large", turn=a, ornament=dress),),
                    camera=replace(Scene(()).camera, azimuth=a), light=replace(Scene(()).light, azimuth=45.0 + a))
              for a in (0.0, 40.0)]
    one, two = render(scenes, shade=ornate).rgb
    assert (one - two).abs().mean() < 2e-3


def test_the_cloth_of_the_garment_is_on_the_figure():
    pairs = tasks.wear(0, range(4))
    mask = pairs.truth["mask"]
    dye = lambda o: replace(o, ornament=(*o.ornament[:2], o.ornament[2][1:] + o.ornament[2][:1]))
    dyed = [replace(scene, objects=tuple(dye(o) if isinstance(o, Ornamented) else o for o in scene.objects))
            for scene in pairs.scenes]
    changed = (render(dyed, shade=ornate, truth=False).rgb - pairs.target).abs().amax(1, keepdim=True) > 0.02
    assert not (changed & (F.max_pool2d(mask.float(), 3, 1, 1) == 0)).any()
    assert (changed & mask).sum() > 0.98 * mask.sum() and (mask.sum((1, 2, 3)) > 150).all()
    for scene, prompt in zip(pairs.scenes, pairs.prompts):
        cloths = {o.ornament for o in scene.objects if isinstance(o, Ornamented)}
        assert len(cloths) == 1 and ("shirt" in prompt) != ("dress" in prompt) and scene.floor in prompt


@pytest.mark.parametrize("name", ORNAMENTS)
def test_ornaments_have_three_colours_and_no_seam(name):
    turn, height = torch.meshgrid(torch.linspace(0, 1, 201), torch.linspace(-0.9, 0.9, 41), indexing="ij")
    which = ORNAMENTS[name](turn, height, 0.37)
    assert set(which.unique().tolist()) == {0, 1, 2}
    assert (which[0] == which[-1]).float().mean() > 0.9
