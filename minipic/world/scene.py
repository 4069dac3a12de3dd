"""Scenes of one to three solids on a floor under a sky, at random; their pictures and exact truth.

    scene = sample_scene(seed=0, index=7)           # scene number 7 of an endless set
    image = render(scene).rgb                       # [1,3,64,64] in [-1,1]

A Scene is a small frozen dataclass. Change one with `dataclasses.replace` and render it again, from
another camera, or with another `shade` function (styles.py has some).

World: x to the right, y up, z towards the viewer at azimuth 0; the floor is the plane y = 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from minipic.common import ParameterError, rng
from minipic.world.camera import (
    Camera, direction, directions, extrinsic_of, extrinsics, eyes, intrinsics, project)
from minipic.world.raycast import Bodies, cast_rays, cast_shadows
from minipic.world.solids import HULLS, SOLIDS

# ---- what a scene is made of -------------------------------------------------------------------

COLORS = {  # red, green, blue in 0..1, as the eye sees them (not linear)
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.10, 0.24, 0.92),
    "yellow": (0.99, 0.84, 0.08),
    "purple": (0.52, 0.14, 0.72),
    "orange": (0.99, 0.46, 0.04),
    "cyan": (0.10, 0.80, 0.88),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = tuple(SOLIDS)
# A solid's radius in world units. However near it stands, a small one looks smaller than a medium
# one, and a medium one smaller than a large one.
SIZES = {"small": 0.45, "medium": 0.72, "large": 1.16}
FLOORS = {"grey": (0.50, 0.51, 0.53), "brown": (0.50, 0.36, 0.25), "pink": (0.84, 0.62, 0.66)}
SKIES = {  # the colour at the horizon, and high above it
    "blue": ((0.78, 0.89, 0.98), (0.36, 0.62, 0.95)),
    "sunset": ((1.0, 0.72, 0.42), (0.72, 0.34, 0.52)),
    "night": ((0.16, 0.18, 0.36), (0.03, 0.04, 0.12)),
}


def plain(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x, dtype=torch.bool)


def striped(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Level stripes, 0.525 wide."""
    return ((y + 1.05) / 0.525).floor() % 2 == 1


