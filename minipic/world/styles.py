"""Styles and ornaments: other ways to draw the same scenes, as `shade` functions for scene.render."""

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from minipic.world.maps import borders
from minipic.world.scene import COLORS, SKIES, Object, albedo, shade, sky

# ---- ornaments: patterns that captions have no words for --------------------------------------------------------

@dataclass(frozen=True)
class Ornamented(Object):
    """A solid that wears an ornament: (name in ORNAMENTS, phase 0..1, three names of COLORS). Draw it with `ornate`."""
    ornament: tuple = None


def _fraction(x):
    return x - x.floor()


def _spots(turn, height, phase):
    row = (2.6 * height + phase).floor()
    near = (_fraction(6 * turn + row / 2) - 0.5) ** 2 + (_fraction(2.6 * height + phase) - 0.5) ** 2 < 0.11
    return near * (1 + row % 2)


# Which of three colours: of the angle about the vertical in turns, the height -1..1, and a phase.
ORNAMENTS = {
    "spots": _spots,
    "zigzag": lambda turn, height, phase: (2.4 * height + (2 * _fraction(5 * turn + phase) - 1).abs()).floor() % 3,
    "spiral": lambda turn, height, phase: (6 * turn + 1.8 * height + 3 * phase).floor() % 3,
    "patches": lambda turn, height, phase: (1.3 * (2 * math.pi * (2 * turn + phase)).sin()
                                            + 1.3 * (4 * height + 6 * phase).cos()).round() % 3,
    "wedges": lambda turn, height, phase: ((6 * turn + phase).floor() + 2 * (height > 0)) % 3,
}


def ornament(view, body, name, phase):
    """Which of its colours [n] the ornament has where the picture shows row `body`, and those rays [n]."""
    ray = (view.surface.body == body).nonzero()[:, 0]
    x, y, z = view.surface.local[:, ray]
    return ORNAMENTS[name](torch.atan2(x, z) / (2 * math.pi) + 0.5, y, phase).long(), ray


def ornate(view):
    """The base style with ornaments."""
    color = albedo(view)
    for body, o in enumerate(view.objects):
        if isinstance(o, Ornamented):
            name, phase, colors = o.ornament
            which, ray = ornament(view, body, name, phase)
            color[:, ray] = torch.tensor([COLORS[c] for c in colors]).T[:, which]
    return shade(view, color)


# ---- styles: View -> linear colours [3,R] -----------------------------------------------------------------------

def _plane(view, values):
    """Values [..., R] of all rays as [..., B, h, w]."""
    return values.unflatten(-1, (len(view.scenes), *view.size))


def _patches(view):
    """A number for every patch of one colour of one surface [B,h,w], the sky's and the floor's are negative."""
    code = (255 * albedo(view)).long().T @ torch.tensor([1, 256, 256**2])
    ground = torch.where(view.surface.depth.isinf(), -2, -1)
    return _plane(view, torch.where(view.surface.body >= 0, code + 256**3 * view.surface.body, ground))


def _lines(view):
    """1 on outlines, creases and pattern lines, two samples wide (that's one pixel), else 0: [B,1,h,w]."""
    found = borders(_patches(view), _plane(view, view.surface.normal).transpose(0, 1))[:, None]
    return F.max_pool2d(F.pad(found.float(), (1, 0, 1, 0)), 2, 1)


def _light(view):
    return 0.28 + 0.12 * view.surface.normal[1] + 0.7 * view.surface.lit


def _mix(view, solid, floor, sky):
    """Colours [3,R], each part [3,R] or [3,1]."""
    return torch.where(view.surface.body >= 0, solid, torch.where(view.surface.depth.isinf(), sky, floor))


def _paint(*rgb):
    return torch.tensor(rgb)[:, None] ** 2


def porcelain(view):
    """White glaze with blue ornament before a dark backdrop, as in a museum. A colour becomes an ornament."""
    surface, light = view.surface, _light(view)
    glaze = _paint(0.96, 0.97, 1.0).repeat(1, len(light))
    for body, o in enumerate(view.objects):
        which, ray = ornament(view, body, list(ORNAMENTS)[list(COLORS).index(o.color) % len(ORNAMENTS)], 0.25)
        rim = (surface.local[1, ray].abs() - 0.68).abs() < 0.06
        glaze[:, ray] = torch.where((which == 1) ^ rim, _paint(0.12, 0.22, 0.66), glaze[:, ray])
    half = F.normalize(view.sun - F.normalize(view.rays, dim=0), dim=0)
    shine = (surface.normal * half).sum(0).clamp_min(0) ** 80 * (surface.lit > 0)
    floor = 0.02 + 0.18 * light * torch.exp(-(surface.depth / 11) ** 2)
    return _mix(view, glaze * light + shine, floor, torch.tensor(0.02))


