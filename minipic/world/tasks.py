"""Tasks on the world: pairs of a given and a wanted picture with a prompt and exact truth, drawn at random access.

Every task is `task(seed, indices, size=(64, 64), held_out="never") -> Pairs`; pair number i does not depend on the
others of its batch. held_out: as in sample_scene. The tasks edges ... boxes pair a map of a scene with its picture and
work both ways round; maps.py reads maps, drawn or predicted, back to the truth.
"""

import math
import re
from dataclasses import dataclass, field, replace
from itertools import combinations, count, product

import torch
import torch.nn.functional as F

from minipic.common import random
from minipic.world import maps
from minipic.world.camera import direction, plucker
from minipic.world.caption import SKY_WORDS, Description, Thing, caption, describe, say
from minipic.world.edits import EDITS, edited, name_of, nameable, pick, put, valid
from minipic.world.scene import ALIKE, COLORS, HELD_OUT, SHAPES, Object, is_held_out, render, sample_scene
from minipic.world.styles import ORNAMENTS, Ornamented, ornate


@dataclass
class Pairs:
    """B pairs: source (given) and target (wanted) [B,3,H,W] in [-1,1], prompts, the target's scenes, and `truth`:
    what else is known exactly, see each task."""
    source: torch.Tensor
    target: torch.Tensor
    prompts: list
    scenes: list
    truth: dict = field(default_factory=dict)


# ---- drawing the scenes of a task -------------------------------------------------------------------------------


def _search(task, seed, index, size, build, **draw):
    """build(scene, generator) for the first scene that gives something; scene number `index` itself comes first."""
    for attempt in count():
        scene = sample_scene((seed, task, attempt) if attempt else seed, index, aspect=size[1] / size[0], **draw)
        made = build(scene, random(seed, task, index, attempt))
        if made:
            return made


def _between(low, high, g):
    return low + (high - low) * torch.rand((), generator=g).item()


def _pictures(seed, indices, size, held_out):
    """Scenes with nameable objects, what is seen of them, and captions."""
    scenes = [_search("scene", seed, int(i), size, lambda scene, g: nameable(scene) and scene, held_out=held_out)
              for i in indices]
    prompts = [caption(scene, random(seed, "caption", int(i))) for scene, i in zip(scenes, indices)]
    return scenes, render(scenes, size), prompts


# ---- maps -------------------------------------------------------------------------------------------------------


def edges(seed, indices, size=(64, 64), held_out="never"):
    """Outlines and creases, white on black. truth: edges [B,H,W], bool."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    found = maps.edges_of(seen)
    return Pairs(maps.edges_to_picture(found), seen.rgb, prompts, scenes, {"edges": found})


def depth(seed, indices, size=(64, 64), held_out="never"):
    """Inverse depth in grey, the sky black. truth: depth [B,H,W] in world units, inf in the sky."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    return Pairs(maps.depth_to_picture(seen.depth), seen.rgb, prompts, scenes, {"depth": seen.depth})


def normals(seed, indices, size=(64, 64), held_out="never"):
    """Normals as colours, the sky grey. truth: normals [B,3,H,W]: right, up, towards the viewer, 0 in the sky."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    found = maps.normals_of(seen)
    return Pairs(maps.normals_to_picture(found), seen.rgb, prompts, scenes, {"normals": found})


def segmentation(seed, indices, size=(64, 64), held_out="never"):
    """Every surface in a colour that the prompt names: "red is the large green cube, ...". The floor is always white,
    the sky cyan. truth: labels [B,H,W] (0 sky, 1 floor, 2 + the place in scene.objects); colors: every pair's."""
    scenes, seen, _ = _pictures(seed, indices, size, held_out)
    names = [[f"{s.sky} sky", f"{s.floor} floor", *map(name_of, describe(s).things)] for s in scenes]
    colors, prompts = _legends(names, seed, indices, ("cyan", "white"))
    labels = maps.labels_of(seen)
    return Pairs(maps.labels_to_picture(labels, colors), seen.rgb, prompts, scenes,
                 {"labels": labels, "colors": colors})