def checkered(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Cut out of a chess board in three dimensions, whose cubes have edges of 0.7."""
    return sum(((v + 1.05) / 0.7).floor() for v in (x, y, z)) % 2 == 1


# Where a solid has its second colour: functions of points in its own frame, x y z [N] -> bool [N].
PATTERNS = {"plain": plain, "striped": striped, "checkered": checkered}

# From where to where each named place reaches, in shares of the picture's width. The gaps between
# have no name.
PLACES = {"left": (0.0, 0.33), "middle": (0.42, 0.58), "right": (0.67, 1.0)}
# The least distances at which one object is clearly left of another, or in front of it.
ASIDE = 0.2  # in units of the picture's shorter side
AHEAD = 0.9  # in world units

# Colours that are hard to tell apart in a small pattern: never together in one.
ALIKE = ({"red", "orange"}, {"orange", "yellow"}, {"blue", "purple"}, {"cyan", "white"})
# Pairs of colour and shape that occur only on request: they test what a model makes of a pair that
# it has never met. Each of these colours and each of these shapes is common in other pairs.
HELD_OUT = frozenset({
    ("purple", "sphere"), ("yellow", "cube"), ("red", "cylinder"),
    ("blue", "cone"), ("green", "torus"), ("orange", "diamond")})


@dataclass(frozen=True)
class Object:
    """A solid that stands on the floor (or floats: y)."""

    shape: str  # of SHAPES
    color: str  # of COLORS
    size: str  # of SIZES
    pattern: str = "plain"  # of PATTERNS
    color2: str | None = None  # a pattern's second colour; the two are kept in the order of COLORS
    x: float = 0.0
    z: float = 0.0
    turn: float = 0.0  # degrees about the vertical
    y: float = 0.0  # height of its foot above the floor


@dataclass(frozen=True)
class Light:
    """Where the sunlight comes from, in degrees in the world."""

    azimuth: float = 45.0
    elevation: float = 50.0


@dataclass(frozen=True)
class Scene:
    """Everything that a picture of the world shows."""

    objects: tuple[Object, ...]
    floor: str = "grey"  # of FLOORS
    sky: str = "blue"  # of SKIES
    camera: Camera = Camera()
    light: Light = Light()
    aspect: float = 1.0  # width / height of the picture that it was composed for


def centres(objects: list[Object]) -> torch.Tensor:
    """The middles [K,3] of objects in the world."""
    points = [[o.x, o.y + SIZES[o.size] * SOLIDS[o.shape].base, o.z] for o in objects]
    return torch.tensor(points).view(-1, 3)


def hull(objects: list[Object]) -> torch.Tensor:
    """Points [K,P,3] in the world; the convex hull of an object's points holds the object."""
    turn = torch.tensor([math.radians(o.turn) for o in objects])
    radius = torch.tensor([SIZES[o.size] for o in objects])
    shape = [SHAPES.index(o.shape) for o in objects]
    cos = turn.cos()
    sin = turn.sin()
    zero = torch.zeros_like(turn)
    one = torch.ones_like(turn)
    rotation = torch.stack([cos, zero, sin,
                            zero, one, zero,
                            -sin, zero, cos], dim=1).view(-1, 3, 3)
    return radius[:, None, None] * HULLS[shape] @ rotation.mT + centres(objects)[:, None]


def is_held_out(o: Object) -> bool:
    """Whether one of the object's colours makes a pair of HELD_OUT with its shape."""
    return (o.color, o.shape) in HELD_OUT or (o.color2, o.shape) in HELD_OUT


class Layout(NamedTuple):
    """Where points appear to the viewer; three tensors [...]."""

    across: torch.Tensor  # in shares of the picture's width: 0 at its left border, 1 at its right
    aside: torch.Tensor  # to the right of the picture's middle, in units of its shorter side
    ahead: torch.Tensor  # towards the viewer from the middle of the floor, in world units


def layout(points: torch.Tensor, camera: Camera, aspect: float) -> Layout:
    """Where world points [..., 3] appear in a picture of this aspect, width / height."""
    pixels, _ = project(points, extrinsic_of(camera), intrinsics((1, aspect)))
    x = pixels[..., 0]
    return Layout(across=x / aspect, aside=(x - aspect / 2) / min(1, aspect),
                  ahead=points @ direction(camera.azimuth, 0))


# ---- scenes at random --------------------------------------------------------------------------

TRIES = 128  # placements drawn at once; if none of them is good, other objects are drawn
MAX_HIDDEN = 0.25  # the largest share of an object's box that the box of a nearer one may cover
MARGIN = 0.02  # between objects and the picture's border, in units of its height


def sample_scene(seed: int | tuple, index: int, objects: int | None = None, held_out: str = "never",
                 aspect: float = 1.0, alike: bool = False) -> Scene:
    """Scene number `index` of an endless set, a pure function of its arguments.

    seed: a number, or a tuple of numbers and words.
    objects: how many, 1 to 3; None: at random.
    held_out: whether pairs of HELD_OUT occur: "never"; "any": as often as others; "only": one in
        every scene at least.
    aspect: width / height of the picture to compose for.
    alike: another endless set: two or three objects, of which at least two have one shape.

    All objects are well visible and apart. A single one stands clearly on the left, in the middle
    or on the right. Of any two, one is clearly left of the other or clearly in front of it.
    Raises ParameterError.
    """
    if objects not in (None, 1, 2, 3):
        raise ParameterError("objects", f"choose 1, 2, 3 or None, not {objects!r}")
    if held_out not in ("never", "any", "only"):
        raise ParameterError("held_out", f"choose never, any or only, not {held_out!r}")
    if alike and objects == 1:
        raise ParameterError("objects", "1 object is like no other; choose 2, 3 or None")
    generator = rng(seed, "alike" if alike else "scene", index)
    choose = _Choices(generator)
    camera = Camera(choose.between(-30, 30), choose.between(22, 28), choose.between(6.4, 6.8))
    # the sun stands to the left or right of the camera, so that shadows are seen
    side = choose.one_of((-1, 1))
    light = Light(camera.azimuth + side * choose.between(25, 70), choose.between(40, 58))
    count = objects or choose.one_of((2, 3) if alike else (1, 1, 1, 2, 2, 2, 2, 3, 3))
    place = choose.one_of(tuple(PLACES))
    if alike:  # chosen here, for of those chosen below, what fits well comes more often
        shape = choose.one_of(SHAPES)
        how_many = choose.one_of(range(2, count + 1))
        shared = choose.one_of(("shape", "colors", "all"))
    while True:
        solids = []
        for k in range(count):
            from_held_out = held_out == "only" and k == 0
            solids.append(_random_object(choose, camera, from_held_out))
        if alike:
            if solids[0].shape != shape:
                continue
            solids = _make_alike(solids, how_many, shared)
        if held_out == "never" and any(is_held_out(o) for o in solids):
            continue
        placed = _place_at_random(solids, camera, aspect, place, generator)
        if placed is not None:
            floor = choose.one_of(tuple(FLOORS))
            sky = choose.one_of(tuple(SKIES))
            return Scene(placed, floor, sky, camera, light, aspect)


class _Choices:
    """Random choices as in choices.py, with numbers drawn in blocks.

    To draw them one by one would take as long as everything else that makes a scene.
    """

    def __init__(self, generator: torch.Generator):
        self.numbers = self._uniform(generator)

    @staticmethod
    def _uniform(generator) -> Iterator[float]:
        """Endless numbers in 0..1."""
        while True:
            yield from torch.rand(32, generator=generator).tolist()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.numbers)

    def one_of(self, options: Sequence) -> Any:
        return options[int(next(self.numbers) * len(options))]