def sketch(view):
    """Pencil on paper: outlines, and hatching for shade."""
    h, w = view.size
    pixel = (torch.arange(h)[:, None] + torch.arange(w)).expand(len(view.scenes), h, w) // 2
    lit, solid = _plane(view, view.surface.lit), _plane(view, view.surface.body >= 0)
    dark = (lit < 0.25) & ~_plane(view, view.surface.depth.isinf())
    hatch = dark & (pixel % 3 == 0) | solid & (lit < 0.6) & (pixel % 6 == 0)
    ink = torch.maximum(_lines(view)[:, 0], 0.55 * hatch).flatten()
    return _paint(0.97, 0.95, 0.89) + ink * (_paint(0.15, 0.15, 0.18) - _paint(0.97, 0.95, 0.89))


def mosaic(view):
    """Tiles of one colour each with dark joints. Every sample belongs to the nearest point of a shaken grid, and no
    tile crosses an outline."""
    h, w = view.size
    side = max(2, min(h, w) // 16)
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    shake = lambda *key: _fraction(sum(k * f for k, f in zip(key, (12.9898, 78.233, 37.719))).sin() * 43758.5453)
    nearest, tile = torch.full((h, w), math.inf), torch.zeros(h, w, dtype=torch.long)
    for dy, dx in product((-1, 0, 1), repeat=2):
        y, x = v // side + dy, u // side + dx
        away = torch.hypot(v - (y + 0.2 + 0.6 * shake(y, x, 0)) * side, u - (x + 0.2 + 0.6 * shake(y, x, 1)) * side)
        tile = torch.where(away < nearest, (y + 1) * (w // side + 3) + x + 1, tile)
        nearest = torch.minimum(nearest, away)
    patch = _patches(view).unique(return_inverse=True)[1]
    scene = torch.arange(len(view.scenes))[:, None, None]
    piece = (patch * len(view.scenes) + scene) * (tile.max() + 1) + tile
    pieces, piece = piece.unique(return_inverse=True)
    total = torch.zeros(3, len(pieces)).index_add(1, piece.flatten(), shade(view))
    color = total / torch.bincount(piece.flatten()) * (0.85 + 0.3 * shake(pieces % (tile.max() + 1)))
    joint = borders(piece, torch.zeros(len(piece), 3, h, w)).flatten()
    return color[:, piece.flatten()] * (1 - 0.75 * joint.float())


def poster(view):
    """A screen print: three flat tones, a sky of sun rays, a cream border."""
    (h, w), lit, flat = view.size, view.surface.lit, albedo(view) ** 2
    every = lambda where: where.expand(len(view.scenes), h, w).flatten()
    tone = torch.where(lit > 0.62, 1.0, torch.where(lit > 0.1, 0.62, 0.28))
    low, high = (view.per_ray(torch.tensor([SKIES[s.sky][k] for s in view.scenes])) ** 2 for k in (0, 1))
    v, u = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    beam = (torch.atan2(0.3 * h - v, u - w / 2) * 14 / math.pi).floor() % 2 == 0
    printed = _mix(view, flat * tone, flat * (0.35 + 0.65 * (lit > 0)), torch.where(every(beam), low, high))
    border = torch.minimum(torch.minimum(u, w - u), torch.minimum(v, h - v)) < min(h, w) / 32
    return torch.where(every(border), _paint(0.98, 0.94, 0.84), printed)


def neon(view):
    """Glowing tubes along outlines and patterns, over a dark grid at night."""
    surface, color = view.surface, albedo(view) ** 2
    solid = torch.where(surface.body >= 0, color, 0.0)
    grid = ((_fraction(surface.point[[0, 2]] / 0.9) - 0.5).abs() > 0.46).any(0) * torch.exp(-(surface.depth / 9) ** 2)
    dark = _mix(view, solid * (0.05 + 0.18 * surface.lit), 0.06 * color + 0.3 * grid * _paint(0.75, 0.25, 0.95),
                _paint(0.16, 0.08, 0.30) + 0.05 * sky(view) ** 2)
    own = _plane(view, solid).transpose(0, 1)
    light = torch.where(own.amax(1, keepdim=True) > 0, own, F.max_pool2d(own, 5, 1, 2)) * _lines(view)
    reach = max(1, min(view.size) // 32)        # a halo's, in samples; it is soft, so it is made at low resolution
    for k in (reach, 3 * reach):
        halo = F.avg_pool2d(F.avg_pool2d(light, k, ceil_mode=True), 3, 1, 1)
        dark = dark + 0.8 * F.interpolate(halo, size=view.size, mode="bilinear").transpose(0, 1).flatten(1)
    return dark + light.transpose(0, 1).flatten(1)


# What a style is called in prompts: f"{caption}, {words}".
STYLES = {"base": (shade, ""), "porcelain": (porcelain, "made of porcelain"), "sketch": (sketch, "as a pencil sketch"),
          "mosaic": (mosaic, "as a mosaic"), "poster": (poster, "as a poster"), "neon": (neon, "in neon light")}
HELD_OUT_STYLES = ("porcelain", "mosaic", "neon")       # never drawn in base training
