"""Trains the judge of world/probe.py on renders whose objects are known.

They are blurred and tinted as drawn pictures are. Every pair of colour and shape occurs, also those
held out from the other recipes: the judge must read them without prejudice. Losses: the focal loss
of the heat map of centres (Zhou et al. 2019, equation 1), and what is at the centres.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minipic.common import rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.training.flags import option
from minipic.training.settings import DATA, TrainSettings
from minipic.world.camera import extrinsic_of, intrinsics, project
from minipic.world.probe import CELL, CELL_HEADS, PICTURE_HEADS, Judge, heads, read, save_judge
from minipic.world.scene import (
    COLORS, FLOORS, PATTERNS, SHAPES, SIZES, SKIES, Scene, centres, layout, render, sample_scene)

SIZE = (64, 64)
MOST = 3          # objects in a scene
SPREAD = 0.9      # of a centre's heat, in cells: about half is left in the next cell


@dataclass
class Settings(TrainSettings):
    """Train the judge that reads colours, shapes, sizes, patterns and places from pictures."""

    pool: int = option(
        16000, "different scenes; each comes again with other blur, noise and tint", group=DATA)
    steps: int = option(2000)
    batch: int = option(64)
    lr: float = option(3e-3)

    MINIMUM = TrainSettings.MINIMUM | {"pool": 1}


def build(config: Settings) -> Judge:
    return Judge()


def setup(judge: Judge, config: Settings) -> list[nn.Parameter]:
    return list(judge.parameters())


class JudgeData:
    """Batches of degraded renders and of what the judge should say. Renders are kept, as bytes."""

    def __init__(self, config: Settings):
        self.config = config
        self.kept = {}  # {scene number: (picture in bytes, truth)}

    def batch(self, step: int, indices: list[int]) -> dict:
        numbers = [index % self.config.pool for index in indices]
        self.render_new(numbers)
        images = torch.stack([self.kept[number][0] for number in numbers]).float() / 127.5 - 1
        images = degrade(images, [rng(self.config.seed, "weather", index) for index in indices])
        truths = [self.kept[number][1] for number in numbers]
        batch = {"image": images}
        for key in truths[0]:
            batch[key] = torch.stack([truth[key] for truth in truths])
        return batch

    def render_new(self, numbers: list[int]):
        new = [number for number in dict.fromkeys(numbers) if number not in self.kept]
        if not new:
            return
        scenes = [sample_scene(self.config.seed, number, held_out="any") for number in new]
        pictures = ((render(scenes, SIZE, truth=False).rgb + 1) * 127.5).round().byte()
        for number, picture, scene in zip(new, pictures, scenes):
            self.kept[number] = picture, truth_of(scene)


def data(judge: Judge, config: Settings) -> JudgeData:
    return JudgeData(config)


def truth_of(scene: Scene) -> dict[str, torch.Tensor]:
    """What the judge should say of a scene: numbers for up to three objects.

    `real` marks those that exist.
    """
    middles = centres(scene.objects)
    pixels, _ = project(middles, extrinsic_of(scene.camera), intrinsics(SIZE))
    _, _, ahead = layout(middles, scene.camera, scene.aspect)
    labels = []
    for thing in scene.objects:
        labels.append([
            number_of(thing.shape, SHAPES), number_of(thing.size, SIZES),
            number_of(thing.pattern, PATTERNS), number_of(thing.color, COLORS),
            number_of(thing.color2 or thing.color, COLORS)])
    count = len(labels)
    return {
        "real": pad_rows(torch.ones(count, 1))[:, 0],
        "middle": pad_rows(pixels / CELL),
        "ahead": pad_rows(ahead[:, None]),
        "labels": pad_rows(torch.tensor(labels)),
        "setting": torch.tensor([number_of(scene.floor, FLOORS), number_of(scene.sky, SKIES)])}


def number_of(name: str, table: Iterable[str]) -> int:
    """The place of a name in one of the world's tables."""
    return list(table).index(name)


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """[n,K] -> [MOST,K], zeros at the end."""
    return F.pad(x, (0, 0, 0, MOST - len(x)))


