"""CLIP's vision tower on disk: a diffusers or transformers folder -> pictures to vectors."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minipic.common import InputError
from minipic.models.clip import CLIPVision
from minipic.weights.files import read_json
from minipic.weights.layouts import load_part, open_part

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]  # of the three channels, OpenAI's and OpenCLIP's
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class ImageEncoder(nn.Module):
    """Images [B,3,H,W] in [-1,1] -> vectors [B,D], comparable with those of CLIP's text encoder.

    All of a picture is scaled to the square that the tower sees. Gradients go through.
    """

    def __init__(self, vision: CLIPVision, mean: list[float], std: list[float]):
        super().__init__()
        self.vision = vision
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.vision.config.image_size
        images = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
        normalised = ((images + 1) / 2 - self.mean) / self.std
        _, vectors = self.vision(normalised)
        return vectors.float()


def load_image_encoder(folder: Path) -> ImageEncoder:
    """The vision tower of a folder; CLIP's own mean and std where it has no preprocessor_config.

    Raises InputError naming the file that is missing or damaged.
    """
    vision = load_part(open_part(folder, "image_encoder"), torch.float32)
    path = folder / "preprocessor_config.json"
    values = read_json(path) if path.exists() else {}
    mean = values.get("image_mean", CLIP_MEAN)
    std = values.get("image_std", CLIP_STD)
    for numbers in (mean, std):
        is_list = isinstance(numbers, list) and len(numbers) == 3
        if not is_list or not all(isinstance(number, (int, float)) for number in numbers):
            raise InputError(f"{path}: image_mean and image_std must be three numbers each")
    return ImageEncoder(vision, mean, std)
