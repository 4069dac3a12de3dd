"""The ray caster: solids and camera rays in, the nearest surfaces and the sunlight on them out.

The rays of a batch of pictures form one flat list of R = B * height * width: picture by picture,
row by row. A solid is tested only against the rays in a box around its projection (`candidates`).
So the work grows with the area that solids cover in the pictures, not with rays times solids.
"""

import math
from dataclasses import dataclass

import torch

from minipic.world.solids import SOLIDS

_ENTER_FUNCTIONS = [solid.enter for solid in SOLIDS.values()]
_LIFT = 1e-3  # a shadow ray starts this far above its surface, so as not to meet it again


@dataclass
class Bodies:
    """K solids of B pictures, sorted by shape. A "body" is a row of this table."""

    shape: torch.Tensor  # [K] which of SOLIDS
    picture: torch.Tensor  # [K] in which picture of the batch
    pose: torch.Tensor  # [6,K]: centre x y z in the world, cosine and sine of the turn, 1 / radius


@dataclass
class Surface:
    """What each of R rays meets."""

    depth: torch.Tensor  # [R] along the camera's axis, in world units; inf in the sky
    body: torch.Tensor  # [R] row of Bodies; -1 for the floor and the sky
    point: torch.Tensor  # [3,R] in the world
    normal: torch.Tensor  # [3,R] in the world; 0 in the sky
    local: torch.Tensor  # [3,R] the point in the solid's own frame; 0 outside the solids
    lit: torch.Tensor  # [R] sunlight, 0 to 1; `cast_shadows` fills it in


def cast_rays(bodies: Bodies, boxes: torch.Tensor, eye: torch.Tensor, rays: torch.Tensor,
              size: tuple[int, int]) -> Surface:
    """The nearest surface along every ray.

    boxes [K,4]: a box around each solid's projection, see `candidates`
    eye [B,3]: the cameras' centres
    rays [3,R]: the rays' directions, of length 1 along the camera's axis, see camera.directions
    size: (height, width) of each picture
    """
    rays_of_a_picture = size[0] * size[1]
    eye = eye.T.repeat_interleave(rays_of_a_picture, 1)
    floor_depth = torch.where(rays[1] < 0, -eye[1] / rays[1], math.inf)

    body, ray = candidates(boxes, bodies.picture, size)
    t, normal, origin, toward = _enter_solids(
        bodies, body, eye.index_select(1, ray), rays.index_select(1, ray))
    depth = floor_depth.scatter_reduce(0, ray, t, "amin")

    # of a ray's candidates, the one that gave the least depth is visible
    visible = ((t == depth[ray]) & (t < math.inf)).nonzero()[:, 0]
    body = body[visible]
    ray = ray[visible]
    body_of_ray = torch.full((len(depth),), -1).index_copy_(0, ray, body)
    t = t[visible]
    local_point = torch.stack([origin[i][visible] + t * toward[i][visible] for i in range(3)])
    local = torch.zeros_like(rays).index_copy_(1, ray, local_point)

    normals = torch.zeros_like(rays)
    normals[1] = (depth < math.inf).to(rays.dtype)  # the floor's normal is (0, 1, 0)
    _, _, _, cos, sin, _ = bodies.pose.index_select(1, body)
    x, y, z = normal.index_select(1, visible)
    world_normal = torch.stack([cos * x + sin * z, y, cos * z - sin * x])
    normals = normals.index_copy_(1, ray, world_normal)

    point = eye + torch.where(depth < math.inf, depth, 0.0) * rays
    return Surface(depth, body_of_ray, point, normals, local, lit=torch.ones_like(depth))


def cast_shadows(surface: Surface, bodies: Bodies, boxes: torch.Tensor, light: torch.Tensor,
                 size: tuple[int, int]):
    """Fill in surface.lit: the cosine between normal and light, 0 where a solid is in the way.

    boxes [K,4]: a box around each solid and its shadow, see `candidates`
    light [3,R]: unit vectors to the light
    """
    lit = (surface.normal * light).sum(0).clamp_min(0)
    body, ray = candidates(boxes, bodies.picture, size)
    # Points that face away from the light are dark already. A solid's shadow on itself is left out:
    # only a torus casts one.
    undecided = ((surface.body[ray] != body) & (lit[ray] > 0)).nonzero()[:, 0]
    body = body[undecided]
    ray = ray[undecided]
    start = surface.point.index_select(1, ray) + _LIFT * surface.normal.index_select(1, ray)
    t, _, _, _ = _enter_solids(bodies, body, start, light.index_select(1, ray))
    surface.lit = lit.index_fill(0, ray[t < math.inf], 0.0)


def candidates(boxes: torch.Tensor, picture: torch.Tensor,
               size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of a body and a ray that goes through the body's box: two tensors of integers.

    boxes [K,4]: x0 y0 x1 y1 in whole pixels, the end exclusive. picture [K]: which it is in.
    """
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(1)
    box_width = (x1 - x0).clamp_min(0)
    box_height = (y1 - y0).clamp_min(0)
    count = box_width * box_height
    body = torch.repeat_interleave(torch.arange(len(boxes)), count)
    first_of_body = count.cumsum(0) - count
    number = torch.arange(len(body)) - first_of_body[body]  # of the ray within its box
    row = torch.div(number, box_width[body], rounding_mode="floor")
    first_ray = (picture * height + y0) * width + x0
    # from row to row of a box a ray's number grows by `width`; `number` grows by box_width alone
    ray = first_ray[body] + number + row * (width - box_width[body])
    return body, ray


def _enter_solids(bodies, body, origin, toward):
    """Where N rays enter the solids body [N], which are sorted by shape.

    origin, toward [3,N]: the rays, in the world.
    -> t [N], and in the solids' own frames the normals [3,N] and the rays' origins and directions,
    three tensors [N] each.
    """
    pose = bodies.pose.index_select(1, body)
    from_centre = origin - pose[:3]
    origin = _to_local(pose, *from_centre)
    toward = _to_local(pose, *toward)
    counts = torch.bincount(bodies.shape[body], minlength=len(_ENTER_FUNCTIONS)).tolist()
    parts = [torch.empty(4, 0)]  # in case there are no rays
    start = 0
    for enter, count in zip(_ENTER_FUNCTIONS, counts):
        if count == 0:
            continue
        rays = [v[start:start + count] for v in (*origin, *toward)]
        t, normal = enter(*rays)
        parts.append(torch.stack([t, *normal]))
        start += count
    t_and_normal = torch.cat(parts, dim=1)
    return t_and_normal[0], t_and_normal[1:], origin, toward


def _to_local(pose, x, y, z):
    """World vectors in the solids' own frames: turned back and scaled by 1 / radius. pose [6,N]."""
    _, _, _, cos, sin, inverse_radius = pose
    local_x = (cos * x - sin * z) * inverse_radius
    local_y = y * inverse_radius
    local_z = (sin * x + cos * z) * inverse_radius
    return local_x, local_y, local_z
