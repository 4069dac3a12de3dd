"""Trains the judge of world/probe.py on renders whose objects are known, blurred and tinted as drawn pictures are.

Every colour x shape pair occurs here, also those held out from the other recipes: the judge must read them without
prejudice. Losses: the centre heat map's focal loss (Zhou et al. 2019, equation 1) and what is at the centres.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minipic.common import option, random
from minipic.image import labelled_grid, to_pictures
from minipic.training import Recipe as Base
from minipic.world.camera import extrinsic_of, intrinsics, project
from minipic.world.probe import CELL, CELL_HEADS, PICTURE_HEADS, Judge, heads, read, save_judge
from minipic.world.scene import (COLORS, FLOORS, PATTERNS, SHAPES, SIZES, SKIES, centres, layout, render,
                                 sample_scene)

SIZE = (64, 64)
SPREAD = 0.9      # of a centre's heat, in cells: about half is left in the next cell


@dataclass
class Recipe(Base):
    """Train the judge that reads colours, shapes, sizes, patterns and places from pictures."""

    steps: int = option(2000, "optimizer steps in all")
    batch: int = option(64, "pictures a step")
    lr: float = option(3e-3, "peak learning rate")
    pool: int = option(16000, "different scenes to render; each comes again with other blur, noise and tint")

    LEAST = Base.LEAST | {"pool": 1}


def build(config):
    return Judge()


def setup(judge, config):
    return list(judge.parameters())


def data(judge, config):
    """Rendered scenes are kept (as bytes) for the next time that they are drawn."""
    kept = {}

    def batch(step, indices):
        numbers = [index % config.pool for index in indices]
        new = [n for n in dict.fromkeys(numbers) if n not in kept]
        scenes = [sample_scene(config.seed, n, held_out="any") for n in new]
        if new:
            pictures = ((render(scenes, SIZE, truth=False).rgb + 1) * 127.5).round().byte()
            kept.update(zip(new, zip(pictures, map(truth, scenes))))
        images = torch.stack([kept[n][0] for n in numbers]).float() / 127.5 - 1
        images = weather(images, [random(config.seed, "weather", index) for index in indices])
        truths = [kept[n][1] for n in numbers]
        return {"image": images, **{key: torch.stack([t[key] for t in truths]) for key in truths[0]}}
    return batch


def truth(scene):
    """What the judge should say of a scene: numbers for up to three objects, `real` marks those that exist."""
    index = lambda table, name: list(table).index(name)
    middles = centres(scene.objects)
    pixels, _ = project(middles, extrinsic_of(scene.camera), intrinsics(SIZE))
    rows = [[index(SHAPES, o.shape), index(SIZES, o.size), index(PATTERNS, o.pattern), index(COLORS, o.color),
             index(COLORS, o.color2 or o.color)] for o in scene.objects]
    pad = lambda x: F.pad(x, (0, 0, 0, 3 - len(rows)))
    ahead = layout(middles, scene.camera, scene.aspect)[2]
    return {"real": pad(torch.ones(len(rows), 1))[:, 0], "middle": pad(pixels / CELL), "ahead": pad(ahead[:, None]),
            "labels": pad(torch.tensor(rows)),
            "setting": torch.tensor([index(FLOORS, scene.floor), index(SKIES, scene.sky)])}


def weather(images, generators):
    """Blur, halved size, noise and tint of random strength [B,3,H,W]: what decoders and samplers do to a picture."""
    u = torch.stack([torch.rand(10, generator=g) for g in generators])[:, :, None, None, None].unbind(1)
    noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators])
    blurred = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = images + (u[0] < 0.5) * u[1] * (blurred - images)
    images = images + (u[2] < 0.3) * u[3] * (coarse - images)
    gain = 1 + 0.2 * (torch.cat([u[4], u[5], u[6]], 1) - 0.5) + 0.2 * (u[7] - 0.5)
    return (images * gain + 0.2 * (u[8] - 0.5) + 0.12 * u[9] ** 2 * noise).clamp(-1.2, 1.2)


def loss(judge, batch, config):
    cells, setting = judge(batch["image"])
    says, (h, w) = heads(cells, CELL_HEADS, 1), cells.shape[2:]
    y, x = torch.meshgrid(*(torch.arange(n, device=cells.device) + 0.5 for n in (h, w)), indexing="ij")
    off = batch["middle"][..., None, None] - torch.stack([x, y])                     # [B,3,2,h,w]: to each object
    at = (off.abs() <= 0.5).all(2) & (batch["real"][..., None, None] > 0)
    heat = (torch.exp(-off.square().sum(2) / (2 * SPREAD**2)) * batch["real"][..., None, None]).amax(1)
    heat = torch.where(at.any(1), 1.0, heat)
    p = says["object"][:, 0].sigmoid().clamp(1e-4, 1 - 1e-4)
    focal = torch.where(heat == 1, -(1 - p) ** 2 * p.log(), -(1 - heat) ** 4 * p**2 * (1 - p).log())
    parts = {"object": focal.sum() / batch["real"].sum()}
    # what is at the centres, also asked of the cells around: a peak may be found one cell off
    close = torch.exp(-off.square().sum(2) / (2 * SPREAD**2)) * batch["real"][..., None, None]
    close = close * (close == close.amax(1, keepdim=True)) * (close > 0.2)
    b, k, i, j = close.nonzero(as_tuple=True)
    share = close[b, k, i, j] / close.sum()
    here = {key: value[b, :, i, j] for key, value in says.items()}
    labels = batch["labels"][b, k]
    for n, key in enumerate(("shape", "size", "pattern")):
        parts[key] = (F.cross_entropy(here[key], labels[:, n], reduction="none") * share).sum()
    colors = torch.zeros_like(here["color"]).scatter(1, labels[:, 3:], 1.0)
    parts["color"] = (F.binary_cross_entropy_with_logits(here["color"], colors, reduction="none").sum(1) * share).sum()
    parts["middle"] = ((here["middle"] - off[b, k, :, i, j]).abs().sum(1) * share).sum()
    parts["ahead"] = ((here["ahead"] - batch["ahead"][b, k]).abs().sum(1) * share).sum()
    for n, (key, logits) in enumerate(heads(setting, PICTURE_HEADS, 1).items()):
        parts[key] = F.cross_entropy(logits, batch["setting"][:, n])
    return sum(parts.values()), parts


@torch.no_grad()
def sample(judge, config):
    """Renders never trained on, each with what the judge reads from it."""
    images = render([sample_scene(config.seed, -1 - i, held_out="any") for i in range(16)], SIZE, truth=False).rgb
    seen = read(judge, images.to(next(judge.parameters()).device))
    words = [", ".join(" ".join(filter(None, (t.size, t.color, t.color2, t.pattern, t.shape))) for t in d.things)
             for d in seen]
    return labelled_grid(to_pictures(images), words, columns=4)


def export(judge, folder, config):
    save_judge(judge, folder / "judge")
