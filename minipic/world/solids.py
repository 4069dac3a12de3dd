"""The unit solids of the world: where a ray enters each, the normal there, and a hull around it.

A ray is six flat tensors [N], its origin (ox, oy, oz) and its direction (dx, dy, dz), in the
solid's own frame: y up, the centre at the origin, the largest half extent about 1. Directions may
have any length.

The function of a solid returns (t, normal). The ray enters at origin + t * direction; t [N] is inf
where it misses. `normal` is three tensors [N], together of length 1; it means nothing where the ray
misses.

Sphere, cylinder and cone are quadrics: a ray meets them where a t^2 + 2 b t + c = 0, so at
t = (-b -+ sqrt(b^2 - a c)) / a, and misses where the discriminant b^2 - a c is not positive.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CUBE = 0.8  # half an edge
CYLINDER = (0.72, 0.85)  # radius, half height
CONE = (0.9, 0.95)  # radius of the base, half height
TORUS = (0.66, 0.34)  # radius of the ring, radius of the tube; it stands upright, its axis is z
DIAMOND = (0.85, 1.05)  # half width, half height of an octahedron that stands on its tip

TORUS_STEPS = 24
TORUS_TOLERANCE = 4e-3  # a ray this near to the torus after the last step has hit it

Hit = tuple[Tensor, tuple[Tensor, ...]]  # t, normal


def _nonzero(x):
    """x with its zeros moved a little: a ray parallel to a face meets it, but very far away."""
    return torch.where(x == 0, torch.full_like(x, 1e-12), x)


def _inf_unless(hits, t):
    """t where the ray hits, in front of its origin; inf elsewhere."""
    return torch.where(hits & (t > 0), t, math.inf)


# ---- the six solids ----------------------------------------------------------------------------

def sphere(
        ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - 1
    discriminant = b * b - a * c
    t = (-b - discriminant.clamp_min(0).sqrt()) / a
    t = _inf_unless(discriminant > 0, t)
    return t, (ox + t * dx, oy + t * dy, oz + t * dz)  # the point: it is its own normal


def cube(*ray: Tensor) -> Hit:
    w = 1 / CUBE
    return _slabs([(w, 0, 0), (0, w, 0), (0, 0, w)], *ray)


def diamond(*ray: Tensor) -> Hit:
    half_width, half_height = DIAMOND
    w = 1 / half_width
    h = 1 / half_height
    return _slabs([(w, h, w), (-w, h, w), (w, h, -w), (-w, h, -w)], *ray)


def _slabs(planes, ox, oy, oz, dx, dy, dz):
    """The convex solid |plane . point| <= 1 for every plane: the slab method (Kay and Kajiya 1986).

    Each pair of parallel planes cuts an interval out of the ray. The ray is inside the solid where
    all the intervals overlap: from the last entry to the first exit.
    """
    signs = []
    for i, (px, py, pz) in enumerate(planes):
        inverse = 1 / _nonzero(px * dx + py * dy + pz * dz)
        middle = -(px * ox + py * oy + pz * oz) * inverse
        half = inverse.abs()
        near = middle - half
        far = middle + half
        signs.append(-inverse.sign())  # the ray enters through the plane that faces it
        if i == 0:
            enter = near
            leave = far
            face = torch.zeros_like(dx, dtype=torch.long)
        else:
            face = torch.where(near > enter, i, face)
            enter = torch.maximum(enter, near)
            leave = torch.minimum(leave, far)
    normals = torch.tensor(planes, dtype=dx.dtype, device=dx.device)
    normals = normals / normals.norm(dim=1, keepdim=True)
    sign = torch.stack(signs).gather(0, face[None])[0, :, None]
    normal = normals[face] * sign
    return _inf_unless(enter < leave, enter), normal.unbind(1)


def cylinder(
        ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    radius, half = CYLINDER
    a = _nonzero(dx * dx + dz * dz)
    b = ox * dx + oz * dz
    c = ox * ox + oz * oz - radius**2
    discriminant = b * b - a * c
    side = (-b - discriminant.clamp_min(0).sqrt()) / a
    on_side = (discriminant > 0) & ((oy + side * dy).abs() <= half)
    cap = (-dy.sign() * half - oy) / _nonzero(dy)  # of the two caps the one that faces the ray
    on_cap = (ox + cap * dx) ** 2 + (oz + cap * dz) ** 2 <= radius**2
    t, which = torch.stack([_inf_unless(on_side, side), _inf_unless(on_cap, cap)]).min(0)
    enters_side = which == 0
    inverse = enters_side / radius  # 1 / radius on the side, 0 on a cap
    normal_x = (ox + t * dx) * inverse
    normal_y = torch.where(enters_side, 0.0, -dy.sign())
    normal_z = (oz + t * dz) * inverse
    return t, (normal_x, normal_y, normal_z)


def cone(
        ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    """The side is x^2 + z^2 = (slope * below)^2, where `below` is the depth below the tip."""
    radius, half = CONE
    slope = radius / (2 * half)
    below = half - oy
    a = _nonzero(dx * dx + dz * dz - (slope * dy) ** 2)
    b = ox * dx + oz * dz + slope**2 * below * dy
    c = ox * ox + oz * oz - (slope * below) ** 2
    discriminant = b * b - a * c
    root = discriminant.clamp_min(0).sqrt()
    base = (-half - oy) / _nonzero(dy)
    on_base = (ox + base * dx) ** 2 + (oz + base * dz) ** 2 <= radius**2
    candidates = []
    for side in ((-b - root) / a, (-b + root) / a):  # both: a steep ray enters at either root
        on_side = (discriminant > 0) & ((oy + side * dy).abs() <= half)
        candidates.append(_inf_unless(on_side, side))
    candidates.append(_inf_unless(on_base, base))
    t, which = torch.stack(candidates).min(0)
    enters_side = which < 2
    x = ox + t * dx  # (x, y, z) is the side's normal, half the gradient of its equation
    y = slope**2 * (below - t * dy)
    z = oz + t * dz
    length = (x * x + y * y + z * z).sqrt().clamp_min(1e-6)
    normal_y = torch.where(enters_side, y / length, -1.0)
    return t, (x / length * enters_side, normal_y, z / length * enters_side)


def torus(
        ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor) -> Hit:
    """By sphere tracing (Hart 1996): the distance to a torus is known; a step that long is safe.

    Only rays that meet both a sphere around the torus and the slab |z| <= tube are traced.
    """
    ring, tube = TORUS
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - (ring + tube) ** 2
    discriminant = b * b - a * c
    root = discriminant.clamp_min(0).sqrt()
    middle = -oz / _nonzero(dz)
    half = (tube / _nonzero(dz)).abs()
    enter = torch.maximum((-b - root) / a, middle - half).clamp_min(0)
    leave = torch.minimum((-b + root) / a, middle + half)

    traced = ((discriminant > 0) & (enter < leave)).nonzero()[:, 0]
    ox = ox[traced]
    oy = oy[traced]
    oz = oz[traced]
    dx = dx[traced]
    dy = dy[traced]
    dz = dz[traced]
    t = enter[traced]
    speed = a.sqrt()[traced]
    for _ in range(TORUS_STEPS):
        x = ox + t * dx
        y = oy + t * dy
        z = oz + t * dz
        radial = torch.hypot(x, y)
        distance = torch.hypot(radial - ring, z) - tube
        t = t + distance / speed
    hit = (distance < TORUS_TOLERANCE) & (t < leave[traced]) & (t > 0)
    # the normal points away from the nearest point of the ring, which is (x, y, 0) * to_ring
    to_ring = ring / radial.clamp_min(1e-6)
    from_ring = torch.stack([x * (1 - to_ring), y * (1 - to_ring), z])
    normal = from_ring / (distance + tube).clamp_min(1e-6)

    all_t = torch.full_like(enter, math.inf).index_put_((traced,), torch.where(hit, t, math.inf))
    all_normals = torch.zeros(3, len(enter), dtype=enter.dtype, device=enter.device)
    return all_t, tuple(all_normals.index_copy_(1, traced, normal))


# ---- the table of solids -----------------------------------------------------------------------

class Solid(NamedTuple):
    """One of SOLIDS."""

    enter: Callable  # one of the functions above
    hull: list[list[float]]  # points whose convex hull holds the solid
    base: float  # height of the centre above the floor that the solid stands on


def _octagon(radius, height, axis=1, corners=8):
    """The corners of an octagon around a circle: its axis is 0 x, 1 y or 2 z, at `height` on it."""
    reach = radius / math.cos(math.pi / corners)
    points = []
    for i in range(corners):
        angle = 2 * math.pi * i / corners
        point = [reach * math.cos(angle), reach * math.sin(angle)]
        point.insert(axis, height)
        points.append(point)
    return points


def _sphere_hull():
    """The octagon around the unit circle, turned about the vertical, holds the unit sphere."""
    edge = math.tan(math.pi / 8)  # half an edge of the octagon around the unit circle
    points = []
    for sign in (-1, 1):
        points += _octagon(1, sign * edge)
        points += _octagon(edge, sign * 1.0)
    return points


def _cylinder_hull():
    radius, half = CYLINDER
    return _octagon(radius, half) + _octagon(radius, -half)


def _cone_hull():
    radius, half = CONE
    return _octagon(radius, -half) + [[0, half, 0]]


def _torus_hull():
    ring, tube = TORUS
    return _octagon(ring + tube, tube, axis=2) + _octagon(ring + tube, -tube, axis=2)


def _diamond_hull():
    w, h = DIAMOND
    return [[w, 0, 0], [-w, 0, 0], [0, 0, w], [0, 0, -w], [0, h, 0], [0, -h, 0]]


def _cube_hull():
    return [list(corner) for corner in product((-CUBE, CUBE), repeat=3)]


SOLIDS = {
    "sphere": Solid(sphere, _sphere_hull(), 1.0),
    "cube": Solid(cube, _cube_hull(), CUBE),
    "cylinder": Solid(cylinder, _cylinder_hull(), CYLINDER[1]),
    "cone": Solid(cone, _cone_hull(), CONE[1]),
    "torus": Solid(torus, _torus_hull(), sum(TORUS)),
    "diamond": Solid(diamond, _diamond_hull(), DIAMOND[1]),
}


def _hulls_of_one_length():
    """All hulls as one tensor [6,P,3]. A hull with fewer points repeats them."""
    longest = max(len(solid.hull) for solid in SOLIDS.values())
    hulls = []
    for solid in SOLIDS.values():
        repeated = solid.hull * longest
        hulls.append(repeated[:longest])
    return torch.tensor(hulls)


HULLS = _hulls_of_one_length()
