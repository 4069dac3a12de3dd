"""Scenes of one to three solids on a floor under a sky, drawn by a small batched ray caster with exact truth.

World: x right, y up, z towards the viewer at azimuth 0; the floor is y = 0. Scenes are small frozen dataclasses: edit
one with `dataclasses.replace` and draw it again, or draw it from another camera, or with another `shade` (a style).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minipic.common import InputError, random
from minipic.world.camera import Camera, direction, directions, extrinsic_of, extrinsics, eyes, intrinsics, project
from minipic.world.raycast import Bodies, cast, shine
from minipic.world.solids import HULLS, SOLIDS

COLORS = {"red": (0.90, 0.10, 0.10), "green": (0.10, 0.62, 0.16), "blue": (0.10, 0.24, 0.92),
          "yellow": (0.99, 0.84, 0.08), "purple": (0.52, 0.14, 0.72), "orange": (0.99, 0.46, 0.04),
          "cyan": (0.10, 0.80, 0.88), "white": (0.97, 0.97, 0.97)}
SHAPES = tuple(SOLIDS)
SIZES = {"small": 0.45, "medium": 0.72, "large": 1.16}    # a solid's radius; the widths of pictures don't overlap
PATTERNS = {                                              # of the solid's own coordinates; True: the second colour
    "plain": lambda x, y, z: torch.zeros_like(x, dtype=torch.bool),
    "striped": lambda x, y, z: ((y + 1.05) / 0.525).floor() % 2 == 1,
    "checkered": lambda x, y, z: sum(((v + 1.05) / 0.7).floor() for v in (x, y, z)) % 2 == 1,
}
FLOORS = {"grey": (0.50, 0.51, 0.53), "brown": (0.50, 0.36, 0.25), "pink": (0.84, 0.62, 0.66)}
SKIES = {"blue": ((0.78, 0.89, 0.98), (0.36, 0.62, 0.95)), "sunset": ((1.0, 0.72, 0.42), (0.72, 0.34, 0.52)),
         "night": ((0.16, 0.18, 0.36), (0.03, 0.04, 0.12))}       # colour at the horizon, and high above it
PLACES = {"left": (0.0, 0.33), "middle": (0.42, 0.58), "right": (0.67, 1.0)}     # of the picture's width
ASIDE, AHEAD = 0.2, 0.9     # least clear gaps: left/right in shares of the picture, in front/behind in world units
# Neighbouring colours that are hard to tell apart in a small pattern, never paired in one
ALIKE = ({"red", "orange"}, {"orange", "yellow"}, {"blue", "purple"}, {"cyan", "white"})
SOFT = 0.05                 # the sun's half width as a tangent: the 2x2 samples of a pixel see four of its points
CHUNK = 16                  # scenes drawn together: their tensors stay in the cache
# Colour and shape pairs that are drawn only on request: each colour and shape is common in other pairs.
HELD_OUT = frozenset({("purple", "sphere"), ("yellow", "cube"), ("red", "cylinder"), ("blue", "cone"),
                      ("green", "torus"), ("orange", "diamond")})


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    pattern: str = "plain"
    color2: str = None      # the second colour of a pattern; the pair is unordered, kept in the order of COLORS
    x: float = 0.0
    z: float = 0.0
    turn: float = 0.0       # degrees about the vertical
    y: float = 0.0          # height of its foot above the floor


@dataclass(frozen=True)
class Light:
    azimuth: float = 45.0   # degrees, where it comes from, in the world
    elevation: float = 50.0


@dataclass(frozen=True)
class Scene:
    objects: tuple
    floor: str = "grey"
    sky: str = "blue"
    camera: Camera = Camera()
    light: Light = Light()
    aspect: float = 1.0     # width / height of the picture that it was composed for


def hull(objects):
    """World points [K,P,3] whose convex hulls hold the objects."""
    turn = torch.tensor([math.radians(o.turn) for o in objects])
    radius = torch.tensor([SIZES[o.size] for o in objects])[:, None, None]
    c, s, zero, one = turn.cos(), turn.sin(), torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack([c, zero, s, zero, one, zero, -s, zero, c], 1).view(-1, 3, 3)
    return radius * HULLS[[SHAPES.index(o.shape) for o in objects]] @ rotation.mT + centres(objects)[:, None]


def centres(objects):
    """The middles of the objects [K,3] in the world."""
    return torch.tensor([[o.x, o.y + SIZES[o.size] * SOLIDS[o.shape].base, o.z] for o in objects]).view(-1, 3)


# ---- drawing scenes at random -----------------------------------------------------------------------------------

TRIES = 128     # placements drawn at once for a set of objects; if none is clear, other objects are drawn
HIDDEN = 0.25   # the most of an object's box that a nearer one's box may cover


def layout(offsets, camera, aspect):
    """Where floor points or centres [..., 3] lie: `across` in shares of the picture's width, `aside` in its shorter
    sides (0 in the middle), `ahead` towards the viewer in world units; each [...]."""
    pixels, _ = project(offsets, extrinsic_of(camera), intrinsics((1, aspect)))
    x = pixels[..., 0]
    return x / aspect, (x - aspect / 2) / min(1, aspect), offsets @ direction(camera.azimuth, 0)


def sample_scene(seed, index, objects=None, held_out="never", aspect=1.0):
    """The scene number `index` of an endless set, a pure function of its arguments.

    objects: how many (None: one to three). held_out: whether pairs of HELD_OUT occur: "never", as "any" other pair, or
    "only" scenes with one. aspect: width / height of the picture to compose for. All objects are well visible and
    apart, a single one stands clearly left, in the middle or right, any two are clearly left/right or in front/behind.
    """
    if held_out not in ("never", "any", "only") or objects not in (None, 1, 2, 3):
        raise InputError(f"sample_scene: objects={objects!r} must be 1, 2, 3 or None and held_out={held_out!r} one of "
                         "never, any, only")
    g = random(seed, "scene", index)
    numbers = _uniform(g)
    between = lambda low, high: low + (high - low) * next(numbers)
    pick = lambda options: options[int(next(numbers) * len(options))]
    camera = Camera(between(-30, 30), between(22, 28), between(6.4, 6.8))
    light = Light(camera.azimuth + pick((-1, 1)) * between(25, 70), between(40, 58))
    count, place = objects or pick((1, 1, 1, 2, 2, 2, 2, 3, 3)), pick(tuple(PLACES))
    while True:
        drawn = [_draw(pick, between, camera, held_out == "only" and k == 0) for k in range(count)]
        if held_out == "never" and any(map(is_held_out, drawn)):
            continue
        placed = _place(drawn, camera, aspect, place, g)
        if placed:
            return Scene(placed, pick(tuple(FLOORS)), pick(tuple(SKIES)), camera, light, aspect)


def _uniform(generator):
    """Endless numbers in 0..1, drawn in blocks: one by one would take as long as all the rest."""
    while True:
        yield from torch.rand(32, generator=generator).tolist()


def is_held_out(o):
    return any((color, o.shape) in HELD_OUT for color in (o.color, o.color2))


def _draw(pick, between, camera, held_out):
    color, shape = pick(sorted(HELD_OUT)) if held_out else (pick(tuple(COLORS)), pick(SHAPES))
    size = pick(tuple(SIZES))
    # small solids are plain: a pattern of one or two pixels could not be told from another
    pattern, color2 = pick(("plain", "plain", "striped", "checkered")) if size != "small" else "plain", None
    if pattern != "plain":
        color2 = pick([c for c in COLORS if c != color and {c, color} not in ALIKE])
        color, color2 = sorted((color, color2), key=list(COLORS).index)
    # the turn is seen from the camera: a torus shows its hole, a cube two faces
    return Object(shape, color, size, pattern, color2, turn=camera.azimuth + between(-35, 35))


def _place(objects, camera, aspect, place, g):
    """The objects at the first clear one of TRIES random placements, or None."""
    u = torch.rand(TRIES, len(objects), 2, generator=g) * 2 - 1
    right, toward = direction(camera.azimuth + 90, 0), direction(camera.azimuth, 0)
    offset = u[..., :1] * 2.1 * max(1, aspect) * right + (u[..., 1:] * 1.1 - 0.1) * toward
    good = clear(objects, offset, camera, aspect)
    if len(objects) == 1:
        across = layout(offset + centres(objects), camera, aspect)[0][:, 0]
        good &= (across > PLACES[place][0]) & (across < PLACES[place][1])
    found = good.nonzero()
    if len(found):
        return tuple(replace(o, x=x, z=z) for o, (x, _, z) in zip(objects, offset[found[0, 0]].tolist()))


def clear(objects, offset, camera, aspect):
    """Which placements [T] are good: objects (that stand in the middle, x = z = 0) moved by offset [T,n,3] are wholly
    in the picture, apart, hardly hidden, and any two clearly left/right or in front/behind."""
    points = hull(objects)
    pixels, _ = project(points + offset[:, :, None], extrinsic_of(camera), intrinsics((1, aspect)))
    low, high = pixels.amin(2), pixels.amax(2)
    good = ((low > 0.02) & (high < torch.tensor([aspect, 1]) - 0.02)).flatten(1).all(1)
    _, aside, ahead = layout(offset + centres(objects), camera, aspect)
    reach = points[..., [0, 2]].norm(dim=2).amax(1)
    for i in range(len(objects)):
        for j in range(i):
            good &= (offset[:, i] - offset[:, j]).norm(dim=1) > 1.05 * (reach[i] + reach[j])
            good &= ((aside[:, i] - aside[:, j]).abs() > ASIDE) | ((ahead[:, i] - ahead[:, j]).abs() > AHEAD)
            both = (torch.minimum(high[:, i], high[:, j]) - torch.maximum(low[:, i], low[:, j])).clamp_min(0).prod(1)
            farther = torch.where(ahead[:, i] < ahead[:, j], (high - low)[:, i].prod(1), (high - low)[:, j].prod(1))
            good &= both < HIDDEN * farther
    return good


# ---- pictures ---------------------------------------------------------------------------------------------------

@dataclass
class Render:
    """B pictures and their exact truth at the pixels' centres. rgb [B,3,H,W] in [-1,1]; depth [B,H,W] along the view,
    inf in the sky; normals [B,3,H,W] in the world, 0 in the sky; instances [B,H,W]: 0 floor or sky, else 1 + the place
    in scene.objects; boxes: a list of [n,4] x0 y0 x1 y1 in pixels around what is visible (zeros if nothing is);
    extrinsics [B,3,4] and intrinsics [3,3] as in camera.py. Without truth only rgb and the cameras are there."""
    rgb: torch.Tensor
    extrinsics: torch.Tensor
    intrinsics: torch.Tensor
    depth: torch.Tensor = None
    normals: torch.Tensor = None
    instances: torch.Tensor = None
    boxes: list = None


class View:
    """What a `shade` function gets: a batch of scenes as rays see them, flat over R = B h w samples.

    scenes; objects: those of all scenes, row by row of `bodies`; surface: see raycast.Surface; rays [3,R]: directions;
    sun [3,R]: unit vectors to the light; size: (h, w) of the sample grid; owner [R]: which scene.
    """

    def __init__(self, scenes, size, samples, shaded=True):
        order = sorted((SHAPES.index(o.shape), b, n) for b, s in enumerate(scenes) for n, o in enumerate(s.objects))
        self.scenes, self.objects = scenes, [scenes[b].objects[n] for _, b, n in order]
        self.number = torch.tensor([n + 1 for *_, n in order], dtype=torch.long)
        self.size = (size[0] * samples, size[1] * samples)
        self.extrinsics, self.intrinsics = extrinsics([s.camera for s in scenes]), intrinsics(self.size)
        turn = torch.tensor([math.radians(o.turn) for o in self.objects])
        scale = torch.tensor([1 / SIZES[o.size] for o in self.objects])
        pose = torch.cat([centres(self.objects).T, torch.stack([turn.cos(), turn.sin(), scale])])
        shape, picture = torch.tensor(order, dtype=torch.long).view(-1, 3)[:, :2].T
        self.bodies = Bodies(shape, picture, pose)
        self.rays = directions(self.extrinsics, self.intrinsics, self.size).transpose(0, 1).flatten(1)
        points = hull(self.objects)
        self.surface = cast(self.bodies, self._boxes(points), eyes(self.extrinsics), self.rays, self.size)
        if shaded:
            self._shine(points)

    def _boxes(self, points):
        """Pixel boxes [K,4] around projected hulls [K,P,3]."""
        pixels, _ = project(points, self.extrinsics[self.bodies.picture], self.intrinsics)
        low, high = pixels.amin(1).floor().long(), pixels.amax(1).ceil().long()
        return torch.cat([low.clamp_min(0), torch.minimum(high, torch.tensor(self.size[::-1]))], 1)

    def _shine(self, points):
        light = torch.stack([direction(s.light.azimuth, s.light.elevation) for s in self.scenes])
        v, u = torch.arange(self.size[0])[:, None] % 2 - 0.5, torch.arange(self.size[1]) % 2 - 0.5
        shift = torch.stack([u + 0 * v, 0 * u * v, v + 0 * u]).view(3, 1, -1) * (2 * SOFT)
        self.sun = F.normalize(light.T[:, :, None] + shift, dim=0).flatten(1)
        slant = light[self.bodies.picture][:, None]
        shadows = points - slant * (points[..., 1:2] / slant[..., 1:2])      # hull and shadow hold the shadow volume
        shine(self.surface, self.bodies, self._boxes(torch.cat([points, shadows], 1)), self.sun, self.size)

    def per_ray(self, values):
        """One colour for every scene [B,3] -> for every ray [3,R]."""
        return values.T.repeat_interleave(self.size[0] * self.size[1], 1)


def albedo(view):
    """The colour of every surface point [3,R], before light: floors, plain solids and patterns."""
    color = view.per_ray(torch.tensor([FLOORS[s.floor] for s in view.scenes]))
    ray = (view.surface.body >= 0).nonzero()[:, 0]
    body, local = view.surface.body[ray], view.surface.local.index_select(1, ray)
    pattern = torch.tensor([list(PATTERNS).index(o.pattern) for o in view.objects], dtype=torch.long)[body]
    second = torch.zeros(len(ray), dtype=torch.long)
    for i, where in enumerate(PATTERNS.values()):
        mine = (pattern == i).nonzero()[:, 0]
        second[mine] = where(*local[:, mine]).long()
    both = torch.tensor([[COLORS[o.color], COLORS[o.color2 or o.color]] for o in view.objects]).view(-1, 2, 3)
    return color.index_copy_(1, ray, both[body, second].T)


def sky(view):
    """The sky's colour along every ray [3,R]: from the horizon's to the zenith's."""
    low, high = (torch.tensor([SKIES[s.sky][i] for s in view.scenes]).T[:, :, None] for i in (0, 1))
    share = (3 * view.rays[1]).clamp(0, 1).view(len(view.scenes), -1)      # 18 degrees up is high already
    return (low + share * (high - low)).flatten(1)


