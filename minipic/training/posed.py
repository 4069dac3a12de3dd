"""Own photos with known cameras: the transforms.json of nerfstudio, instant-ngp and NeRF's scenes.

    scene/transforms.json    {"w": 640, "h": 480, "fl_x": 500, "frames": [
                                 {"file_path": "images/1.png", "transform_matrix": [4 x 4]}, ...]}
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minipic.common import InputError, rng
from minipic.image import open_picture
from minipic.training.photos import READABLE, Photo
from minipic.weights.files import read_json

NOT_A_ROTATION = 1e-2  # how far R^T R may be from 1


@dataclass(frozen=True)
class PosedScene:
    """The pictures of one scene, and where each was taken."""

    file: Path  # its transforms.json
    photos: list[Photo]
    cameras: torch.Tensor  # world-to-camera [V,3,4]: right, down, forward, as in world/camera.py
    focal: float  # focal length in units of the pictures' shorter side


def read_scenes(folder: Path, side: int) -> list[PosedScene]:
    """The scenes of a folder, each a folder with a transforms.json. Errors: see `read_scene`."""
    files = sorted(folder.glob("*/transforms.json"))
    if not files:
        raise InputError(f"{folder} has no scene, such as {folder / 'kitchen/transforms.json'}")
    return [read_scene(file, side) for file in files]


def choose_views(scene: PosedScene, seed: int) -> Iterator[list[int]]:
    """For each view of a scene: its number, and those of one or two others, chosen at random."""
    count = len(scene.photos)
    for first in range(count):
        generator = rng(seed, "views", scene.file.parent.name, first)
        order = torch.randperm(count, generator=generator).tolist()
        others = [view for view in order if view != first]
        yield [first, *others[:1 + first % 2]]


def read_scene(file: Path, side: int) -> PosedScene:
    """The scene of a transforms.json. The middle of each picture is cut to side x side pixels.

    InputError, naming the file and the frame, for what is missing or cannot be.
    """
    values = read_json(file)
    frames = values.get("frames")
    if not isinstance(frames, list) or len(frames) < 2:
        raise InputError(f"{file}: lists fewer than two frames; views need two at least")
    caption = values.get("caption", "")
    photos = []
    cameras = []
    for number, frame in enumerate(frames):
        where = f"{file}: frame {number}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise InputError(f"{where} has no file_path")
        path = find_picture(file.parent / frame["file_path"], where)
        width, height = open_picture(path).size
        photos.append(Photo(path, str(caption), (height, width), (side, side)))
        cameras.append(read_camera(frame.get("transform_matrix"), where))
    height, width = photos[0].original
    focal = read_focal(values, width, height, file)
    return PosedScene(file, photos, torch.stack(cameras), focal)


def find_picture(path: Path, where: str) -> Path:
    """The file itself; NeRF's scenes leave the ending out."""
    for ending in ("", *sorted(READABLE)):
        found = Path(f"{path}{ending}")
        if found.is_file():
            return found
    raise InputError(f"{where}: {path} is not there")


def read_camera(matrix: object, where: str) -> torch.Tensor:
    """A camera-to-world matrix, whose camera looks along -z with y up, -> world-to-camera [3,4]."""
    try:
        pose = torch.tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        pose = torch.zeros(0)
    if pose.shape not in ((4, 4), (3, 4)) or not pose.isfinite().all():
        raise InputError(f"{where}: its transform_matrix is not 4 rows of 4 numbers")
    rotation = pose[:3, :3] * torch.tensor([1.0, -1.0, -1.0])
    error = (rotation.T @ rotation - torch.eye(3)).abs().max()
    if error > NOT_A_ROTATION or torch.linalg.det(rotation) < 0:
        raise InputError(f"{where}: its transform_matrix does not begin with a rotation")
    translation = -rotation.T @ pose[:3, 3:]
    return torch.cat([rotation.T, translation], dim=1).float()


def read_focal(values: dict, width: int, height: int, file: Path) -> float:
    """fl_x pixels of a picture w wide, or the angle camera_angle_x, in shorter sides."""
    try:
        if "fl_x" in values:
            share = float(values["fl_x"]) / float(values.get("w", width))
        else:
            share = 0.5 / math.tan(float(values["camera_angle_x"]) / 2)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        share = math.nan
    if not 0 < share < math.inf:
        raise InputError(f"{file}: has neither a focal length fl_x nor camera_angle_x")
    return share * width / min(width, height)
