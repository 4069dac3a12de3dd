"""Pin-hole cameras around the world's middle: matrices, projection and Pluecker rays.

Picture convention: x right, y down, z forward; pixel centres at +0.5. World: y up, z towards the viewer at azimuth 0.
"""

import functools
import math
from dataclasses import dataclass

import torch

FOCAL = 1.6                 # in units of the picture's shorter side: a view of about 35 degrees
TARGET = 1.1                # the camera looks at this height above the middle of the floor


@dataclass(frozen=True)
class Camera:
    azimuth: float = 0.0    # degrees, counter-clockwise seen from above
    elevation: float = 25.0
    distance: float = 6.6   # from the middle of the floor


def direction(azimuth, elevation):
    """The unit vector [3] that points from the world's middle to (azimuth, elevation), in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])


def extrinsics(cameras):
    """World-to-camera [B,3,4]: rotation (rows right, down, forward) and translation."""
    eye = torch.stack([c.distance * direction(c.azimuth, c.elevation) for c in cameras])
    forward = torch.nn.functional.normalize(torch.tensor([0, TARGET, 0]) - eye, dim=1)
    right = torch.nn.functional.normalize(torch.stack([-forward[:, 2], torch.zeros(len(eye)), forward[:, 0]], 1), dim=1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    return torch.cat([rotation, -rotation @ eye[:, :, None]], 2)


@functools.lru_cache(maxsize=4096)
def extrinsic_of(camera):
    """World-to-camera [3,4] of one camera; a scene is placed and told by many looks through the same."""
    return extrinsics([camera])[0]


def intrinsics(size):
    """The pin-hole matrix [3,3] in pixels for a picture of size (H, W); a pixel's centre is at +0.5."""
    focal = FOCAL * min(size)
    return torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]])


def project(points, extrinsic, intrinsic):
    """World points [..., P, 3] -> pixels [..., P, 2] and depth [..., P]."""
    seen = points @ extrinsic[..., :3].transpose(-1, -2) + extrinsic[..., None, :, 3]
    depth = seen[..., 2].clamp_min(1e-3)
    return seen[..., :2] / depth[..., None] * intrinsic[0, 0] + intrinsic[:2, 2], depth


def directions(extrinsic, intrinsic, size):
    """World directions [B,3,H,W] through the pixels' centres, of unit length along the view."""
    v, u = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    grid = torch.stack([(u - intrinsic[0, 2]) / intrinsic[0, 0], (v - intrinsic[1, 2]) / intrinsic[1, 1],
                        torch.ones_like(u)])
    return (extrinsic[:, :, :3].transpose(1, 2) @ grid.flatten(1)).unflatten(2, size)


def eyes(extrinsic):
    """The camera centres [B,3] in the world."""
    return -(extrinsic[:, :, :3].transpose(1, 2) @ extrinsic[:, :, 3:])[:, :, 0]


def plucker(extrinsic, intrinsic, size):
    """Pluecker coordinates of every pixel's ray [B,6,H,W]: moment (centre x direction), unit direction."""
    toward = directions(extrinsic, intrinsic, size)
    toward = toward / toward.norm(dim=1, keepdim=True)
    centre = eyes(extrinsic)[:, :, None, None].expand_as(toward)
    return torch.cat([torch.linalg.cross(centre, toward, dim=1), toward], 1)