def _random_object(choose, camera, from_held_out):
    """An object in the middle of the floor. from_held_out: with a pair of HELD_OUT."""
    if from_held_out:
        color, shape = choose.one_of(sorted(HELD_OUT))
    else:
        color = choose.one_of(tuple(COLORS))
        shape = choose.one_of(SHAPES)
    size = choose.one_of(tuple(SIZES))
    pattern = "plain"
    color2 = None
    if size != "small":  # there a stripe would be a pixel or two: too few to tell patterns apart
        pattern = choose.one_of(("plain", "plain", "striped", "checkered"))
    if pattern != "plain":
        others = [c for c in COLORS if c != color and {c, color} not in ALIKE]
        color2 = choose.one_of(others)
        color, color2 = sorted((color, color2), key=list(COLORS).index)
    # turned towards the camera, more or less: a torus shows its hole, a cube two of its faces
    turn = camera.azimuth + choose.between(-35, 35)
    return Object(shape, color, size, pattern, color2, turn=turn)


def _make_alike(objects, how_many, shared):
    """The objects, of which so many become like the first, itself included.

    shared: "shape"; "colors": also the colours and the pattern; "all": also the size.
    """
    first = objects[0]
    result = [first]
    for o in objects[1:how_many]:
        if shared == "shape":
            result.append(replace(o, shape=first.shape))
        elif shared == "colors" and first.pattern == "plain":
            result.append(replace(first, size=o.size, turn=o.turn))
        else:
            result.append(replace(first, turn=o.turn))  # small ones have no pattern
    return result + objects[how_many:]


def _place_at_random(objects, camera, aspect, place, generator):
    """The objects at the first good one of TRIES random placements, or None.

    place: where a single object shall stand; two and more stand anywhere.
    """
    u = torch.rand(TRIES, len(objects), 2, generator=generator) * 2 - 1
    right = direction(camera.azimuth + 90, 0)
    toward = direction(camera.azimuth, 0)  # to the viewer, along the floor
    # up to 2.1 to each side, more in a wide picture; from 1.2 behind the middle to 1 in front of it
    offsets = u[..., :1] * 2.1 * max(1, aspect) * right + (u[..., 1:] * 1.1 - 0.1) * toward
    good = clear(objects, offsets, camera, aspect)
    if len(objects) == 1:
        across = layout(offsets + centres(objects), camera, aspect).across[:, 0]
        low, high = PLACES[place]
        good &= (across > low) & (across < high)
    found = good.nonzero()
    if len(found) == 0:
        return None
    chosen = offsets[found[0, 0]].tolist()
    return tuple(replace(o, x=x, z=z) for o, (x, _, z) in zip(objects, chosen))


