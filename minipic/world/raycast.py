"""The ray caster: poses of solids and one camera ray per sample in, the nearest surface and its shadow out.

Everything is flat over the rays of a batch of pictures. Only rays inside a solid's projected box are tested against
it, so the work follows the pictured area (a z-buffer over candidate pairs), not rays times solids.
"""

import math
from dataclasses import dataclass

import torch

from minipic.world.solids import SOLIDS

_ENTER = [solid.enter for solid in SOLIDS.values()]
_GRAZE = 1e-3           # shadow rays start this far above the surface, in world units


@dataclass
class Bodies:
    """K solids of B pictures, sorted by shape: `shape` and `picture` [K]; `pose` [6,K]: centre x y z, cos and sin of
    the turn, 1 / radius."""
    shape: torch.Tensor
    picture: torch.Tensor
    pose: torch.Tensor


@dataclass
class Surface:
    """What R rays meet: `depth` [R] (inf: sky), `body` [R] (row of Bodies, -1: floor or sky), and in the world `point`
    and `normal` [3,R]; `local` [3,R] is the point in the solid's own frame; `lit` [R] the light, 0 to 1."""
    depth: torch.Tensor
    body: torch.Tensor
    point: torch.Tensor
    normal: torch.Tensor
    local: torch.Tensor
    lit: torch.Tensor


def pairs(boxes, picture, size):
    """Every (body, ray) with the ray inside the body's pixel box: boxes [K,4] x0 y0 x1 y1 (end exclusive), long."""
    wide, tall = (boxes[:, 2] - boxes[:, 0]).clamp_min(0), (boxes[:, 3] - boxes[:, 1]).clamp_min(0)
    count = wide * tall
    body = torch.repeat_interleave(torch.arange(len(boxes)), count)
    start = (picture * size[0] + boxes[:, 1]) * size[1] + boxes[:, 0]        # the box's first ray
    within = torch.arange(len(body)) - (count.cumsum(0) - count)[body]
    line = torch.div(within, wide[body], rounding_mode="floor")
    return body, start[body] + within + line * (size[1] - wide[body])


def _turn_in(pose, x, y, z):
    """World vectors -> the solids' frames (pose rows gathered per ray)."""
    _, _, _, c, s, inverse = pose
    return (c * x - s * z) * inverse, y * inverse, (s * x + c * z) * inverse


def _meet(bodies, body, origin, toward):
    """Distances t [N] and normals [3,N] in the solids' frames; `body` [N] is sorted by shape."""
    pose = bodies.pose.index_select(1, body)
    o = _turn_in(pose, *(origin[i] - pose[i] for i in range(3)))
    d = _turn_in(pose, *toward)
    found, at = [], 0
    for enter, count in zip(_ENTER, torch.bincount(bodies.shape[body], minlength=len(_ENTER)).tolist()):
        if count:
            t, normal = enter(*(v[at:at + count] for v in (*o, *d)))
            found.append(torch.stack([t, *normal]))
            at += count
    found = torch.cat(found, 1) if found else torch.empty(4, 0)
    return found[0], found[1:], o, d


def cast(bodies, boxes, eye, rays, size):
    """The nearest surface along every ray. eye [B,3]; rays [3,R] with unit component along the view, R = B h w;
    boxes [K,4] must hold the solids' pictures."""
    per = size[0] * size[1]
    eye = eye.T.repeat_interleave(per, 1)
    depth = torch.where(rays[1] < 0, -eye[1] / rays[1], math.inf)
    body, ray = pairs(boxes, bodies.picture, size)
    t, normal, o, d = _meet(bodies, body, eye.index_select(1, ray), rays.index_select(1, ray))
    depth = depth.scatter_reduce(0, ray, t, "amin")
    won = ((t == depth[ray]) & (t < math.inf)).nonzero()[:, 0]
    body, ray, t = body[won], ray[won], t[won]
    _, _, _, c, s, _ = bodies.pose.index_select(1, body)
    x, y, z = normal.index_select(1, won)
    whose = torch.full((len(depth),), -1).index_copy_(0, ray, body)
    normals = torch.zeros_like(rays)
    normals[1] = (depth < math.inf).to(rays.dtype)
    normals = normals.index_copy_(1, ray, torch.stack([c * x + s * z, y, c * z - s * x]))
    local = torch.zeros_like(rays).index_copy_(1, ray, torch.stack([o[i][won] + t * d[i][won] for i in range(3)]))
    point = eye + torch.where(depth < math.inf, depth, 0.0) * rays
    return Surface(depth, whose, point, normals, local, torch.ones_like(depth))


def shine(surface, bodies, boxes, light, size):
    """Fill `surface.lit`: the cosine of the light's angle, 0 in cast shadow. light [3,R]: unit vectors to the light;
    boxes [K,4] must hold the pictures of the solids' shadow volumes."""
    lit = (surface.normal * light).sum(0).clamp_min(0)
    body, ray = pairs(boxes, bodies.picture, size)
    matter = ((surface.body[ray] != body) & (lit[ray] > 0)).nonzero()[:, 0]      # the others are dark or self already
    body, ray = body[matter], ray[matter]
    start = surface.point.index_select(1, ray) + _GRAZE * surface.normal.index_select(1, ray)
    t, *_ = _meet(bodies, body, start, light.index_select(1, ray))
    surface.lit = lit.index_fill(0, ray[t < math.inf], 0.0)
