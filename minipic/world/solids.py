"""The unit solids of the world: where rays enter each one, with the normal there, and a hull of points around it.

Rays are six flat tensors: origin (ox, oy, oz) and direction (dx, dy, dz), in the solid's own frame (y up, centre at the
origin, widest half extent about 1). Directions need not have length 1. Every function returns (t, normal): t [N] is
inf where the ray misses, normal is three tensors [N] and means nothing there.
"""

import math
from collections import namedtuple
from itertools import product

import torch

CUBE = 0.8                # half an edge
CYLINDER = (0.72, 0.85)   # radius, half height
CONE = (0.9, 0.95)        # radius of the base, half height
TORUS = (0.66, 0.34)      # radius of the ring, radius of the tube; it stands upright, its axis is z
DIAMOND = (0.85, 1.05)    # half width, half height of an octahedron standing on its tip


def _divisor(x):
    """x with zeros nudged: a ray parallel to a face meets it infinitely far away."""
    return torch.where(x == 0, torch.full_like(x, 1e-12), x)


def _valid(t, inside):
    return torch.where(inside & (t > 0), t, math.inf)


def sphere(ox, oy, oz, dx, dy, dz):
    a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1
    inside = b * b - a * c
    t = _valid((-b - inside.clamp_min(0).sqrt()) / a, inside > 0)
    return t, (ox + t * dx, oy + t * dy, oz + t * dz)


def _slabs(planes, ox, oy, oz, dx, dy, dz):
    """A convex solid |p . plane| <= 1 for every plane: the slab method."""
    enter, leave, which, sign = None, None, None, []
    for i, (px, py, pz) in enumerate(planes):
        inverse = 1 / _divisor(px * dx + py * dy + pz * dz)
        middle, half = -(px * ox + py * oy + pz * oz) * inverse, inverse.abs()
        sign.append(-inverse.sign())
        if i == 0:
            enter, leave, which = middle - half, middle + half, torch.zeros_like(dx, dtype=torch.long)
        else:
            which = torch.where(middle - half > enter, i, which)
            enter, leave = torch.maximum(enter, middle - half), torch.minimum(leave, middle + half)
    normals = torch.tensor(planes, dtype=dx.dtype, device=dx.device)
    normal = (normals / normals.norm(dim=1, keepdim=True))[which] * torch.stack(sign).gather(0, which[None])[0, :, None]
    return _valid(enter, enter < leave), normal.unbind(1)


def cube(*ray):
    e = 1 / CUBE
    return _slabs([(e, 0, 0), (0, e, 0), (0, 0, e)], *ray)


def diamond(*ray):
    w, h = 1 / DIAMOND[0], 1 / DIAMOND[1]
    return _slabs([(w, h, w), (-w, h, w), (w, h, -w), (-w, h, -w)], *ray)


def cylinder(ox, oy, oz, dx, dy, dz):
    radius, half = CYLINDER
    a, b, c = _divisor(dx * dx + dz * dz), ox * dx + oz * dz, ox * ox + oz * oz - radius**2
    inside = b * b - a * c
    side = (-b - inside.clamp_min(0).sqrt()) / a
    cap = (-dy.sign() * half - oy) / _divisor(dy)
    on_cap = (ox + cap * dx) ** 2 + (oz + cap * dz) ** 2 <= radius**2
    on_side = (inside > 0) & ((oy + side * dy).abs() <= half)
    t, which = torch.stack([_valid(side, on_side), _valid(cap, on_cap)]).min(0)
    on_side, inverse = which == 0, (which == 0) / radius
    return t, ((ox + t * dx) * inverse, torch.where(on_side, 0.0, -dy.sign()), (oz + t * dz) * inverse)


