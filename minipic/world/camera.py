"""Pin-hole cameras that look at the middle of the world: matrices, projection, rays through pixels.

Three frames of coordinates:
    the world: x to the right, y up, z towards a viewer at azimuth 0; the floor is the plane y = 0
    a camera: x to the right, y down, z forward, as in OpenCV
    a picture: x to the right and y down, in pixels; the centre of the first pixel is (0.5, 0.5)
The size of a picture is (height, width).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FOCAL = 1.6  # focal length in units of the picture's shorter side: a view of about 35 degrees
TARGET = 1.1  # a camera looks at this height above the middle of the floor, in world units


@dataclass(frozen=True)
class Camera:
    """Where a camera stands. It looks at the point (0, TARGET, 0) and never rolls."""

    azimuth: float = 0.0  # degrees, counter-clockwise seen from above
    elevation: float = 25.0  # degrees above the floor
    distance: float = 6.6  # from the middle of the floor, in world units


def direction(azimuth: float, elevation: float) -> torch.Tensor:
    """The unit vector [3] from the world's middle towards (azimuth, elevation), in degrees."""
    a = math.radians(azimuth)
    e = math.radians(elevation)
    return torch.tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])


def extrinsics(cameras: list[Camera]) -> torch.Tensor:
    """World-to-camera matrices [B,3,4]: a rotation (rows right, down, forward), a translation."""
    eye = torch.stack([c.distance * direction(c.azimuth, c.elevation) for c in cameras])
    return look_at(eye, torch.tensor([0, TARGET, 0]))


def look_at(eye: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Matrices as `extrinsics` of cameras at eye [B,3] that look at target [3] and do not roll."""
    forward = F.normalize(target - eye, dim=1)
    level = torch.zeros(len(eye))  # "right" is horizontal: the camera does not roll
    right = F.normalize(torch.stack([-forward[:, 2], level, forward[:, 0]], dim=1), dim=1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=1)
    translation = -rotation @ eye[:, :, None]
    return torch.cat([rotation, translation], dim=2)


@functools.lru_cache(maxsize=4096)
def extrinsic_of(camera: Camera) -> torch.Tensor:
    """The world-to-camera matrix [3,4] of one camera; kept, for one scene needs it many times."""
    return extrinsics([camera])[0]


def intrinsics(size: tuple[float, float]) -> torch.Tensor:
    """The pin-hole matrix [3,3] of a picture of this size (height, width), in pixels."""
    height, width = size
    focal = FOCAL * min(size)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def project(points: torch.Tensor, extrinsic: torch.Tensor,
            intrinsic: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """World points [..., P, 3], cameras [..., 3, 4] -> pixels [..., P, 2] and depth [..., P]."""
    rotation = extrinsic[..., :3]
    translation = extrinsic[..., None, :, 3]
    in_camera = points @ rotation.transpose(-1, -2) + translation
    depth = in_camera[..., 2].clamp_min(1e-3)
    focal = intrinsic[0, 0]
    middle = intrinsic[:2, 2]
    return in_camera[..., :2] / depth[..., None] * focal + middle, depth


def directions(extrinsic: torch.Tensor, intrinsic: torch.Tensor,
               size: tuple[int, int]) -> torch.Tensor:
    """Directions [B,3,H,W], in the world, of the rays through the pixels' centres.

    Their length along the camera's axis is 1: the point at depth t on a ray is eye + t * direction.
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    right = (x - intrinsic[0, 2]) / intrinsic[0, 0]
    down = (y - intrinsic[1, 2]) / intrinsic[1, 1]
    in_camera = torch.stack([right, down, torch.ones_like(x)])
    to_world = extrinsic[:, :, :3].transpose(1, 2)
    return (to_world @ in_camera.flatten(1)).unflatten(2, size)


def eyes(extrinsic: torch.Tensor) -> torch.Tensor:
    """The centres [B,3] of cameras [B,3,4], in the world."""
    to_world = extrinsic[:, :, :3].transpose(1, 2)
    translation = extrinsic[:, :, 3:]
    return -(to_world @ translation)[:, :, 0]


def plucker(extrinsic: torch.Tensor, intrinsic: torch.Tensor,
            size: tuple[int, int]) -> torch.Tensor:
    """Pluecker coordinates [B,6,H,W] of the pixels' rays: moment (centre x direction), direction.

    Directions have length 1 here.
    """
    toward = directions(extrinsic, intrinsic, size)
    toward = toward / toward.norm(dim=1, keepdim=True)
    centre = eyes(extrinsic)[:, :, None, None].expand_as(toward)
    moment = torch.linalg.cross(centre, toward, dim=1)
    return torch.cat([moment, toward], dim=1)