def degrade(images: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Images [B,3,H,W] with blur, halved size, noise and tint of random strength.

    Decoders and samplers change pictures in these ways.
    """
    u = torch.stack([torch.rand(10, generator=generator) for generator in generators])
    u = u[:, :, None, None, None].unbind(1)  # ten of [B,1,1,1]
    shape = images.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = images + (u[0] < 0.5) * u[1] * (blurred - images)
    images = images + (u[2] < 0.3) * u[3] * (coarse - images)
    color_gain = torch.cat([u[4], u[5], u[6]], 1)
    gain = 1 + 0.2 * (color_gain - 0.5) + 0.2 * (u[7] - 0.5)
    shift = 0.2 * (u[8] - 0.5)
    return (images * gain + shift + 0.12 * u[9] ** 2 * noise).clamp(-1.2, 1.2)


def loss(judge: Judge, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    cells, setting = judge(batch["image"])
    predicted = heads(cells, CELL_HEADS, 1)
    real = batch["real"][..., None, None]  # [B,3,1,1]

    # The distance of every cell's middle to every object, [B,3,2,h,w] in cells.
    height, width = cells.shape[2:]
    rows = torch.arange(height, device=cells.device) + 0.5
    columns = torch.arange(width, device=cells.device) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    offset = batch["middle"][..., None, None] - torch.stack([x, y])
    nearness = torch.exp(-offset.square().sum(2) / (2 * SPREAD**2)) * real  # [B,3,h,w]

    # Focal loss of the heat map: 1 in the cell of an object, less around it.
    is_center = (offset.abs() <= 0.5).all(2) & (real > 0)
    heat = torch.where(is_center.any(1), 1.0, nearness.amax(1))
    p = predicted["object"][:, 0].sigmoid().clamp(1e-4, 1 - 1e-4)
    focal = torch.where(heat == 1, -(1 - p) ** 2 * p.log(), -(1 - heat) ** 4 * p**2 * (1 - p).log())
    losses = {"object": focal.sum() / batch["real"].sum()}

    # What is at the centres, and in the cells around: the peak that is read may be one cell off.
    weight = nearness * (nearness == nearness.amax(1, keepdim=True)) * (nearness > 0.2)
    b, k, i, j = weight.nonzero(as_tuple=True)
    share = weight[b, k, i, j] / weight.sum()
    here = {key: value[b, :, i, j] for key, value in predicted.items()}
    labels = batch["labels"][b, k]
    for n, key in enumerate(("shape", "size", "pattern")):
        losses[key] = (F.cross_entropy(here[key], labels[:, n], reduction="none") * share).sum()
    colors = torch.zeros_like(here["color"]).scatter(1, labels[:, 3:], 1.0)
    color_loss = F.binary_cross_entropy_with_logits(here["color"], colors, reduction="none").sum(1)
    losses["color"] = (color_loss * share).sum()
    losses["middle"] = ((here["middle"] - offset[b, k, :, i, j]).abs().sum(1) * share).sum()
    losses["ahead"] = ((here["ahead"] - batch["ahead"][b, k]).abs().sum(1) * share).sum()
    for n, (key, logits) in enumerate(heads(setting, PICTURE_HEADS, 1).items()):
        losses[key] = F.cross_entropy(logits, batch["setting"][:, n])
    return sum(losses.values()), losses


@torch.no_grad()
def sample(judge: Judge, config: Settings, data: JudgeData) -> Image.Image:
    """Renders never trained on, each with what the judge reads from it."""
    scenes = [sample_scene(config.seed, -1 - i, held_out="any") for i in range(16)]
    images = render(scenes, SIZE, truth=False).rgb
    labels = []
    for description in read(judge, images.to(next(judge.parameters()).device)):
        things = []
        for thing in description.things:
            words = (thing.size, thing.color, thing.color2, thing.pattern, thing.shape)
            things.append(" ".join(filter(None, words)))
        labels.append(", ".join(things))
    return image_grid(to_pictures(images), labels, columns=4)


def export(judge: Judge, folder: Path, config: Settings, data: JudgeData):
    save_judge(judge, folder / "judge")