def boxes(seed, indices, size=(64, 64), held_out="never"):
    """Frames around the objects on black, in colours that the prompt names. truth: boxes: a list of [n,4] x0 y0 x1 y1
    in pixels; colors: every pair's colours of them."""
    scenes, seen, _ = _pictures(seed, indices, size, held_out)
    colors, prompts = _legends([list(map(name_of, describe(s).things)) for s in scenes], seed, indices)
    return Pairs(maps.boxes_to_picture(seen.boxes, colors, size), seen.rgb, prompts, scenes,
                 {"boxes": seen.boxes, "colors": colors})


def _legends(names, seed, indices, first=()):
    """Every name's colour, `first` these, then random ones, and words that say so, the last (an object's) first."""
    palette, colors, prompts = [color for color in COLORS if color not in first], [], []
    for row, i in zip(names, indices):
        order = torch.randperm(len(palette), generator=random(seed, "legend", int(i)))
        colors.append([*first, *(palette[k] for k in order.tolist())][:len(row)])
        said = [f"{color} the {name}" for color, name in zip(colors[-1], row)][::-1]
        prompts.append(", ".join(said).replace(" the ", " is the ", 1))
    return colors, prompts


# ---- damaged pictures -------------------------------------------------------------------------------------------


def blur(seed, indices, size=(64, 64), held_out="never"):
    """A Gaussian blur. truth: sigma [B] in pixels, 1/40 to 1/16 of the picture's shorter side."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    sigma = torch.tensor([_between(1 / 40, 1 / 16, random(seed, "blur", int(i))) for i in indices]) * min(size)
    return Pairs(torch.cat(list(map(_blur, seen.rgb.split(1), sigma))), seen.rgb, prompts, scenes, {"sigma": sigma})


def _blur(picture, sigma):
    reach = math.ceil(3 * sigma)
    kernel = torch.softmax(-(torch.arange(-reach, reach + 1) / sigma) ** 2 / 2, 0).expand(3, 1, 1, -1)
    across = F.conv2d(F.pad(picture, (reach, reach, 0, 0), "reflect"), kernel, groups=3)
    return F.conv2d(F.pad(across, (0, 0, reach, reach), "reflect"), kernel.transpose(2, 3), groups=3)


def small(seed, indices, size=(64, 64), held_out="never"):
    """A quarter of the resolution: every block of 4x4 pixels is its mean."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    return Pairs(F.interpolate(F.avg_pool2d(seen.rgb, 4), scale_factor=4), seen.rgb, prompts, scenes)


def masked(seed, indices, size=(64, 64), held_out="never"):
    """A box or an ellipse around an object is black, as nothing else is. truth: mask [B,1,H,W], true where it is."""
    scenes, seen, prompts = _pictures(seed, indices, size, held_out)
    grid = torch.stack(torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="xy")) + 0.5
    mask = []
    for found, i in zip(seen.boxes, indices):
        g = random(seed, "mask", int(i))
        box = pick(found, g).view(2, 2, 1, 1)
        away = (grid - box.float().mean(0)).abs() / ((box[1] - box[0]) * _between(0.55, 0.75, g))
        mask.append(torch.linalg.vector_norm(away, pick((2, math.inf), g), dim=0) < 1)
    mask = torch.stack(mask)[:, None]
    return Pairs(seen.rgb.masked_fill(mask, -1), seen.rgb, prompts, scenes, {"mask": mask})


def edit(seed, indices, size=(64, 64), held_out="never", kinds=tuple(EDITS)):
    """An instruction that changes one object: "make the cube green". truth: kinds; before: the sources' scenes."""
    def build(kind, scene, g):
        made = edited(scene, kind, g)
        if made and (held_out != "never" or not any(map(is_held_out, made[0].objects))):
            return scene, *made

    chosen = [pick(kinds, random(seed, "kind", int(i))) for i in indices]
    made = [_search("edit", seed, int(i), size, lambda *found: build(kind, *found), held_out=held_out)
            for i, kind in zip(indices, chosen)]
    before, after, prompts = map(list, zip(*made))
    seen = render(before + after, size, truth=False).rgb
    return Pairs(*seen.split(len(before)), prompts, after, {"kinds": chosen, "before": before})