def shade(view, color=None):
    """Linear colours [3,R]: matt surfaces in sun and skylight, a highlight on solids, floors that fade into haze.

    color: other surface colours [3,R] than `albedo`'s."""
    surface = view.surface
    # named colours are for the eye, light adds up in linear ones
    color = (albedo(view) if color is None else color) ** 2
    color *= 0.26 + 0.10 * surface.normal[1] + 0.80 * surface.lit
    ray = ((surface.body >= 0) & (surface.lit > 0)).nonzero()[:, 0]
    half = F.normalize(view.sun.index_select(1, ray) - F.normalize(view.rays.index_select(1, ray), dim=0), dim=0)
    gleam = (surface.normal.index_select(1, ray) * half).sum(0).clamp_min(0) ** 40
    color.index_add_(1, ray, (0.25 * gleam).expand(3, -1))
    haze = torch.where(surface.body < 0, 1 - torch.exp(-(surface.depth / 40) ** 2), 0.0)     # 1 in the sky
    return color + haze * (sky(view) ** 2 - color)


def render(scenes, size=(64, 64), shade=shade, truth=True):
    """Draw one scene or a list of them at size (H, W) with 2x2 samples a pixel.

    shade: a function of a View that gives linear colours [3,R] in 0..1; truth=False leaves out all but the picture.
    """
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    pictures, views = [], []
    for i in range(0, len(scenes), CHUNK):
        part = scenes[i:i + CHUNK]
        view = View(part, size, 2)
        color = F.avg_pool2d(shade(view).clamp(0, 1).view(-1, 1, *view.size), 2)
        pictures.append(color.view(3, -1, *size).transpose(0, 1).sqrt() * 2 - 1)
        views += [View(part, size, 1, shaded=False)] if truth else []
    out = Render(torch.cat(pictures), extrinsics([s.camera for s in scenes]), intrinsics(size))
    if truth:
        shape = lambda x: x.unflatten(-1, (-1, *size))
        out.depth = torch.cat([shape(v.surface.depth) for v in views])
        out.normals = torch.cat([shape(v.surface.normal).transpose(0, 1) for v in views])
        out.instances = torch.cat([shape(torch.cat([v.number, torch.zeros(1, dtype=torch.long)])[v.surface.body])
                                   for v in views])
        out.boxes = [visible_boxes(i, len(s.objects)) for i, s in zip(out.instances, scenes)]
    return out


def visible_boxes(instances, count):
    """Boxes [n,4] around the pixels of objects 1..n in one picture [H,W]."""
    boxes = torch.zeros(count, 4, dtype=torch.long)
    for k in range(count):
        y, x = (instances == k + 1).nonzero(as_tuple=True)
        if len(x):
            boxes[k] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes
