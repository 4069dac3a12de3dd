"""Styles and ornaments: other ways to draw the same scenes.

    image = render(scene, shade=neon).rgb
    shade, words = STYLES["neon"]                   # words for a prompt: "in neon light"

A style is a function of a scene.View that gives linear colours [3,R] of its R rays, as scene.shade
is.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from minipic.world.maps import borders
from minipic.world.scene import COLORS, SKIES, Object, View, albedo, shade, sky

# ---- ornaments: patterns that captions have no words for ----------------------------------------
#
# An ornament is a function of points of a solid: which of three colours, 0 to 2, has each [n]?
#     turn [n]: the point's angle about the vertical, 0..1
#     height [n]: about -1..1
#     phase: 0..1, shifts the ornament


def spots(turn: torch.Tensor, height: torch.Tensor, phase: float) -> torch.Tensor:
    """Dots in rows, of two colours in turn, on a ground of colour 0."""
    rows = 2.6 * height + phase
    row = rows.floor()
    from_middle_x = _fraction(6 * turn + row / 2) - 0.5
    from_middle_y = _fraction(rows) - 0.5
    in_spot = from_middle_x ** 2 + from_middle_y ** 2 < 0.11
    return in_spot * (1 + row % 2)


def zigzag(turn: torch.Tensor, height: torch.Tensor, phase: float) -> torch.Tensor:
    wave = (2 * _fraction(5 * turn + phase) - 1).abs()
    return (2.4 * height + wave).floor() % 3


def spiral(turn: torch.Tensor, height: torch.Tensor, phase: float) -> torch.Tensor:
    return (6 * turn + 1.8 * height + 3 * phase).floor() % 3


def patches(turn: torch.Tensor, height: torch.Tensor, phase: float) -> torch.Tensor:
    around = 1.3 * (2 * math.pi * (2 * turn + phase)).sin()
    upward = 1.3 * (4 * height + 6 * phase).cos()
    return (around + upward).round() % 3


def wedges(turn: torch.Tensor, height: torch.Tensor, phase: float) -> torch.Tensor:
    return ((6 * turn + phase).floor() + 2 * (height > 0)) % 3


def _fraction(x):
    return x - x.floor()


ORNAMENTS = {
    "spots": spots, "zigzag": zigzag, "spiral": spiral, "patches": patches, "wedges": wedges}


@dataclass(frozen=True)
class Ornamented(Object):
    """A solid that wears an ornament. Draw it with shade=ornate."""

    ornament: tuple | None = None  # name of ORNAMENTS, phase 0..1, three names of COLORS


def ornate(view: View) -> torch.Tensor:
    """The base style, with the ornaments of Ornamented objects."""
    color = albedo(view)
    for body, o in enumerate(view.objects):
        if isinstance(o, Ornamented):
            name, phase, color_names = o.ornament
            ray, which = ornament_of_rays(view, body, name, phase)
            colors = torch.tensor([COLORS[color_name] for color_name in color_names])
            color[:, ray] = colors.T[:, which]
    return shade(view, color)


def ornament_of_rays(view: View, body: int, name: str,
                     phase: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The rays [n] that show view.objects[body], and which of the ornament's colours each has."""
    ray = (view.surface.body == body).nonzero()[:, 0]
    x, y, z = view.surface.local[:, ray]
    turn = torch.atan2(x, z) / (2 * math.pi) + 0.5
    return ray, ORNAMENTS[name](turn, y, phase).long()


# ---- what styles are made of --------------------------------------------------------------------

def _linear(*rgb):
    """A colour for the eye -> a linear one [3,1]."""
    return torch.tensor(rgb)[:, None] ** 2


def _images(view, values):
    """Values [..., R] of all rays -> [..., B, h, w]."""
    return values.unflatten(-1, (len(view.scenes), *view.size))


def _in_every_scene(view, mask):
    """A mask [h,w], the same for all scenes -> [R]."""
    return mask.expand(len(view.scenes), *view.size).flatten()


def _per_surface(view, solids, floor, sky):
    """Colours [3,R] from those of solids, floor and sky: each [3,R], or [3,1], [R], one number."""
    not_solid = torch.where(view.surface.depth.isinf(), sky, floor)
    return torch.where(view.surface.body >= 0, solids, not_solid)


def _brightness(view):
    """Light [R] on matt surfaces, softer than in `shade`."""
    return 0.28 + 0.12 * view.surface.normal[1] + 0.7 * view.surface.lit


def _patches_of_color(view):
    """An integer for each colour of each solid, negative ones for floor and sky [B,h,w]."""
    color_code = (255 * albedo(view)).long().T @ torch.tensor([1, 256, 256**2])  # 24 bits
    of_solids = color_code + 256**3 * view.surface.body
    ground = torch.where(view.surface.depth.isinf(), -2, -1)
    return _images(view, torch.where(view.surface.body >= 0, of_solids, ground))


def _lines(view):
    """1 on outlines, creases and pattern lines, two rays (a pixel) wide; else 0 [B,1,h,w]."""
    normals = _images(view, view.surface.normal).transpose(0, 1)
    thin = borders(_patches_of_color(view), normals)[:, None].float()
    padded = F.pad(thin, (1, 0, 1, 0))
    return F.max_pool2d(padded, kernel_size=2, stride=1)


# ---- the styles ---------------------------------------------------------------------------------

def porcelain(view: View) -> torch.Tensor:
    """White glaze with blue ornaments, before a dark backdrop.

    An object's colour decides which ornament it wears.
    """
    surface = view.surface
    white = _linear(0.96, 0.97, 1.0)
    blue = _linear(0.12, 0.22, 0.66)
    light = _brightness(view)
    glaze = white.repeat(1, len(light))
    for body, o in enumerate(view.objects):
        number = list(COLORS).index(o.color) % len(ORNAMENTS)
        ray, which = ornament_of_rays(view, body, list(ORNAMENTS)[number], 0.25)
        rim = (surface.local[1, ray].abs() - 0.68).abs() < 0.06
        is_blue = (which == 1) ^ rim
        glaze[:, ray] = torch.where(is_blue, blue, glaze[:, ray])
    halfway = F.normalize(view.sun - F.normalize(view.rays, dim=0), dim=0)
    highlight = (surface.normal * halfway).sum(0).clamp_min(0) ** 80 * (surface.lit > 0)
    floor = 0.02 + 0.18 * light * torch.exp(-(surface.depth / 11) ** 2)
    return _per_surface(view, glaze * light + highlight, floor, sky=torch.tensor(0.02))


def sketch(view: View) -> torch.Tensor:
    """Pencil on paper: outlines, and hatching for shade."""
    height, width = view.size
    paper = _linear(0.97, 0.95, 0.89)
    pencil = _linear(0.15, 0.15, 0.18)
    diagonal = (torch.arange(height)[:, None] + torch.arange(width)) // 2  # a pixel wide
    lit = _images(view, view.surface.lit)
    solid = _images(view, view.surface.body >= 0)
    is_sky = _images(view, view.surface.depth.isinf())
    dense = (lit < 0.25) & ~is_sky & (diagonal % 3 == 0)
    sparse = (lit < 0.6) & solid & (diagonal % 6 == 0)
    ink = torch.maximum(_lines(view)[:, 0], 0.55 * (dense | sparse)).flatten()
    return paper + ink * (pencil - paper)


def mosaic(view: View) -> torch.Tensor:
    """Tiles of one colour each, with dark joints; no tile crosses an outline."""
    tile = _tiles(view.size)
    # a piece is what one tile shows of one patch of colour in one scene
    patch = _patches_of_color(view).unique(return_inverse=True)[1]
    scene = torch.arange(len(view.scenes))[:, None, None]
    tiles = tile.max() + 1
    piece = (patch * len(view.scenes) + scene) * tiles + tile
    pieces, piece = piece.unique(return_inverse=True)  # numbered from 0
    piece_of_ray = piece.flatten()

    total = torch.zeros(3, len(pieces)).index_add(1, piece_of_ray, shade(view))
    mean = total / torch.bincount(piece_of_ray)
    color = mean * (0.85 + 0.3 * _noise(pieces % tiles))
    no_normals = torch.zeros(len(piece), 3, *view.size)
    joint = borders(piece, no_normals).flatten()
    return color[:, piece_of_ray] * (1 - 0.75 * joint.float())


def _tiles(size):
    """Which tile [h,w] each ray is in: the nearest point of a grid that was shaken."""
    height, width = size
    side = max(2, min(height, width) // 16)
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    nearest = torch.full((height, width), math.inf)
    tile = torch.zeros(height, width, dtype=torch.long)
    for dy, dx in product((-1, 0, 1), repeat=2):
        y = v // side + dy
        x = u // side + dx
        point_y = (y + 0.2 + 0.6 * _noise(y, x, 0)) * side
        point_x = (x + 0.2 + 0.6 * _noise(y, x, 1)) * side
        distance = torch.hypot(v - point_y, u - point_x)
        number = (y + 1) * (width // side + 3) + x + 1
        tile = torch.where(distance < nearest, number, tile)
        nearest = torch.minimum(nearest, distance)
    return tile


def _noise(*key):
    """A number in 0..1 for each key of up to three integers (a shader's hash)."""
    total = sum(k * factor for k, factor in zip(key, (12.9898, 78.233, 37.719)))
    return _fraction(total.sin() * 43758.5453)


def poster(view: View) -> torch.Tensor:
    """A screen print: three flat tones, a sky of sun rays, a cream border."""
    height, width = view.size
    cream = _linear(0.98, 0.94, 0.84)
    lit = view.surface.lit
    flat = albedo(view) ** 2
    darker_tone = torch.where(lit > 0.1, 0.62, 0.28)
    tone = torch.where(lit > 0.62, 1.0, darker_tone)
    floor = flat * (0.35 + 0.65 * (lit > 0))
    horizon = view.per_ray(torch.tensor([SKIES[scene.sky][0] for scene in view.scenes])) ** 2
    zenith = view.per_ray(torch.tensor([SKIES[scene.sky][1] for scene in view.scenes])) ** 2
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    angle = torch.atan2(0.3 * height - v, u - width / 2)  # about a point in the upper half
    beam = (angle * 14 / math.pi).floor() % 2 == 0
    sun_rays = torch.where(_in_every_scene(view, beam), horizon, zenith)
    to_border = torch.minimum(torch.minimum(u, width - u), torch.minimum(v, height - v))
    border = to_border < min(height, width) / 32
    printed = _per_surface(view, flat * tone, floor, sun_rays)
    return torch.where(_in_every_scene(view, border), cream, printed)


def neon(view: View) -> torch.Tensor:
    """Glowing tubes along outlines and patterns, over a dark grid at night."""
    surface = view.surface
    color = albedo(view) ** 2
    solid_color = torch.where(surface.body >= 0, color, 0.0)
    in_cell = (_fraction(surface.point[[0, 2]] / 0.9) - 0.5).abs()
    grid = (in_cell > 0.46).any(0) * torch.exp(-(surface.depth / 9) ** 2)
    solids = solid_color * (0.05 + 0.18 * surface.lit)
    floor = 0.06 * color + 0.3 * grid * _linear(0.75, 0.25, 0.95)
    night = _linear(0.16, 0.08, 0.30) + 0.05 * sky(view) ** 2
    dark = _per_surface(view, solids, floor, night)

    # a tube has its solid's colour; where its line runs just outside, that of the nearest solid
    own = _images(view, solid_color).transpose(0, 1)  # [B,3,h,w]
    near = F.max_pool2d(own, kernel_size=5, stride=1, padding=2)
    tubes = torch.where(own.amax(1, keepdim=True) > 0, own, near) * _lines(view)
    reach = max(1, min(view.size) // 32)  # of a halo, in rays
    for k in (reach, 3 * reach):
        small = F.avg_pool2d(tubes, k, ceil_mode=True)  # a halo is soft: a low resolution will do
        halo = F.interpolate(F.avg_pool2d(small, 3, 1, 1), size=view.size, mode="bilinear")
        dark = dark + 0.8 * halo.transpose(0, 1).flatten(1)
    return dark + tubes.transpose(0, 1).flatten(1)


# {name: (style, its words)}; a prompt is f"{caption}, {words}".
STYLES = {
    "base": (shade, ""),
    "porcelain": (porcelain, "made of porcelain"),
    "sketch": (sketch, "as a pencil sketch"),
    "mosaic": (mosaic, "as a mosaic"),
    "poster": (poster, "as a poster"),
    "neon": (neon, "in neon light"),
}
HELD_OUT_STYLES = ("porcelain", "mosaic", "neon")  # never drawn in the training of a base model