# ---- other views, subjects and clothes --------------------------------------------------------------------------


def view(seed, indices, size=(64, 64), held_out="never", views=2):
    """The same scene from other cameras; the source is the first view, the target the second. truth: pictures
    [B,V,3,H,W]; and in the first camera's frame rays [B,V,6,H,W] (see camera.plucker), extrinsics [B,V,3,4]."""
    turns = tuple(product((-90, -60, -30, 30, 60, 90), (-10, 0, 10)))

    def build(scene, g):
        order, seen_from, c = torch.randperm(len(turns), generator=g).tolist(), [scene], scene.camera
        for turn, lift in (turns[k] for k in order):
            other = replace(scene, camera=replace(c, azimuth=c.azimuth + turn, elevation=c.elevation + lift))
            if len(seen_from) < views and valid(other):
                seen_from.append(other)
        return seen_from if len(seen_from) == views and nameable(scene) else None

    scenes = [_search("view", seed, int(i), size, build, held_out=held_out) for i in indices]
    seen = render([s for row in scenes for s in row], size, truth=False)
    extrinsics = relative(seen.extrinsics.unflatten(0, (-1, views)))
    rays = plucker(extrinsics.flatten(0, 1), seen.intrinsics, size).unflatten(0, (-1, views))
    pictures = seen.rgb.unflatten(0, (-1, views))
    return Pairs(pictures[:, 0], pictures[:, 1], [_turning(row[0].camera, row[1].camera) for row in scenes],
                 [row[1] for row in scenes], {"pictures": pictures, "rays": rays, "extrinsics": extrinsics})


def relative(extrinsics):
    """World-to-camera matrices [B,V,3,4] -> the same cameras with the first one's frame as the world."""
    turn, shift = extrinsics[..., :3], extrinsics[..., 3:]
    turned = turn @ turn[:, :1].transpose(2, 3)
    return torch.cat([turned, shift - turned @ shift[:, :1]], 3)


def _turning(old, new):
    turn, lift = round(new.azimuth - old.azimuth), round(new.elevation - old.elevation)
    return f"the camera moves {abs(turn)} degrees to the {'right' if turn > 0 else 'left'}" + (
        f" and {abs(lift)} degrees {'up' if lift > 0 else 'down'}" if lift else "")


_TRIPLES = [three for three in combinations(COLORS, 3) if not any(set(two) in ALIKE for two in combinations(three, 2))]


def _ornament(g):
    colors, order = pick(_TRIPLES, g), torch.randperm(3, generator=g).tolist()
    return pick(tuple(ORNAMENTS), g), _between(0, 1, g), tuple(colors[k] for k in order)


def subject(seed, indices, size=(64, 64), held_out="never", references=1):
    """The same distinctive object, which words can't describe, in a new scene. truth: references [B,V,3,H,W], pictures
    of it alone (the source is the first); mask [B,1,H,W]: where the target shows it."""
    def scenes_of(index):
        g = random(seed, "subject", index)
        shape, dress = pick(SHAPES, g), _ornament(g)
        worn = Ornamented(shape, dress[2][0], pick(("medium", "large"), g), ornament=dress)

        def build(scene, g):
            turn = scene.camera.azimuth + _between(-35, 35, g)
            scene = put(scene, 0, replace(worn, x=scene.objects[0].x, z=scene.objects[0].z, turn=turn))
            return valid(scene) and [o.shape for o in scene.objects].count(shape) == 1 and scene

        alone = [_search("reference", (seed, n), index, size, build, objects=1) for n in range(references)]
        return _search("subject", seed, index, size, build, held_out=held_out), *alone

    scenes = [row for i in indices for row in scenes_of(int(i))]
    seen = render(scenes, size, shade=ornate)
    pictures, targets = seen.rgb.unflatten(0, (-1, references + 1)), scenes[::references + 1]
    prompts = [_same(s, random(seed, "caption", int(i))) for s, i in zip(targets, indices)]
    mask = (seen.instances == 1).unflatten(0, (-1, references + 1))[:, :1]
    return Pairs(pictures[:, 1], pictures[:, 0], prompts, targets, {"references": pictures[:, 1:], "mask": mask})


