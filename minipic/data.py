"""Training pictures from the world: many shapes and sizes, each with its caption and SDXL's size ids.

Nothing is stored: a Picture is a pure function of (seed, index). The sizes and crops are SDXL's micro-conditioning,
arXiv 2307.01952 section 2.2. Whatever else a recipe trains on has the same `size`, `size_ids`, `caption(generator)`
and `draw`, of many at once.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minipic.common import random
from minipic.world.caption import caption
from minipic.world.scene import FLOORS, SKIES, render, sample_scene
from minipic.world.tasks import TASKS

# Kinds of picture: (share, (H, W) of the training picture). Every bucket is a multiple of 16, the UNet's grid.
KINDS = {"plain": (0.60, (64, 64)), "wide": (0.08, (64, 96)), "tall": (0.07, (96, 64)), "panels": (0.10, (64, 128)),
         "crop": (0.09, (64, 64)), "small": (0.06, (64, 64))}


@dataclass(frozen=True)
class Picture:
    """One training picture. `scenes`: one, or two for side-by-side panels; `drawn`: (H, W) that each is drawn at;
    `size`: (H, W) of the training picture; `crop`: (top, left) of its cut from the drawn one."""

    kind: str
    scenes: tuple
    drawn: tuple[int, int]
    size: tuple[int, int]
    crop: tuple[int, int] = (0, 0)

    @property
    def size_ids(self):
        """Original height and width, crop top and left, target height and width."""
        original = self.size if self.kind == "panels" else self.drawn
        return torch.tensor([*original, *self.crop, *self.size], dtype=torch.float32)

    def caption(self, generator):
        """A caption in words drawn from `generator`; panels join two with a bar."""
        text = " | ".join(caption(scene, generator) for scene in self.scenes)
        return f"two panels: {text}" if self.kind == "panels" else text

    @staticmethod
    def draw(pictures):
        """Pictures -> list of images [3,H,W] in [-1,1]; what has one size is rendered in one batch."""
        images, groups = [None] * len(pictures), {}
        for i, picture in enumerate(pictures):
            groups.setdefault(picture.drawn, []).append(i)
        for drawn, members in groups.items():
            rows = iter(render([scene for i in members for scene in pictures[i].scenes], drawn, truth=False).rgb)
            for i in members:
                images[i] = pictures[i].finish(torch.cat([next(rows) for _ in pictures[i].scenes], dim=2))
        return images

    def finish(self, image):
        """What the drawn image [3,h,w] becomes: enlarged if it is a small one, and cut."""
        (height, width), (top, left) = self.size, self.crop
        if self.kind == "small":
            image = F.interpolate(image[None], size=self.size, mode="bilinear", antialias=False)[0]
        return image[:, top:top + height, left:left + width]


def compose(seed, index):
    """Which picture number `index` is."""
    generator = random(seed, "picture", index)
    kind = list(KINDS)[int(torch.multinomial(torch.tensor([share for share, _ in KINDS.values()]), 1,
                                             generator=generator))]
    size = KINDS[kind][1]
    scene = sample_scene(seed, index, aspect=1.0 if kind == "panels" else size[1] / size[0])
    u = torch.rand(4, generator=generator).tolist()
    if kind == "panels":  # two scenes, or one in another setting
        setting = {"floor": list(FLOORS)[int(u[1] * len(FLOORS))], "sky": list(SKIES)[int(u[2] * len(SKIES))]}
        other = sample_scene(seed, -1 - index) if u[0] < 0.5 else replace(scene, **setting)
        return Picture(kind, (scene, other), (64, 64), size)
    if kind == "crop":  # cut from a larger drawing, so that the crop ids mean something
        return Picture(kind, (scene,), (80, 80), size, (int(u[0] * 17), int(u[1] * 17)))
    if kind == "small":  # drawn small and enlarged, so that the original size means something
        side = (24, 32, 48)[int(u[0] * 3)]
        return Picture(kind, (scene,), (side, side), size)
    return Picture(kind, (scene,), size, size)


@dataclass(frozen=True)
class Pair:
    """A pair of one of world/tasks.py's TASKS as a training picture, with all that a Picture can: source, which is
    given, and image, which is wanted, both [3,H,W] in 8 bits; `scene`: what image shows; `mask`: the task's."""

    source: torch.Tensor
    image: torch.Tensor
    text: str
    scene: object
    mask: torch.Tensor | None

    @property
    def size(self):
        return tuple(self.image.shape[1:])

    @property
    def size_ids(self):
        return torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32)

    def caption(self, generator):
        return self.text

    @staticmethod
    def draw(pairs):
        return [pair.image / 127.5 - 1 for pair in pairs]


def pairs(task, seed, indices, size, chunk=64):
    """Pairs of a task of the world as a list of Pairs. `size`: (H, W)."""
    found = []
    for start in range(0, len(indices), chunk):
        made = TASKS[task](seed, indices[start:start + chunk], size)
        levels = (((x + 1) * 127.5).round().to(torch.uint8) for x in (made.source, made.target))
        found += map(Pair, *levels, made.prompts, made.scenes, made.truth.get("mask", [None] * len(made.prompts)))
    return found