def clear(objects: list[Object], offsets: torch.Tensor, camera: Camera,
          aspect: float) -> torch.Tensor:
    """Which of T placements are good, bool [T].

    objects: n of them, at x = z = 0. offsets [T,n,3]: where each placement moves them.
    In a good placement all objects are wholly in the picture, none touches another or hides much of
    it, and of any two, one is clearly left of the other or clearly in front of it.
    """
    points = hull(objects)
    pixels, _ = project(points + offsets[:, :, None], extrinsic_of(camera), intrinsics((1, aspect)))
    low = pixels.amin(2)  # corners [T,n,2] of the objects' boxes in the picture
    high = pixels.amax(2)
    inside = (low > MARGIN) & (high < torch.tensor([aspect, 1]) - MARGIN)
    good = inside.flatten(1).all(1)
    if len(objects) == 1:
        return good

    area = (high - low).prod(2)
    _, aside, ahead = layout(offsets + centres(objects), camera, aspect)
    reach = points[..., [0, 2]].norm(dim=2).amax(1)  # [n] an object's radius seen from above
    for i in range(len(objects)):
        for j in range(i):
            distance = (offsets[:, i] - offsets[:, j]).norm(dim=1)
            good &= distance > 1.05 * (reach[i] + reach[j])
            clearly_beside = (aside[:, i] - aside[:, j]).abs() > ASIDE
            clearly_in_front = (ahead[:, i] - ahead[:, j]).abs() > AHEAD
            good &= clearly_beside | clearly_in_front
            overlap = torch.minimum(high[:, i], high[:, j]) - torch.maximum(low[:, i], low[:, j])
            covered = overlap.clamp_min(0).prod(1)
            area_of_farther = torch.where(ahead[:, i] < ahead[:, j], area[:, i], area[:, j])
            good &= covered < MAX_HIDDEN * area_of_farther
    return good


# ---- pictures ----------------------------------------------------------------------------------

CHUNK = 16  # scenes drawn together: so few that their tensors stay in the processor's cache
SAMPLES = 2  # a pixel is the mean of SAMPLES x SAMPLES rays
SUN_RADIUS = 0.05  # tangent of the sun's half width: it makes shadows soft


@dataclass
class Render:
    """B pictures and, if asked for, their exact truth at the pixels' centres."""

    rgb: torch.Tensor  # [B,3,H,W] in [-1,1]
    extrinsics: torch.Tensor  # [B,3,4] world to camera, see camera.py
    intrinsics: torch.Tensor  # [3,3]
    depth: torch.Tensor | None = None  # [B,H,W] along the camera's axis; inf in the sky
    normals: torch.Tensor | None = None  # [B,3,H,W] in the world; 0 in the sky
    instances: torch.Tensor | None = None  # [B,H,W] 0: floor or sky; k + 1: scene.objects[k]
    boxes: list[torch.Tensor] | None = None  # [n,4] of each scene, see visible_boxes