def _same(scene, g):
    """Where "the same ..." stands, among what, on which floor and when."""
    full = describe(scene)
    first = Thing(shape=full.things[0].shape, place=full.things[0].place if len(full.things) == 1 else None)
    words = {j: word for i, word, j in full.relations if i == 0}
    relations = tuple((0, words[j], j) for j in sorted(words))
    others = [replace(thing, place=None) for thing in full.things[1:]]
    text = say(Description((first, *others), relations, full.floor, full.sky), g)
    return re.sub(r"\ban? (?!picture|rendering)", "the same ", text, count=1)


# Parts of garments and of the figure that wears them, where they are in its own frame: x to its left, y up.
_SLEEVES = tuple(Ornamented("cylinder", "white", "small", x=x, y=1.0) for x in (-0.72, 0.72))
GARMENTS = {"shirt": (Ornamented("cylinder", "white", "medium", y=0.62), *_SLEEVES),
            "dress": (Ornamented("cone", "white", "large", y=0.1), *_SLEEVES)}
HEAD = Object("sphere", "white", "small", y=1.68)
LEGS = tuple(Object("cylinder", "white", "small", x=x) for x in (-0.3, 0.3))
LEG_COLORS = [color for color in COLORS if (color, "cylinder") not in HELD_OUT]


def _stand(parts, turn, at=torch.zeros(3)):
    """Parts in a figure's own frame -> objects in the world: turned about the vertical, then moved by `at` [3]."""
    side = direction(turn + 90, 0)
    spots = [(at + part.x * side).tolist() for part in parts]
    return tuple(replace(part, x=x, z=z, turn=turn) for part, (x, _, z) in zip(parts, spots))


def wear(seed, indices, size=(64, 64), held_out="never"):
    """Try-on: a garment of patterned cloth, and a figure that wears it. truth: mask [B,1,H,W]: where the target shows
    the garment (the rest of the target may be given too)."""
    flat, worn, prompts, parts = [], [], [], []
    for i in indices:
        g = random(seed, "wear", int(i))
        kind, cloth = pick(tuple(GARMENTS), g), _ornament(g)
        head, legs = pick(("yellow", "white", "cyan"), g), pick(LEG_COLORS, g)
        garment = [replace(part, ornament=cloth) for part in GARMENTS[kind]]
        body = [replace(HEAD, color=head), *(replace(leg, color=legs) for leg in LEGS)]
        laid = [replace(part, y=part.y - garment[0].y) for part in garment]         # its first part on the floor
        here, there = (sample_scene((seed, name), int(i), aspect=size[1] / size[0]) for name in ("garment", "figure"))
        turn, at = there.camera.azimuth + _between(-30, 30, g), direction(there.camera.azimuth + 90, 0)
        flat.append(replace(here, objects=_stand(laid, here.camera.azimuth)))
        worn.append(replace(there, objects=_stand(garment + body, turn, _between(-0.6, 0.6, g) * at)))
        setting = f"on a {there.floor} floor {SKY_WORDS[there.sky][0]}"
        prompts.append(f"a figure with a {head} head and {legs} legs wears the {kind} {setting}")
        parts.append(len(garment))
    seen = render(worn, size, shade=ornate)
    mask = (seen.instances > 0) & (seen.instances <= torch.tensor(parts)[:, None, None])
    return Pairs(render(flat, size, shade=ornate, truth=False).rgb, seen.rgb, prompts, worn, {"mask": mask[:, None]})


TASKS = {"edges": edges, "depth": depth, "normals": normals, "segmentation": segmentation, "boxes": boxes, "blur": blur,
         "small": small, "masked": masked, "edit": edit, "view": view, "subject": subject, "wear": wear}
