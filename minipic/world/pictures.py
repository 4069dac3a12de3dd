"""What recipes train on: pictures of the world, each with a caption and SDXL's size ids.

    pictures = [compose(seed=0, index=i) for i in range(8)]
    images = Picture.draw(pictures)                     # a list of [3,H,W] in [-1,1]
    text = pictures[0].caption(torch.Generator())

Nothing is stored: picture number i is a pure function of (seed, i).

SDXL is told the original size and the crop of every picture that it trains on (arXiv 2307.01952,
section 2.2). So that these numbers mean something, the pictures come in several KINDS.

Everything that recipes train on has the same members (Picture, PairPicture, and
training/photos.py's Photo):
    size                    (height, width) of the training picture
    size_ids                [6] original height, width; crop top, left; target height, width
    caption(generator)      a caption; it may be another one each time
    draw(pictures)          many of them -> a list of images [3,H,W] in [-1,1]
    encoded_at_once         how many to draw and to encode together
    repeats                 how many times it counts among others
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from minipic.common import rng
from minipic.world.caption import caption, counting_caption
from minipic.world.scene import FLOORS, SKIES, Scene, render, sample_scene
from minipic.world.tasks import TASKS

# {kind: (its share of all pictures, (height, width))}. All sides are multiples of 16, for the UNet.
KINDS = {
    "plain": (0.60, (64, 64)),
    "wide": (0.08, (64, 96)),
    "tall": (0.07, (96, 64)),
    "panels": (0.10, (64, 128)),  # two scenes side by side
    "crop": (0.09, (64, 64)),  # cut out of a larger drawing
    "small": (0.06, (64, 64)),  # drawn small and enlarged, so that it is not sharp
}
PANEL_SIZE = (64, 64)
UNCUT_SIZE = (80, 80)  # of a "crop"
SMALL_SIDES = (24, 32, 48)  # of a "small" before it is enlarged

CHUNK = 64  # pictures that are drawn at once


# ---- single pictures ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Picture:
    """One training picture: what it shows, and how it is made from drawings of scenes."""

    kind: str  # of KINDS
    scenes: tuple[Scene, ...]  # one, or two for panels
    drawn: tuple[int, int]  # (height, width) that each scene is drawn at
    size: tuple[int, int]  # (height, width) of the finished picture
    crop: tuple[int, int] = (0, 0)  # (top, left): where the finished picture is cut out
    counted: bool = False  # whether captions count alike things: "two red cubes"

    encoded_at_once = CHUNK
    repeats = 1

    @property
    def size_ids(self) -> torch.Tensor:
        """[6]: original height and width, crop top and left, target height and width."""
        original = self.size if self.kind == "panels" else self.drawn
        return torch.tensor([*original, *self.crop, *self.size], dtype=torch.float32)

    def caption(self, generator: torch.Generator) -> str:
        """A caption in random words. Those of two panels are joined by a bar."""
        of_scene = counting_caption if self.counted else caption
        text = " | ".join(of_scene(scene, generator) for scene in self.scenes)
        return f"two panels: {text}" if self.kind == "panels" else text

    @staticmethod
    def draw(pictures: Sequence["Picture"]) -> list[torch.Tensor]:
        """Pictures -> images [3,H,W] in [-1,1]. All scenes of one size are rendered together."""
        rows_of_size = {}
        for row, picture in enumerate(pictures):
            rows_of_size.setdefault(picture.drawn, []).append(row)

        images = [None] * len(pictures)
        for size, rows in rows_of_size.items():
            scenes = []
            for row in rows:
                scenes += pictures[row].scenes
            drawings = iter(render(scenes, size, truth=False).rgb)
            for row in rows:
                picture = pictures[row]
                panels = [next(drawings) for _ in picture.scenes]
                images[row] = picture.finish(torch.cat(panels, dim=2))
        return images

    def finish(self, drawing: torch.Tensor) -> torch.Tensor:
        """The picture [3,H,W] that a drawing [3,h,w] becomes: enlarged if "small", else cut."""
        height, width = self.size
        top, left = self.crop
        if self.kind == "small":
            return F.interpolate(drawing[None], size=self.size, mode="bilinear")[0]
        return drawing[:, top:top + height, left:left + width]


def compose(seed: int | tuple, index: int) -> Picture:
    """Picture number `index` of an endless set."""
    return _compose(seed, index, rng(seed, "picture", index))


def compose_counted(seed: int | tuple, index: int, objects: int | None = None) -> Picture:
    """Picture number `index` of another endless set: scenes with alike things, and counted ones.

    objects: how many things a scene has, 2 or 3; None: at random.
    """
    generator = rng(seed, "counted picture", index)
    picture = _compose(seed, index, generator, objects=objects, alike=True)
    return replace(picture, counted=True)


def _compose(seed, index, generator, **options):
    """A picture of a kind that the generator draws. options: of sample_scene."""
    kind = _random_kind(generator)
    u = torch.rand(3, generator=generator).tolist()  # for what is random about its kind
    _, size = KINDS[kind]
    height, width = size

    if kind == "panels":
        scene = sample_scene(seed, index, **options)
        if u[0] < 0.5:
            other = sample_scene(seed, -1 - index, **options)
        else:
            other = replace(scene, floor=_pick(FLOORS, u[1]), sky=_pick(SKIES, u[2]))
        return Picture(kind, (scene, other), PANEL_SIZE, size)

    scene = sample_scene(seed, index, aspect=width / height, **options)
    if kind == "crop":
        largest_top = UNCUT_SIZE[0] - height
        largest_left = UNCUT_SIZE[1] - width
        crop = (int(u[0] * (largest_top + 1)), int(u[1] * (largest_left + 1)))
        return Picture(kind, (scene,), UNCUT_SIZE, size, crop)
    if kind == "small":
        side = _pick(SMALL_SIDES, u[0])
        return Picture(kind, (scene,), (side, side), size)
    return Picture(kind, (scene,), size, size)


def _random_kind(generator):
    shares = torch.tensor([share for share, _ in KINDS.values()])
    number = int(torch.multinomial(shares, 1, generator=generator))
    return list(KINDS)[number]


def _pick(options, u):
    """The option at the share u, from 0 to 1, of all of them."""
    return list(options)[int(u * len(options))]


# ---- pairs of pictures --------------------------------------------------------------------------

@dataclass(frozen=True)
class PairPicture:
    """A pair of one of tasks.TASKS: the training picture is `image`, and `source` is given."""

    source: torch.Tensor  # [3,H,W], uint8
    image: torch.Tensor  # [3,H,W], uint8
    text: str  # the prompt
    scene: Scene | None = None  # what `image` shows
    mask: torch.Tensor | None = None  # [1,H,W], bool, of tasks that have one
    references: torch.Tensor | None = None  # [V,3,H,W], uint8; `source` is the first of them
    views: torch.Tensor | None = None  # [V,3,H,W], uint8; `source` and `image` are the first two
    cameras: torch.Tensor | None = None  # of the views: world-to-camera [V,3,4]

    encoded_at_once = CHUNK
    repeats = 1

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.image.shape[1:])

    @property
    def size_ids(self) -> torch.Tensor:
        """[6], see Picture.size_ids."""
        return torch.tensor([*self.size, 0, 0, *self.size], dtype=torch.float32)

    def caption(self, generator: torch.Generator) -> str:
        """Always the prompt."""
        return self.text

    @staticmethod
    def draw(pairs: Sequence["PairPicture"]) -> list[torch.Tensor]:
        """Pairs -> their images [3,H,W] in [-1,1]."""
        return [pair.image / 127.5 - 1 for pair in pairs]


def task_pairs(task: str, seed: int | tuple, indices: Sequence[int],
               size: tuple[int, int], **options: int) -> list[PairPicture]:
    """Pairs of a task of tasks.TASKS, with these numbers. size: (height, width).

    options: of the task, such as how many references a subject has.
    """
    pairs = []
    for start in range(0, len(indices), CHUNK):
        batch = TASKS[task](seed, indices[start:start + CHUNK], size, **options)
        columns = [to_uint8(batch.source), to_uint8(batch.target), batch.prompts, batch.scenes]
        nothing = [None] * len(batch.prompts)
        columns.append(batch.truth.get("mask", nothing))
        for name in ("references", "pictures"):
            columns.append(to_uint8(batch.truth[name]) if name in batch.truth else nothing)
        columns.append(batch.truth.get("extrinsics", nothing))
        for row in zip(*columns, strict=True):
            pairs.append(PairPicture(*row))
    return pairs


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1,1] -> the same in 8 bits."""
    return ((images + 1) * 127.5).round().to(torch.uint8)
