"""Cameras as maps of rays, and back: what models see of a camera that take and make pictures.

A ray has Pluecker coordinates: its direction d, of length 1, and its moment o x d, for any point o
on it. Maps of rays are square, on the middle of a picture. They are in the frame of the first
camera, whose axes are left, up and forward (those of camera.py: right, down, forward), as
OneDiffusion (arXiv 2411.16318) has them, from RayDiffusion (arXiv 2402.14817). Cameras are
world-to-camera matrices [V,3,4], as in camera.py.
"""

import math

import torch
import torch.nn.functional as F

from minipic.common import ParameterError
from minipic.world.camera import direction, directions, eyes, look_at, plucker
from minipic.world.metrics import camera_from_plucker
from minipic.world.tasks import relative

RAY_SCALE = 1.658  # brings rays to about unit variance
DISTANCE = 1.7  # of the first camera from what the cameras look at
# From camera.py's axes to those of rays, or back: left, up and forward, twice.
RAY_AXES = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, 1.0])[:, None, None]


def orbit(azimuth: float, elevation: float, distance: float = DISTANCE) -> torch.Tensor:
    """The world-to-camera matrix [3,4] of a camera that looks at the origin, angles in degrees."""
    return look_at(distance * direction(azimuth, elevation)[None], torch.zeros(3))[0]


def read_orbit(camera: str) -> torch.Tensor:
    """`orbit` of a text, "AZIMUTH,ELEVATION" in degrees."""
    try:
        azimuth, elevation = map(float, camera.split(","))
    except ValueError:
        raise ParameterError(
            "camera", f"{camera}: expected degrees of azimuth and elevation, such as 30,15"
            ) from None
    if not (abs(azimuth) < math.inf and abs(elevation) < 90):
        raise ParameterError("camera", f"{camera}: the elevation must be between -90 and 90")
    return orbit(azimuth, elevation)


def pinhole(focal: float, size: tuple[int, int]) -> torch.Tensor:
    """The matrix [3,3] of a camera with the axis in the middle. focal: in sides of the picture."""
    height, width = size
    f = focal * min(size)
    return torch.tensor([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]])


def grid_matrix(intrinsic: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """A pin-hole matrix in pixels -> in cells of a grid [side,side] on the picture's middle."""
    height, width = size
    corner = torch.tensor([width - min(size), height - min(size)]) / 2
    scaled = intrinsic.clone()
    scaled[:2, 2] -= corner
    scaled[:2] *= side / min(size)
    return scaled


def rays_of_cameras(
        cameras: torch.Tensor, intrinsic: torch.Tensor, size: tuple[int, int],
        side: int) -> torch.Tensor:
    """World-to-camera matrices [V,3,4] -> Pluecker rays [V,6,side,side], direction and moment.

    They are in the frame of the first camera, whose axes are left, up and forward.
    """
    from_first = relative(cameras[None])[0]
    rays = plucker(from_first, grid_matrix(intrinsic, size, side), (side, side))
    moment, toward = rays.chunk(2, dim=1)
    return torch.cat([toward, moment], dim=1) * RAY_AXES


def cameras_of_rays(
        rays: torch.Tensor, intrinsic: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `rays_of_cameras`, by least squares: the first camera is the world's frame.

    A centre is the point nearest to all rays. A rotation is the one that turns a camera's own
    directions best into those of its rays.
    """
    toward, moment = (rays.cpu().float() * RAY_AXES).chunk(2, dim=1)
    centres = camera_from_plucker(torch.cat([moment, toward], dim=1)).float()
    side = rays.shape[-1]
    own = directions(torch.eye(3, 4)[None], grid_matrix(intrinsic, size, side), (side, side))
    own = F.normalize(own, dim=1).flatten(2)
    rotation = nearest_rotation(own @ F.normalize(toward, dim=1).flatten(2).mT)
    return torch.cat([rotation, -rotation @ centres[:, :, None]], dim=2)


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """The rotations R [B,3,3] with the largest trace(R^T M): sum a b^T for M turns b into a."""
    u, _, vt = torch.linalg.svd(matrix)
    sign = torch.linalg.det(u @ vt)
    u = torch.cat([u[:, :, :2], u[:, :, 2:] * sign[:, None, None]], dim=2)  # no reflection
    return u @ vt


def at_distance(cameras: torch.Tensor, distance: float = DISTANCE) -> torch.Tensor:
    """Cameras [V,3,4] in a world scaled so that the first is this far from what they look at.

    That is the point nearest to all their axes. ParameterError where there is none.
    """
    centres = eyes(cameras)
    axes = cameras[:, 2, :3]
    moments = torch.linalg.cross(centres, axes, dim=1)
    lines = torch.cat([moments, axes], dim=1).T[None, :, None]  # [1,6,1,V]
    if torch.linalg.matrix_rank(axes, rtol=1e-3) < 2:
        raise ParameterError("cameras", "look in the same direction, so at no common point")
    middle = camera_from_plucker(lines)[0].to(cameras)
    scale = distance / (middle - centres[0]).norm()
    return torch.cat([cameras[:, :, :3], cameras[:, :, 3:] * scale], dim=2)


def ray_frames(rays: torch.Tensor, channels: int) -> torch.Tensor:
    """Rays [V,6,n,n] -> frames [V,C,n,n], or [V,C,2n,2n] where 6 numbers exceed the channels.

    The six are repeated until the channels, or those of a patch of 2x2, are full.
    """
    numbers = channels if channels >= 6 else 4 * channels
    copies = math.ceil(numbers / 6)
    frames = RAY_SCALE * rays.repeat(1, copies, 1, 1)[:, :numbers]
    return frames if channels >= 6 else F.pixel_shuffle(frames, 2)


def rays_of_frames(frames: torch.Tensor) -> torch.Tensor:
    """The inverse of `ray_frames`: the mean of the copies."""
    if frames.shape[1] < 6:
        frames = F.pixel_unshuffle(frames, 2)
    means = [frames[:, i::6].mean(1) for i in range(6)]
    return torch.stack(means, dim=1) / RAY_SCALE


def frames_of_cameras(
        cameras: torch.Tensor, focal: float, channels: int, side: int) -> torch.Tensor:
    """World-to-camera matrices [V,3,4] of square pictures -> ray frames [V,C,side,side]."""
    grid = side if channels >= 6 else side // 2
    return ray_frames(rays_of_cameras(cameras, pinhole(focal, (1, 1)), (1, 1), grid), channels)


def cameras_of_frames(frames: torch.Tensor, focal: float) -> torch.Tensor:
    """The inverse of `frames_of_cameras`: the first camera is the world's frame."""
    rays = rays_of_frames(frames.float().cpu())
    return cameras_of_rays(rays, pinhole(focal, (1, 1)), (1, 1))


def describe_cameras(cameras: torch.Tensor) -> list[str]:
    """A line for each camera [V,3,4]: where it is and where it looks, in the axes of rays."""
    axes = RAY_AXES[:3, 0, 0]
    lines = []
    for number, (eye, toward) in enumerate(zip(eyes(cameras), cameras[:, 2, :3]), 1):
        place = ", ".join(f"{value:.2f}" for value in (eye * axes).tolist())
        looks = ", ".join(f"{value:.2f}" for value in (toward * axes).tolist())
        lines.append(
            f"view {number}: at ({place}), looks along ({looks}); left, up, forward of view 1")
    return lines