def cone(ox, oy, oz, dx, dy, dz):
    radius, half = CONE
    slope = radius / (2 * half)                     # x^2 + z^2 = (slope * (half - y))^2
    below = half - oy
    a = _divisor(dx * dx + dz * dz - (slope * dy) ** 2)
    b = ox * dx + oz * dz + slope**2 * below * dy
    c = ox * ox + oz * oz - (slope * below) ** 2
    inside = b * b - a * c
    root = inside.clamp_min(0).sqrt()
    sides = [(-b - root) / a, (-b + root) / a]      # both: a steep ray has its entry at either root
    base = (-half - oy) / _divisor(dy)
    on_base = (ox + base * dx) ** 2 + (oz + base * dz) ** 2 <= radius**2
    sides = [_valid(s, (inside > 0) & ((oy + s * dy).abs() <= half)) for s in sides]
    t, which = torch.stack([*sides, _valid(base, on_base)]).min(0)
    x, y, z = ox + t * dx, slope**2 * (below - t * dy), oz + t * dz
    length = (x * x + y * y + z * z).sqrt().clamp_min(1e-6)
    on_side = which < 2
    return t, (x / length * on_side, torch.where(on_side, y / length, -1.0), z / length * on_side)


def torus(ox, oy, oz, dx, dy, dz, steps=24):
    """Sphere tracing inside the slab that holds the tube; the distance to a torus is exact, so no step overshoots."""
    ring, tube = TORUS
    a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - (ring + tube) ** 2
    inside = b * b - a * c
    middle, half = -oz / _divisor(dz), (tube / _divisor(dz)).abs()
    root = inside.clamp_min(0).sqrt()
    t = torch.maximum((-b - root) / a, middle - half).clamp_min(0)
    leave = torch.minimum((-b + root) / a, middle + half)
    near = ((inside > 0) & (t < leave)).nonzero()[:, 0]           # the rays that meet both; the others miss
    ox, oy, oz, dx, dy, dz, s, leave, speed = (v[near] for v in (ox, oy, oz, dx, dy, dz, t, leave, a.sqrt()))
    for _ in range(steps):
        x, y, z = ox + s * dx, oy + s * dy, oz + s * dz
        radial = torch.hypot(x, y)
        distance = torch.hypot(radial - ring, z) - tube
        s = s + distance / speed
    hit = (distance < 4e-3) & (s < leave) & (s > 0)
    t = torch.full_like(t, math.inf).index_put_((near,), torch.where(hit, s, math.inf))
    inward = ring / radial.clamp_min(1e-6)
    normal = torch.stack([x * (1 - inward), y * (1 - inward), z]) / (distance + tube).clamp_min(1e-6)
    return t, tuple(torch.zeros(3, len(t), dtype=t.dtype, device=t.device).index_copy_(1, near, normal))


def _ring(radius, height, axis=1, corners=8):
    """A circumscribed octagon: its hull holds the circle."""
    reach = radius / math.cos(math.pi / corners)
    angles = [2 * math.pi * i / corners for i in range(corners)]
    points = [[reach * math.cos(a), reach * math.sin(a)] for a in angles]
    return [p[:axis] + [height] + p[axis:] for p in points]


# enter: the function above; hull: points whose convex hull holds the solid; base: the centre's height above the floor
Solid = namedtuple("Solid", "enter hull base")
_EDGE = math.tan(math.pi / 8)               # an octagon turned about y holds the unit sphere
_W, _H = DIAMOND
SOLIDS = {
    "sphere": Solid(sphere, sum([_ring(1, y) + _ring(_EDGE, y / _EDGE) for y in (-_EDGE, _EDGE)], []), 1.0),
    "cube": Solid(cube, [*map(list, product((-CUBE, CUBE), repeat=3))], CUBE),
    "cylinder": Solid(cylinder, _ring(*CYLINDER) + _ring(CYLINDER[0], -CYLINDER[1]), CYLINDER[1]),
    "cone": Solid(cone, _ring(CONE[0], -CONE[1]) + [[0, CONE[1], 0]], CONE[1]),
    "torus": Solid(torus, _ring(sum(TORUS), TORUS[1], 2) + _ring(sum(TORUS), -TORUS[1], 2), sum(TORUS)),
    "diamond": Solid(diamond, [[_W, 0, 0], [-_W, 0, 0], [0, 0, _W], [0, 0, -_W], [0, _H, 0], [0, -_H, 0]], _H),
}
_MOST = max(len(solid.hull) for solid in SOLIDS.values())
HULLS = torch.tensor([(solid.hull * _MOST)[:_MOST] for solid in SOLIDS.values()])       # [6,P,3]: short ones repeat