class View:
    """A batch of scenes as camera rays meet them: what a `shade` function gets.

    The rays form one flat list of R = B * h * w: scene by scene, row by row.

    size: (h, w), the grid of rays of each scene; there are samples x samples rays for each pixel
    scenes: the B scenes
    extrinsics [B,3,4], intrinsics [3,3]: their cameras, whose "pixels" are rays
    rays [3,R]: the rays' directions, of length 1 along the camera's axis
    bodies: the K objects of all scenes as the ray caster has them, see raycast.Bodies
    objects: the same as a list of Objects
    numbers [K]: 1 + the place of each object in its scene's objects
    surface: what the rays meet, see raycast.Surface
    sun [3,R]: unit vectors to the light; only if `shaded`, else surface.lit is 1 everywhere
    """

    def __init__(self, scenes: list[Scene], size: tuple[int, int], samples: int,
                 shaded: bool = True):
        # cameras and their rays
        height, width = size
        self.size = (height * samples, width * samples)
        self.scenes = scenes
        self.extrinsics = extrinsics([scene.camera for scene in scenes])
        self.intrinsics = intrinsics(self.size)
        rays = directions(self.extrinsics, self.intrinsics, self.size)
        self.rays = rays.transpose(0, 1).flatten(1)

        # the objects of all scenes, sorted by shape: the ray caster tests one shape after the other
        order = []
        for b, scene in enumerate(scenes):
            for k, o in enumerate(scene.objects):
                order.append((SHAPES.index(o.shape), b, k))
        order.sort()
        self.objects = [scenes[b].objects[k] for _, b, k in order]
        self.numbers = torch.tensor([k + 1 for _, _, k in order], dtype=torch.long)
        shape, picture = torch.tensor(order, dtype=torch.long).view(-1, 3)[:, :2].T
        turn = torch.tensor([math.radians(o.turn) for o in self.objects])
        inverse_radius = torch.tensor([1 / SIZES[o.size] for o in self.objects])
        turn_and_size = torch.stack([turn.cos(), turn.sin(), inverse_radius])
        self.bodies = Bodies(shape, picture, torch.cat([centres(self.objects).T, turn_and_size]))

        # what the rays meet, and whether the sun reaches it
        points = hull(self.objects)
        self.surface = cast_rays(
            self.bodies, self.boxes_around(points), eyes(self.extrinsics), self.rays, self.size)
        if shaded:
            self._light_up(points)

    def boxes_around(self, points: torch.Tensor) -> torch.Tensor:
        """Boxes [K,4] around each body's points [K,P,3] in the grid of rays: x0 y0 x1 y1."""
        height, width = self.size
        pixels, _ = project(points, self.extrinsics[self.bodies.picture], self.intrinsics)
        low = pixels.amin(1).floor().long().clamp_min(0)
        high = torch.minimum(pixels.amax(1).ceil().long(), torch.tensor([width, height]))
        return torch.cat([low, high], dim=1)

    def _light_up(self, points):
        """Set `sun` and fill in surface.lit. points [K,P,3]: the bodies' hulls."""
        height, width = self.size
        light = torch.stack([direction(s.light.azimuth, s.light.elevation) for s in self.scenes])
        # The sun is wide: of the four rays of a pixel, each looks at another corner of it.
        z, x = torch.meshgrid(torch.arange(height) % 2, torch.arange(width) % 2, indexing="ij")
        corner = torch.stack([x - 0.5, torch.zeros(height, width), z - 0.5]) * (2 * SUN_RADIUS)
        to_sun = light.T[:, :, None] + corner.view(3, 1, -1)
        self.sun = F.normalize(to_sun, dim=0).flatten(1)
        # Whatever a body shadows lies between its hull and the hull's shadow on the floor.
        slant = light[self.bodies.picture][:, None]
        shadows = points - slant * (points[..., 1:2] / slant[..., 1:2])
        boxes = self.boxes_around(torch.cat([points, shadows], dim=1))
        cast_shadows(self.surface, self.bodies, boxes, self.sun, self.size)

    def per_ray(self, values: torch.Tensor) -> torch.Tensor:
        """One colour for each scene [B,3] -> the same for each ray [3,R]."""
        height, width = self.size
        return values.T.repeat_interleave(height * width, 1)


def albedo(view: View) -> torch.Tensor:
    """The colours [3,R] of all surfaces before light falls on them: floors, solids, patterns."""
    color = view.per_ray(torch.tensor([FLOORS[scene.floor] for scene in view.scenes]))
    ray = (view.surface.body >= 0).nonzero()[:, 0]
    body = view.surface.body[ray]
    local = view.surface.local.index_select(1, ray)
    pattern_names = list(PATTERNS)
    patterns = [pattern_names.index(o.pattern) for o in view.objects]
    pattern = torch.tensor(patterns, dtype=torch.long)[body]
    which_color = torch.zeros(len(ray), dtype=torch.long)
    for i, has_second_color in enumerate(PATTERNS.values()):
        rows = (pattern == i).nonzero()[:, 0]
        which_color[rows] = has_second_color(*local[:, rows]).long()
    two_colors = [[COLORS[o.color], COLORS[o.color2 or o.color]] for o in view.objects]
    two_colors = torch.tensor(two_colors).view(-1, 2, 3)  # the view is for scenes without objects
    return color.index_copy_(1, ray, two_colors[body, which_color].T)


def sky(view: View) -> torch.Tensor:
    """The sky's colour along every ray [3,R]: from the horizon's to the zenith's."""
    horizon = torch.tensor([SKIES[scene.sky][0] for scene in view.scenes]).T[:, :, None]
    zenith = torch.tensor([SKIES[scene.sky][1] for scene in view.scenes]).T[:, :, None]
    height = (3 * view.rays[1]).clamp(0, 1).view(len(view.scenes), -1)  # 18 degrees up is the top
    return (horizon + height * (zenith - horizon)).flatten(1)


