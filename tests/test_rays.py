"""Maps of rays: the official program's numbers for the same cameras, and the way back."""

import pytest
import torch
from safetensors.torch import load_file

import peers
from minipic.common import ParameterError
from minipic.world.camera import eyes
from minipic.world.metrics import camera_from_plucker
from minipic.world.rays import (
    at_distance, cameras_of_rays, nearest_rotation, orbit, pinhole, rays_of_cameras)
from minipic.world.tasks import TASKS, relative

GOLDEN = {key.removeprefix("rays."): value for key, value in
          load_file(peers.GOLDENS / "onediffusion.safetensors").items() if key.startswith("rays.")}
SQUARE = (1, 1)
FLIP = torch.tensor([-1.0, -1.0, 1.0])  # from right, down, forward to left, up, forward


def golden_cameras(name):
    """(world-to-camera matrices, pin-hole matrix, (height, width)) of a set of cameras."""
    pose = GOLDEN[f"{name}.c2w_opengl"].double()
    pose[:, :3, 1:3] *= -1  # OpenGL's camera looks along -z, and its y is up
    height, width = GOLDEN[f"{name}.image_size_hw"][0].int().tolist()
    return pose.inverse()[:, :3].float(), GOLDEN[f"{name}.K"][0], (height, width)


@pytest.mark.parametrize("name", [
    "orbit", "generic", "nonorm_nonsquare", "dataset_norm_square", "dataset_norm_nonsquare"])
def test_rays_are_the_official_ones(name):
    cameras, intrinsic, size = golden_cameras(name)
    if name.startswith("dataset_norm"):  # as in training: the first camera is at distance 1.7
        cameras = at_distance(cameras)
    expected = GOLDEN[f"{name}.rays_FHW6"].permute(0, 3, 1, 2)
    rays = rays_of_cameras(cameras, intrinsic, size, expected.shape[-1])
    torch.testing.assert_close(rays, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        rays[:, :3].norm(dim=1), torch.ones_like(rays[:, 0]), rtol=0, atol=1e-6)
    assert (rays[:, :3] * rays[:, 3:]).sum(1).abs().max() < 1e-5
    again = cameras_of_rays(rays, intrinsic, size)
    torch.testing.assert_close(again, relative(cameras[None])[0], rtol=0, atol=2e-5)


def test_an_orbit_is_the_official_one():
    """The six cameras of the set "orbit", by their angles, and where they are and look."""
    angles = ((0, 0), (30, 0), (90, 0), (180, 0), (0, 30), (30, 20))
    cameras = torch.stack([orbit(*pair, distance=1.5) for pair in angles])
    rays = rays_of_cameras(cameras, pinhole(1.3887, SQUARE), SQUARE, 8)
    torch.testing.assert_close(
        rays, GOLDEN["orbit.rays_FHW6"].permute(0, 3, 1, 2), rtol=0, atol=2e-6)
    found = cameras_of_rays(rays, pinhole(1.3887, SQUARE), SQUARE)
    expected = torch.tensor([
        [0, 0, 0], [-0.75, 0, 0.201], [-1.5, 0, 1.5], [0, 0, 3], [0, 0.75, 0.201],
        [-0.705, 0.513, 0.279]])
    torch.testing.assert_close(eyes(found) * FLIP, expected, rtol=0, atol=1e-3)
    forward = torch.tensor([
        [0, 0, 1], [0.5, 0, 0.866], [1, 0, 0], [0, 0, -1], [0, -0.5, 0.866], [0.470, -0.342, 0.814]])
    torch.testing.assert_close(found[:, 2, :3] * FLIP, forward, rtol=0, atol=1e-3)


def test_a_common_motion_of_all_cameras_changes_no_ray():
    cameras, intrinsic, size = golden_cameras("generic")
    motion = torch.eye(4)
    motion[:3, :3] = nearest_rotation(peers.numbers((1, 3, 3), 3).float())[0]
    motion[:3, 3] = torch.tensor([0.3, -2.0, 1.0])
    rays = rays_of_cameras(cameras, intrinsic, size, 4)
    moved = rays_of_cameras(cameras @ motion, intrinsic, size, 4)
    torch.testing.assert_close(moved, rays, rtol=0, atol=1e-5)


def test_cameras_of_noisy_rays_are_the_official_ones():
    rays = GOLDEN["readout.rays_noisy"].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    intrinsic = pinhole(GOLDEN["readout.focal_ndc_used"].item() / 2, SQUARE)
    cameras = cameras_of_rays(rays, intrinsic, SQUARE)
    rotation = (FLIP[:, None] * cameras[:, :, :3] * FLIP).mT  # theirs is for row vectors
    torch.testing.assert_close(rotation, GOLDEN["readout.R"], rtol=0, atol=2e-6)
    # Theirs takes d x m, of directions of any length, for points on the rays.
    toward = torch.nn.functional.normalize(GOLDEN["readout.rays_noisy"][..., :3], dim=2)
    moment = torch.linalg.cross(GOLDEN["readout.points"], toward, dim=2)
    centres = camera_from_plucker(torch.cat([moment, toward], dim=2).mT[:, :, None])
    torch.testing.assert_close(centres.float(), GOLDEN["readout.center"], rtol=0, atol=2e-5)


def test_nearest_rotation_is_the_official_one():
    found = nearest_rotation((GOLDEN["procrustes.B"].T @ GOLDEN["procrustes.A"])[None])[0]
    torch.testing.assert_close(found, GOLDEN["procrustes.R"], rtol=0, atol=2e-6)
    mirror = torch.diag(torch.tensor([3.0, 2.0, -1.0]))[None]
    torch.testing.assert_close(nearest_rotation(mirror)[0], torch.eye(3))


def test_the_worlds_cameras_come_back_at_their_distance():
    views = TASKS["view"](0, range(3), views=3).truth["extrinsics"]
    for cameras in views:
        cameras = at_distance(cameras)
        rays = rays_of_cameras(cameras, pinhole(1.6, SQUARE), SQUARE, 8)
        torch.testing.assert_close(
            cameras_of_rays(rays, pinhole(1.6, SQUARE), SQUARE), cameras, rtol=0, atol=1e-5)
        target = torch.tensor([0, 0, 1.7])  # in the first camera's frame
        seen = (cameras[:, :, :3] @ target + cameras[:, :, 3])
        torch.testing.assert_close(seen[:, :2], torch.zeros(3, 2), rtol=0, atol=1e-4)


def test_parallel_cameras_are_refused():
    cameras = orbit(0, 10)[None].repeat(2, 1, 1)
    cameras[1, 0, 3] += 1
    with pytest.raises(ParameterError, match="same direction"):
        at_distance(cameras)
