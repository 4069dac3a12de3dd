"""Tasks on the world: pairs of a given and a wanted picture, with a prompt and exact truth.

    batch = TASKS["depth"](seed=0, indices=range(4))
    batch.source, batch.target, batch.prompts       # depth maps; pictures of the scenes; captions

Every task is a function task(seed, indices, size=(64, 64), held_out="never") -> TaskBatch.
    seed: a number, or a tuple of numbers and words
    indices: the numbers of the pairs. What pair i is does not depend on the others of its batch
    size: (height, width) of the pictures
    held_out: as in scene.sample_scene

Tasks whose source is a map (edges, depth, normals, segmentation, boxes) can be used both ways
round: maps.py reads a picture of a map, exact or predicted, back into the truth.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count, product

import torch
import torch.nn.functional as F

from minipic.common import rng
from minipic.world import maps
from minipic.world.camera import direction, plucker
from minipic.world.caption import SKY_WORDS, Description, Thing, caption, describe, say
from minipic.world.choices import between, one_of
from minipic.world.edits import EDITS, edited, name_of, nameable, put, valid
from minipic.world.scene import (
    ALIKE, COLORS, HELD_OUT, SHAPES, Object, Render, Scene, is_held_out, render, sample_scene)
from minipic.world.styles import ORNAMENTS, Ornamented, ornate

Size = tuple[int, int]  # (height, width)


@dataclass
class TaskBatch:
    """B pairs of a task."""

    source: torch.Tensor  # [B,3,H,W] in [-1,1], the given pictures
    target: torch.Tensor  # [B,3,H,W] in [-1,1], the wanted pictures
    prompts: list[str]
    scenes: list[Scene]  # what the targets show
    truth: dict = field(default_factory=dict)  # what else is known exactly, see each task


# ---- scenes for tasks ---------------------------------------------------------------------------

def _search(task: str, seed, index: int, size: Size, build: Callable, **options):
    """What `build` makes of the first scene that suits it.

    build(scene, generator): a result, or None for a scene that does not suit.
    options: of sample_scene. Scene number `index` itself is tried first.
    """
    height, width = size
    for attempt in count():
        scene_seed = seed if attempt == 0 else (seed, task, attempt)
        scene = sample_scene(scene_seed, index, aspect=width / height, **options)
        result = build(scene, rng(seed, task, index, attempt))
        if result is not None:
            return result


def _nameable_scene(scene, generator):
    return scene if nameable(scene) else None


def _captioned_scenes(seed, indices, size, held_out) -> tuple[list[Scene], Render, list[str]]:
    """Scenes all of whose objects can be named, their pictures and their captions."""
    scenes = []
    captions = []
    for index in map(int, indices):
        scene = _search("scene", seed, index, size, _nameable_scene, held_out=held_out)
        scenes.append(scene)
        captions.append(caption(scene, rng(seed, "caption", index)))
    return scenes, render(scenes, size), captions


# ---- maps ---------------------------------------------------------------------------------------

def edges(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
          held_out: str = "never") -> TaskBatch:
    """Outlines and creases, white on black.

    truth: edges [B,H,W], bool.
    """
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    edge_map = maps.edges_of(rendered)
    source = maps.edges_to_picture(edge_map)
    return TaskBatch(source, rendered.rgb, captions, scenes, {"edges": edge_map})


def depth(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
          held_out: str = "never") -> TaskBatch:
    """Inverse depth in grey, the sky black.

    truth: depth [B,H,W] in world units, inf in the sky.
    """
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    source = maps.depth_to_picture(rendered.depth)
    return TaskBatch(source, rendered.rgb, captions, scenes, {"depth": rendered.depth})


def normals(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
            held_out: str = "never") -> TaskBatch:
    """Normals as colours, the sky grey.

    truth: normals [B,3,H,W]: right, up, towards the viewer; 0 in the sky.
    """
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    normal_map = maps.normals_of(rendered)
    source = maps.normals_to_picture(normal_map)
    return TaskBatch(source, rendered.rgb, captions, scenes, {"normals": normal_map})


def segmentation(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
                 held_out: str = "never") -> TaskBatch:
    """Every surface in a colour that the prompt names: "red is the large green cube, ...".

    The floor is always white, the sky cyan.
    truth: labels [B,H,W], see maps.labels_of; colors: for each pair, the colour of each label.
    """
    scenes, rendered, _ = _captioned_scenes(seed, indices, size, held_out)
    names = []
    for scene in scenes:
        names.append([f"{scene.sky} sky", f"{scene.floor} floor", *_object_names(scene)])
    colors, prompts = _legends(names, seed, indices, first=("cyan", "white"))
    labels = maps.labels_of(rendered)
    source = maps.labels_to_picture(labels, colors)
    return TaskBatch(source, rendered.rgb, prompts, scenes, {"labels": labels, "colors": colors})


def boxes(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
          held_out: str = "never") -> TaskBatch:
    """Frames around the objects, on black, in colours that the prompt names.

    truth: boxes: for each pair [n,4], x0 y0 x1 y1 in pixels; colors: for each pair, their colours.
    """
    scenes, rendered, _ = _captioned_scenes(seed, indices, size, held_out)
    names = [_object_names(scene) for scene in scenes]
    colors, prompts = _legends(names, seed, indices)
    source = maps.boxes_to_picture(rendered.boxes, colors, size)
    truth = {"boxes": rendered.boxes, "colors": colors}
    return TaskBatch(source, rendered.rgb, prompts, scenes, truth)


def _object_names(scene):
    return [name_of(thing) for thing in describe(scene).things]


def _legends(names, seed, indices, first=()):
    """A colour for each thing of each pair, and prompts that say which has which.

    names: for each pair, the names of its things. first: the colours of its first things; the
    others get random colours.
    -> (colours of each pair's things, prompts, which name the last thing first)
    """
    palette = [color for color in COLORS if color not in first]
    colors = []
    prompts = []
    for things, index in zip(names, indices):
        order = torch.randperm(len(palette), generator=rng(seed, "legend", int(index))).tolist()
        shuffled = [palette[k] for k in order]
        own_colors = [*first, *shuffled][:len(things)]
        parts = [f"{color} the {thing}" for color, thing in zip(own_colors, things)]
        prompt = ", ".join(reversed(parts))
        colors.append(own_colors)
        prompts.append(prompt.replace(" the ", " is the ", 1))
    return colors, prompts


# ---- damaged pictures ---------------------------------------------------------------------------

def blur(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
         held_out: str = "never") -> TaskBatch:
    """A Gaussian blur.

    truth: sigma [B] in pixels: 1/40 to 1/16 of the picture's shorter side.
    """
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    shares = [between(1 / 40, 1 / 16, rng(seed, "blur", int(index))) for index in indices]
    sigmas = torch.tensor(shares) * min(size)
    blurred = []
    for picture, sigma in zip(rendered.rgb.split(1), sigmas):
        blurred.append(gaussian_blur(picture, sigma))
    return TaskBatch(torch.cat(blurred), rendered.rgb, captions, scenes, {"sigma": sigmas})


def gaussian_blur(picture: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A blurred picture [1,3,H,W]. sigma: the Gaussian's standard deviation in pixels."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.softmax(-(offsets / sigma) ** 2 / 2, 0)  # a Gaussian whose sum is 1
    kernel = weights.expand(3, 1, 1, -1)
    padded = F.pad(picture, (reach, reach, 0, 0), "reflect")
    blurred = F.conv2d(padded, kernel, groups=3)
    padded = F.pad(blurred, (0, 0, reach, reach), "reflect")
    return F.conv2d(padded, kernel.transpose(2, 3), groups=3)


def small(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
          held_out: str = "never") -> TaskBatch:
    """A quarter of the resolution: every block of 4x4 pixels is its mean."""
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    source = F.interpolate(F.avg_pool2d(rendered.rgb, 4), scale_factor=4)
    return TaskBatch(source, rendered.rgb, captions, scenes)


def masked(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
           held_out: str = "never") -> TaskBatch:
    """A rectangle or an ellipse around one object is black. Nothing else in any picture is.

    truth: mask [B,1,H,W], true where it is.
    """
    scenes, rendered, captions = _captioned_scenes(seed, indices, size, held_out)
    height, width = size
    x_and_y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack(x_and_y) + 0.5  # [2,H,W]
    masks = []
    for boxes_of_scene, index in zip(rendered.boxes, indices):
        generator = rng(seed, "mask", int(index))
        low, high = one_of(boxes_of_scene, generator).view(2, 2, 1, 1)  # corners (x, y), [2,1,1]
        middle = torch.stack([low, high]).float().mean(0)
        radius = (high - low) * between(0.55, 0.75, generator)  # 0.5 would just touch the box
        norm = one_of((2, math.inf), generator)  # 2: an ellipse, inf: a rectangle
        distance = torch.linalg.vector_norm((pixels - middle).abs() / radius, norm, dim=0)
        masks.append(distance < 1)
    mask = torch.stack(masks)[:, None]
    source = rendered.rgb.masked_fill(mask, -1)
    return TaskBatch(source, rendered.rgb, captions, scenes, {"mask": mask})


# ---- edits --------------------------------------------------------------------------------------

def edit(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64), held_out: str = "never",
         kinds: Sequence[str] = tuple(EDITS)) -> TaskBatch:
    """An instruction that changes one object: "make the cube green".

    kinds: of EDITS; each is as likely as any other.
    truth: kinds: the kind of each pair; before: the scenes of the sources.
    """
    chosen_kinds = []
    before = []
    after = []
    instructions = []
    for index in map(int, indices):
        kind = one_of(kinds, rng(seed, "kind", index))
        build = _edit_builder(kind, held_out)
        scene, edited_scene, instruction = _search(
            "edit", seed, index, size, build, held_out=held_out)
        chosen_kinds.append(kind)
        before.append(scene)
        after.append(edited_scene)
        instructions.append(instruction)
    pictures = render(before + after, size, truth=False).rgb
    source, target = pictures.split(len(before))
    truth = {"kinds": chosen_kinds, "before": before}
    return TaskBatch(source, target, instructions, after, truth)


def _edit_builder(kind, held_out):
    """A `build` function for _search: scene -> (scene, scene after the edit, instruction)."""

    def build(scene, generator):
        change = edited(scene, kind, generator)
        if change is None:
            return None
        edited_scene, instruction = change
        if held_out == "never" and any(is_held_out(o) for o in edited_scene.objects):
            return None
        return scene, edited_scene, instruction

    return build


# ---- other views --------------------------------------------------------------------------------

# How a camera moves: by degrees of azimuth and degrees of elevation.
CAMERA_MOVES = tuple(product((-90, -60, -30, 30, 60, 90), (-10, 0, 10)))


def view(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64), held_out: str = "never",
         views: int = 2) -> TaskBatch:
    """The same scene from another camera: "the camera moves 60 degrees to the left".

    views: V, how many views there are. The source is the first, the target the second.
    truth: pictures [B,V,3,H,W]; extrinsics [B,V,3,4] and rays [B,V,6,H,W] (see camera.plucker),
    both with the first camera's frame as the world.
    """
    scenes = []  # V of each pair
    prompts = []
    targets = []
    for index in map(int, indices):
        build = _views_builder(views)
        scene_views = _search("view", seed, index, size, build, held_out=held_out)
        first, second = scene_views[:2]
        scenes += scene_views
        prompts.append(_camera_words(first.camera, second.camera))
        targets.append(second)
    rendered = render(scenes, size, truth=False)
    pictures = rendered.rgb.unflatten(0, (-1, views))
    extrinsics = relative(rendered.extrinsics.unflatten(0, (-1, views)))
    rays = plucker(extrinsics.flatten(0, 1), rendered.intrinsics, size).unflatten(0, (-1, views))
    truth = {"pictures": pictures, "rays": rays, "extrinsics": extrinsics}
    return TaskBatch(pictures[:, 0], pictures[:, 1], prompts, targets, truth)


def _views_builder(views):
    """A `build` function for _search: scene -> the scene from its own and other cameras."""

    def build(scene, generator):
        order = torch.randperm(len(CAMERA_MOVES), generator=generator).tolist()
        if not nameable(scene):
            return None
        scenes = [scene]
        for k in order:
            if len(scenes) == views:
                return scenes
            turn, lift = CAMERA_MOVES[k]
            azimuth = scene.camera.azimuth + turn
            elevation = scene.camera.elevation + lift
            moved = replace(scene.camera, azimuth=azimuth, elevation=elevation)
            other = replace(scene, camera=moved)
            if valid(other):
                scenes.append(other)
        return scenes if len(scenes) == views else None

    return build


def relative(extrinsics: torch.Tensor) -> torch.Tensor:
    """World-to-camera matrices [B,V,3,4] -> the same with each row's first camera as the world."""
    rotation = extrinsics[..., :3]
    translation = extrinsics[..., 3:]
    from_first = rotation @ rotation[:, :1].transpose(2, 3)
    return torch.cat([from_first, translation - from_first @ translation[:, :1]], 3)


def _camera_words(old, new):
    turn = round(new.azimuth - old.azimuth)
    lift = round(new.elevation - old.elevation)
    side = "right" if turn > 0 else "left"
    text = f"the camera moves {abs(turn)} degrees to the {side}"
    if lift > 0:
        text += f" and {lift} degrees up"
    if lift < 0:
        text += f" and {-lift} degrees down"
    return text


# ---- subjects -----------------------------------------------------------------------------------

def _easy_to_tell_apart(colors):
    return not any(set(two) in ALIKE for two in combinations(colors, 2))


_COLOR_TRIPLES = [colors for colors in combinations(COLORS, 3) if _easy_to_tell_apart(colors)]


def _random_ornament(generator):
    """A value of styles.Ornamented.ornament: a name of ORNAMENTS, a phase, three colours."""
    colors = one_of(_COLOR_TRIPLES, generator)
    order = torch.randperm(3, generator=generator).tolist()
    name = one_of(tuple(ORNAMENTS), generator)
    phase = between(0, 1, generator)
    return name, phase, tuple(colors[k] for k in order)


def subject(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
            held_out: str = "never", references: int = 1) -> TaskBatch:
    """The same distinctive object, which words cannot describe, in a new scene.

    references: V, how many pictures of the object alone there are. The source is the first.
    truth: references [B,V,3,H,W]: these pictures; mask [B,1,H,W]: where the target shows it.
    """
    scenes = []  # for each pair the target's scene, then those of V references
    for index in map(int, indices):
        build = _subject_builder(rng(seed, "subject", index))
        scenes.append(_search("subject", seed, index, size, build, held_out=held_out))
        for n in range(references):
            scenes.append(_search("reference", (seed, n), index, size, build, objects=1))
    rendered = render(scenes, size, shade=ornate)
    pictures = rendered.rgb.unflatten(0, (-1, references + 1))
    targets = scenes[::references + 1]
    prompts = []
    for scene, index in zip(targets, indices):
        prompts.append(_subject_words(scene, rng(seed, "caption", int(index))))
    # the subject is the first object of its scene, so its number in `instances` is 1
    mask = (rendered.instances == 1).unflatten(0, (-1, references + 1))[:, :1]
    truth = {"references": pictures[:, 1:], "mask": mask}
    return TaskBatch(pictures[:, 1], pictures[:, 0], prompts, targets, truth)


def _subject_builder(generator):
    """A `build` function for _search: scene -> the scene with a random subject as first object."""
    shape = one_of(SHAPES, generator)
    ornament = _random_ornament(generator)
    _, _, colors = ornament
    size = one_of(("medium", "large"), generator)
    subject_object = Ornamented(shape, colors[0], size, ornament=ornament)

    def build(scene, generator):
        first = scene.objects[0]
        turn = scene.camera.azimuth + between(-35, 35, generator)
        scene = put(scene, 0, replace(subject_object, x=first.x, z=first.z, turn=turn))
        shapes = [o.shape for o in scene.objects]
        # "the same cube" must mean one object
        return scene if valid(scene) and shapes.count(shape) == 1 else None

    return build


def _subject_words(scene, generator):
    """For example "the same cube left of a small red cone on a grey floor at night"."""
    full = describe(scene)
    first, *others = full.things
    alone = not others
    things = [Thing(shape=first.shape, place=first.place if alone else None)]
    for thing in others:
        things.append(replace(thing, place=None))
    relation_to = {}  # one for each other thing; in front and behind replace left and right
    for i, word, j in full.relations:
        if i == 0:
            relation_to[j] = word
    relations = tuple((0, relation_to[j], j) for j in sorted(relation_to))
    text = say(Description(tuple(things), relations, full.floor, full.sky), generator)
    return re.sub(r"\ban? (?!picture|rendering)", "the same ", text, count=1)


# ---- clothes ------------------------------------------------------------------------------------

# The parts of garments and of the figure that wears them, in the figure's own frame: x to its side,
# y up. All colours are replaced.
_SLEEVES = (
    Ornamented("cylinder", "white", "small", x=-0.72, y=1.0),
    Ornamented("cylinder", "white", "small", x=0.72, y=1.0),
)
GARMENTS = {
    "shirt": (Ornamented("cylinder", "white", "medium", y=0.62), *_SLEEVES),
    "dress": (Ornamented("cone", "white", "large", y=0.1), *_SLEEVES),
}
HEAD = Object("sphere", "white", "small", y=1.68)
LEGS = (Object("cylinder", "white", "small", x=-0.3), Object("cylinder", "white", "small", x=0.3))
HEAD_COLORS = ("yellow", "white", "cyan")
LEG_COLORS = [color for color in COLORS if (color, "cylinder") not in HELD_OUT]


def wear(seed: int | tuple, indices: Sequence[int], size: Size = (64, 64),
         held_out: str = "never") -> TaskBatch:
    """Trying on: a garment of patterned cloth, and a figure that wears it.

    truth: mask [B,1,H,W]: where the target shows the garment.
    """
    height, width = size
    garment_scenes = []
    figure_scenes = []
    prompts = []
    part_counts = []
    for index in map(int, indices):
        generator = rng(seed, "wear", index)
        kind = one_of(tuple(GARMENTS), generator)
        cloth = _random_ornament(generator)
        head_color = one_of(HEAD_COLORS, generator)
        leg_color = one_of(LEG_COLORS, generator)
        garment = [replace(part, ornament=cloth) for part in GARMENTS[kind]]
        legs = [replace(leg, color=leg_color) for leg in LEGS]
        figure = [*garment, replace(HEAD, color=head_color), *legs]

        # the garment alone, its body on the floor; of a random scene all but the objects is used
        scene = sample_scene((seed, "garment"), index, aspect=width / height)
        foot = garment[0].y
        on_the_floor = [replace(part, y=part.y - foot) for part in garment]
        objects = _stand(on_the_floor, turn=scene.camera.azimuth)
        garment_scenes.append(replace(scene, objects=objects))

        # the figure, in another setting
        scene = sample_scene((seed, "figure"), index, aspect=width / height)
        right = direction(scene.camera.azimuth + 90, 0)
        turn = scene.camera.azimuth + between(-30, 30, generator)
        at = between(-0.6, 0.6, generator) * right
        figure_scenes.append(replace(scene, objects=_stand(figure, turn, at)))

        prompts.append(f"a figure with a {head_color} head and {leg_color} legs wears the {kind} "
                       f"on a {scene.floor} floor {SKY_WORDS[scene.sky][0]}")
        part_counts.append(len(garment))
    source = render(garment_scenes, size, shade=ornate, truth=False).rgb
    rendered = render(figure_scenes, size, shade=ornate)
    # the garment's parts are the first objects of their scene: numbers 1 to part_count
    last_part = torch.tensor(part_counts)[:, None, None]
    mask = (rendered.instances > 0) & (rendered.instances <= last_part)
    return TaskBatch(source, rendered.rgb, prompts, figure_scenes, {"mask": mask[:, None]})


def _stand(parts, turn, at=torch.zeros(3)):
    """Parts in a figure's own frame -> objects in the world.

    turn: the figure's turn about the vertical, in degrees. at [3]: where it stands.
    """
    side = direction(turn + 90, 0)
    objects = []
    for part in parts:
        x, _, z = (at + part.x * side).tolist()
        objects.append(replace(part, x=x, z=z, turn=turn))
    return tuple(objects)


TASKS = {
    "edges": edges,
    "depth": depth,
    "normals": normals,
    "segmentation": segmentation,
    "boxes": boxes,
    "blur": blur,
    "small": small,
    "masked": masked,
    "edit": edit,
    "view": view,
    "subject": subject,
    "wear": wear,
}

# What a caption of two panels calls a task's source, as in "two panels: its edges | a red cube".
GIVEN = {
    "edges": "its edges",
    "depth": "its depth",
    "normals": "its normals",
    "segmentation": "its parts in colours",
    "boxes": "boxes around its objects",
    "blur": "a blurred picture",
    "small": "a picture of few pixels",
    "masked": "a picture with a hole",
    "edit": "the picture before",
    "view": "another view",
    "subject": "the same object",
    "wear": "the garment",
}
