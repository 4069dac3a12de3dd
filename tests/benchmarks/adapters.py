"""What the papers' adapters that ship are good for, each drawn as `sample.py --adapter` draws it.

`python weights/make.py` measures each so when it is made, and writes the numbers into
weights/README.md:

onepic        edge F1 of drawings from edges, and `layout`, the share in which the judge reads every
              shape, size and place; of edits, the share in which what was asked for is right
              (`changed`), all else is (`kept`), and both (`edited`)
mtu           share of captions of two objects drawn wholly right; edits as above; PSNR in dB of
              super-resolution (`sr`), and of inpainting inside the hole
mosaic        share of captions drawn wholly right, and the style's distance to true mosaics
poster        the same for posters
onediffusion  AbsRel of depth from a picture; PSNR in dB of a picture from its depth

"before" is the model without the adapter, or the given picture; "with another's" is a drawing from
another sample's picture, which must be worse. Scenes are ones that no model was trained on, other
than those of the papers' own experiments.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from cases import control_scores, edit_scores, looks_of  # noqa: E402
from mtu import masked_psnr  # noqa: E402
from quality import WORLD, draw, requests  # noqa: E402

from minipic.common import rng  # noqa: E402
from minipic.draw_settings import DrawSettings  # noqa: E402
from minipic.image import to_pictures, to_tensor  # noqa: E402
from minipic.papers import find_adapter, load_paper  # noqa: E402
from minipic.pipeline import Pipeline  # noqa: E402
from minipic.world import maps, metrics, probe  # noqa: E402
from minipic.world.caption import ask, describe, say  # noqa: E402
from minipic.world.scene import render, sample_scene  # noqa: E402
from minipic.world.styles import STYLES  # noqa: E402
from minipic.world.tasks import TASKS, TaskBatch  # noqa: E402

STEPS = 15
SEED = (WORLD, "adapters")
FAR = 50.0  # world units; beyond, a map's grey says little of the depth


class Drawer(NamedTuple):
    """An adapter on its model, and the judge of its drawings."""

    model: Path
    adapter: Path
    judge: torch.nn.Module
    count: int  # drawings for each number

    def draw(
            self, prompts: list[str], sources: torch.Tensor | None = None, task: str | None = None,
            **settings) -> torch.Tensor:
        """One picture for each prompt, and perhaps each source [B,3,H,W] -> [B,3,H,W]."""
        name, file = find_adapter(self.adapter)
        paper = load_paper(name)
        pipeline = Pipeline.load(self.model)
        adapter = paper.load_adapter(pipeline, file)
        options = paper.DrawOptions()
        given = [[]] * len(prompts)
        if sources is not None:
            given = [[picture] for picture in to_pictures(sources)]
        images = []
        for seed, (prompt, pictures) in enumerate(zip(tqdm(prompts, task, leave=False), given)):
            wanted = DrawSettings(prompt, steps=STEPS, seed=seed, **settings)
            images += paper.draw(pipeline, adapter, wanted, pictures, task, options)
        return torch.stack([to_tensor(picture) for picture in images])

    def before(self, prompts: list[str]) -> torch.Tensor:
        """The same without the adapter."""
        return draw(Pipeline.load(self.model), prompts, seed=0, steps=STEPS)


def pairs_of(task: str, count: int) -> TaskBatch:
    return TASKS[task](SEED, range(count))


# Scores: Drawer -> {number: value} ----------------------------------------------------------------

def onepic_scores(drawer: Drawer) -> dict[str, float]:
    edges = pairs_of("edges", drawer.count)
    prompts = []
    for i, scene in enumerate(edges.scenes):
        prompts.append(say(looks_of(describe(scene)), rng(SEED, "say", i)))
    images = drawer.draw(prompts, edges.source, "edges", guidance=3.0)
    followed = control_scores(drawer.judge, images, edges.truth["edges"], edges.scenes)
    others = drawer.draw(prompts, edges.source.roll(1, 0), "edges", guidance=3.0)
    not_given = control_scores(drawer.judge, others, edges.truth["edges"], edges.scenes)
    edited = edited_scores(drawer)
    return {
        "edge F1": followed["edge F1"], "edge F1 with another's": not_given["edge F1"],
        "layout": followed["layout"], **edited}


def edited_scores(drawer: Drawer) -> dict[str, float]:
    """Of the task "edit", which two papers have."""
    pairs = pairs_of("edit", drawer.count)
    kinds = pairs.truth["kinds"]
    images = drawer.draw(pairs.prompts, pairs.source, "edit", guidance=3.0)
    scores = edit_scores(drawer.judge, images, pairs.scenes, kinds, pairs.target)
    before = edit_scores(drawer.judge, pairs.source, pairs.scenes, kinds, pairs.target)
    return {
        "changed": scores["changed"], "kept": scores["kept"], "edited": scores["edited"],
        "edited before": before["edited"]}


def mtu_scores(drawer: Drawer) -> dict[str, float]:
    _, asked, prompts = requests(2, "any", drawer.count)
    scores = {}
    for name, images in (
            ("two objects", drawer.draw(prompts, task="t2i")),
            ("two objects before", drawer.before(prompts))):
        scores[name] = probe.accuracy(asked, probe.read(drawer.judge, images))["whole"]
    scores |= edited_scores(drawer)
    small = pairs_of("small", drawer.count)
    images = drawer.draw([""] * drawer.count, small.source, "sr")
    scores["sr dB"] = metrics.psnr(images, small.target)
    scores["sr dB before"] = metrics.psnr(small.source, small.target)
    masked = pairs_of("masked", drawer.count)
    hole = masked.truth["mask"]
    images = drawer.draw(masked.prompts, masked.source, "inpaint", guidance=3.0)
    scores["hole dB"] = masked_psnr(images, masked.target, hole)
    scores["hole dB before"] = masked_psnr(masked.source, masked.target, hole)
    return scores


def mosaic_scores(drawer: Drawer) -> dict[str, float]:
    return style_scores(drawer, "mosaic")


def poster_scores(drawer: Drawer) -> dict[str, float]:
    return style_scores(drawer, "poster")


def style_scores(drawer: Drawer, style: str) -> dict[str, float]:
    """Whether the caption is still drawn, and whether in the style. Nothing is asked of the sky."""
    shade, _ = STYLES[style]
    truth = [sample_scene((SEED, "truth"), i, 1 + i % 2) for i in range(drawer.count)]
    gram = probe.embed_style(drawer.judge, render(truth, truth=False, shade=shade).rgb)
    scenes = [sample_scene((SEED, "captions"), i, 1 + i % 2) for i in range(drawer.count)]
    asked, prompts = [], []
    for i, scene in enumerate(scenes):
        asked.append(replace(ask(scene, rng(SEED, "ask", i)), sky=None))
        prompts.append(say(asked[i], rng(SEED, "style", i)))
    scores = {}
    for name, images in (("", drawer.draw(prompts)), (" before", drawer.before(prompts))):
        facts = probe.accuracy(asked, probe.read(drawer.judge, images))
        distances = probe.distance(
            probe.embed_style(drawer.judge, images), gram.mean(0, keepdim=True))
        scores["captions" + name] = facts["whole"]
        scores["style distance" + name] = distances.mean().item()
    return scores


def onediffusion_scores(drawer: Drawer) -> dict[str, float]:
    pairs = pairs_of("depth", drawer.count)
    depth = pairs.truth["depth"]
    depth = depth.where(depth < FAR, torch.inf)  # which does not count
    scores = {}
    for name, shift in (("", 0), (" with another's", 1)):
        given = pairs.target.roll(shift, 0)
        drawn = drawer.draw([""] * drawer.count, given, "image2depth", guidance=1.0)
        read = maps.picture_to_depth(drawn).clamp(max=FAR)
        scores["AbsRel" + name] = metrics.depth_errors(read, depth)["abs_rel"]
        given = pairs.source.roll(shift, 0)
        images = drawer.draw(pairs.prompts, given, "depth2image", guidance=2.0)
        scores["depth2image dB" + name] = metrics.psnr(images, pairs.target)
    return scores


SCORES = {
    "onepic": onepic_scores, "mtu": mtu_scores, "mosaic": mosaic_scores, "poster": poster_scores,
    "onediffusion": onediffusion_scores}


def measure(name: str, model: Path, adapter: Path, judge: Path, count: int) -> dict[str, float]:
    """The scores of one of SCORES, from `count` drawings for each number."""
    return SCORES[name](Drawer(model, adapter, probe.load_judge(judge), count))