def shade(view: View, color: torch.Tensor | None = None) -> torch.Tensor:
    """Linear colours [3,R]: matt surfaces, highlights on solids, and a floor that fades into haze.

    color [3,R]: the surfaces' own colours, if not those of `albedo`.
    """
    surface = view.surface
    if color is None:
        color = albedo(view)
    color = color ** 2  # named colours are made for the eye (gamma 2); light adds up in linear ones
    # light from everywhere, from above, and from the sun
    color *= 0.26 + 0.10 * surface.normal[1] + 0.80 * surface.lit

    ray = ((surface.body >= 0) & (surface.lit > 0)).nonzero()[:, 0]
    from_camera = F.normalize(view.rays.index_select(1, ray), dim=0)
    halfway = F.normalize(view.sun.index_select(1, ray) - from_camera, dim=0)  # Blinn 1977
    highlight = (surface.normal.index_select(1, ray) * halfway).sum(0).clamp_min(0) ** 40
    color.index_add_(1, ray, (0.25 * highlight).expand(3, -1))

    haze = 1 - torch.exp(-(surface.depth / 40) ** 2)  # 1 in the sky, whose depth is inf
    haze = torch.where(surface.body < 0, haze, 0.0)
    return color + haze * (sky(view) ** 2 - color)


def render(scenes: Scene | list[Scene], size: tuple[int, int] = (64, 64),
           shade: Callable[[View], torch.Tensor] = shade, truth: bool = True) -> Render:
    """Draw one scene or a list of them at size (height, width).

    shade: a function of a View that gives linear colours [3,R] in 0..1; styles.py has others.
    truth: whether to give depth, normals, instances and boxes too.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    pictures = []
    truths = []
    for start in range(0, len(scenes), CHUNK):
        chunk = scenes[start:start + CHUNK]
        pictures.append(_draw(chunk, size, shade))
        if truth:
            truths.append(_truth_of(chunk, size))
    cameras = [scene.camera for scene in scenes]
    result = Render(torch.cat(pictures), extrinsics(cameras), intrinsics(size))
    if truth:
        depth, normals, instances = zip(*truths)
        result.depth = torch.cat(depth)
        result.normals = torch.cat(normals)
        result.instances = torch.cat(instances)
        result.boxes = []
        for scene, numbers in zip(scenes, result.instances):
            result.boxes.append(visible_boxes(numbers, len(scene.objects)))
    return result


def _draw(scenes, size, shade):
    """Pictures [B,3,H,W] in [-1,1] of a few scenes."""
    view = View(scenes, size, SAMPLES)
    colors = shade(view).clamp(0, 1).view(-1, 1, *view.size)
    pixels = F.avg_pool2d(colors, SAMPLES)  # [3B,1,H,W]
    pictures = pixels.view(3, -1, *size).transpose(0, 1)
    return pictures.sqrt() * 2 - 1  # back from linear colours to the eye's


def _truth_of(scenes, size):
    """Depth, normals and instances of a few scenes as in Render, by one ray through each pixel."""
    view = View(scenes, size, samples=1, shaded=False)
    depth = view.surface.depth.unflatten(-1, (-1, *size))
    normals = view.surface.normal.unflatten(-1, (-1, *size)).transpose(0, 1)
    # body -1 is the floor or the sky: the last row of the table gives it 0
    number_of_body = torch.cat([view.numbers, torch.zeros(1, dtype=torch.long)])
    instances = number_of_body[view.surface.body].unflatten(-1, (-1, *size))
    return depth, normals, instances


def visible_boxes(instances: torch.Tensor, count: int) -> torch.Tensor:
    """Boxes [n,4] around the visible pixels of objects 1..n in one picture's instances [H,W].

    A box is x0 y0 x1 y1 in pixels, the end exclusive; zeros if nothing of the object is visible.
    """
    boxes = torch.zeros(count, 4, dtype=torch.long)
    for k in range(count):
        y, x = (instances == k + 1).nonzero(as_tuple=True)
        if len(x) > 0:
            boxes[k] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes
