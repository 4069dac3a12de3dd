"""How well a model of the world draws what a caption asks for, read by the judge; beside the judge's own errors.

    python tests/benchmarks/quality.py [--model weights/tiny] [--pictures 512] [--seeds 3] [--out FILE.json]

Captions come from scenes that were never trained on. "unseen" ones contain a colour and shape pair (HELD_OUT) that
occurs in no training picture. Prints a table and writes it, into quality.json beside this file if no --out is given.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from record import record  # noqa: E402

from minipic.common import computes_bf16, rng  # noqa: E402
from minipic.diffusion.samplers import SAMPLERS  # noqa: E402
from minipic.papers import onepic  # noqa: E402
from minipic.pipeline import DrawSettings, Pipeline, SeededNoise, Stage  # noqa: E402
from minipic.text import Conditioning, encode_prompts  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.caption import Description, ask, ask_counts, counting_caption, describe, say  # noqa: E402
from minipic.world.scene import COLORS, PLACES, SHAPES, SIZES, render, sample_scene  # noqa: E402

WORLD = 10**9  # the seed of the captions' scenes; training uses seeds near 0
SETS = {"one object": (1, "any"), "one object, unseen": (1, "only"),
        "two objects": (2, "any"), "two objects, unseen": (2, "only"), "counted": ("alike", "any")}


def requests(objects, held_out, count):
    """`count` scenes and what is asked of each: everything about a single object; any part of what two allow.

    objects: how many; "alike": two or three, whose captions count those that are alike.
    """
    if objects == "alike":
        scenes = [sample_scene(WORLD, i, held_out=held_out, alike=True) for i in range(count)]
        asked = [ask_counts(scene, rng(WORLD, "ask", i)) for i, scene in enumerate(scenes)]
    else:
        scenes = [sample_scene(WORLD, i, objects, held_out) for i in range(count)]
        asked = [Description(describe(scene).things) if objects == 1 else ask(scene, rng(WORLD, "ask", i))
                 for i, scene in enumerate(scenes)]
    return scenes, asked, [say(a, rng(WORLD, "say", i), objects == "alike") for i, a in enumerate(asked)]


@torch.no_grad()
def draw(pipeline, prompts, seed, steps=30, guidance=5.0, image_guidance=1.5, batch=64, hints=None, edits=None,
         sources=None, trained_as=None, task=None):
    """One picture for each prompt -> [B,3,64,64] on the CPU; picture i has seed + i, as `generate` would draw it.

    hints [B,3,64,64] in 0..1: what the ControlNet follows. edits [B,3,64,64] in -1..1: the pictures to change.
    sources, the same: the pictures beside which a LoRA of ONE-PIC draws; trained_as: its onepic.TrainedAs; task: which
    of its tasks.
    """
    pipeline.to(memory_format=torch.channels_last)  # the fast order for 16 bits, see layouts.memory_format
    images = []
    for start in tqdm(range(0, len(prompts), batch), "drawing", leave=False):
        part = slice(start, start + batch)
        given = {}
        for name, pictures in (("hints", hints), ("edits", edits), ("sources", sources)):
            if pictures is not None:
                given[name] = pictures[part].to(pipeline.device)
        drawn = draw_batch(
            pipeline, prompts[part], seed + start, steps, guidance, image_guidance, trained_as=trained_as, task=task,
            **given)
        images.append(drawn.cpu())
    return torch.cat(images)


def draw_batch(pipeline, prompts, seed, steps, guidance, image_guidance, hints=None, edits=None, sources=None,
               trained_as=None, task=None):
    """The pictures of `draw` that are drawn together."""
    n, device, (width, height) = len(prompts), pipeline.device, pipeline.size
    if trained_as:
        prompts = [onepic.prompt_for(trained_as, prompt, task) for prompt in prompts]
        width = 2 * width
    grid = pipeline.schedule.grid(steps)

    # What is wanted and what is not, a row for each prompt.
    context, pooled = encode_prompts(prompts, pipeline.tokenizers_and_encoders)
    unwanted_ids, wanted_ids = pipeline.negative_and_positive_size_ids((width, height), (0, 0), (width, height))
    cond = Conditioning(context, pooled, wanted_ids.expand(n, -1))
    uncond = Conditioning(torch.zeros_like(context), torch.zeros_like(pooled), unwanted_ids.expand(n, -1))
    settings = DrawSettings("", guidance=guidance, image_guidance=image_guidance)
    by_source = trained_as is not None and trained_as.source_dropout and image_guidance > 1
    branches = pipeline.guidance_branches(Stage(pipeline, grid, cond, uncond), settings, by_source)

    factor = pipeline.vae.config.factor
    noise = SeededNoise(seed, n, (4, height // factor, width // factor), device)
    x = grid.start * noise()
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device)):
        controls, extra, network = [], None, None
        if hints is not None:
            controls = [("controlnet", hints.repeat(len(branches), 1, 1, 1), 1.0)]
        if edits is not None:
            extra, _ = pipeline.vae.encode(edits)
        if trained_as:
            network = network_beside(pipeline, sources, trained_as, seed, by_source)
        predict = pipeline.predictor(branches, 1, controls=controls, extra=extra, network=network)
        denoise = pipeline.schedule.objective.denoiser(predict, grid)
        for x, _ in SAMPLERS["euler"](denoise, x, grid.sigmas):
            pass
        if trained_as:
            x = onepic.wanted_panel(x, 1, trained_as.layout)
        return pipeline.vae.decode(pipeline.vae.unscale(x)).float().clamp(-1, 1)


def network_beside(pipeline, sources, trained_as, seed, by_source):
    """The UNet as onepic.draw calls it: row i sees source i, with onepic's noise for seed + i.

    by_source: the first of the predictions that guidance combines does without.
    """
    mean, _ = pipeline.vae.encode(sources)
    given = pipeline.vae.scale(mean.float())
    wanted = torch.zeros_like(given)
    known = onepic.join(given[:, None], wanted, trained_as.layout)
    noise = torch.stack([torch.randn(known.shape[1:], generator=rng(seed + i, "given")) for i in range(len(known))])
    noise = noise.to(known)
    is_wanted = onepic.join(wanted[:, None], torch.ones_like(wanted), trained_as.layout).bool()
    objective = pipeline.schedule.objective

    def network(x, t, context, pooled, size_ids, residuals):
        branches = len(x) // len(known)  # with and without the text or the source
        shown = [known] * branches
        if by_source:
            shown[0] = torch.zeros_like(known)
        repeated = [rows.repeat(branches, 1, 1, 1) for rows in (noise, is_wanted)]
        x = onepic.network_view(x, t, torch.cat(shown), *repeated, trained_as.visible, objective)
        return pipeline.unet(x, t, context, pooled, size_ids, residuals)

    return network


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/tiny")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    pipeline, judge = Pipeline.load(options.model), probe.load_judge(f"{options.model}/judge")
    count, results = options.pictures, {}

    for name, (objects, held_out) in SETS.items():
        scenes, asked, prompts = requests(objects, held_out, count)
        truth = render(scenes, truth=False).rgb
        results[f"renders, {name}"] = [probe.accuracy(asked, probe.read(judge, truth))]
        rows = []
        for seed in range(options.seeds):
            images = draw(pipeline, prompts, 10**6 * seed)
            rows.append(probe.accuracy(asked, probe.read(judge, images)))
        results[name] = rows
        if name == "two objects":
            real = render([sample_scene(WORLD + 1, i, objects, held_out) for i in range(count)], truth=False).rgb
            features = [probe.embed(judge, x) for x in (truth, real, images)]
            results["frechet"] = {"drawn to rendered": probe.frechet(features[2], features[0]),
                                  "rendered to rendered": probe.frechet(features[1], features[0])}
            results["vae psnr"] = reconstruct(pipeline, truth)
            results["guidance"] = {g: sweep(judge, pipeline, asked, prompts, features[0], guidance=g)
                                   for g in (1.0, 2.0, 3.0, 5.0, 7.5, 10.0)}
            results["steps"] = {s: sweep(judge, pipeline, asked, prompts, features[0], steps=s)
                                for s in (5, 10, 20, 30, 50)}
    show(results)
    out = options.out.with_suffix("").resolve()
    print(record(out, results, model=options.model, pictures=count, seeds=options.seeds))


@torch.no_grad()
def reconstruct(pipeline, images):
    return metrics.psnr(torch.cat([pipeline.vae.decode(pipeline.vae.encode(x)[0]) for x in images.split(64)]), images)


@torch.no_grad()
def linear_reading(encoders):
    """{fact: share of unseen captions in which a linear reading of the text's states finds it}, the worse of the mean
    context and the pooled vector: what the encoders leave out, no UNet can draw. encoders: as encode_prompts takes."""
    scenes = [sample_scene(WORLD + 1, i, 1) for i in range(500)]
    things = [describe(scene).things[0] for scene in scenes]
    texts = [say(Description((thing,)), rng(WORLD, "say", i)) for i, thing in enumerate(things)]
    states = text_states(texts, encoders)
    shares = {}
    for look, names in (("shape", SHAPES), ("place", PLACES), ("color", COLORS), ("size", SIZES)):
        shares[look] = share_read(states, torch.tensor([list(names).index(getattr(thing, look)) for thing in things]))
    return shares


@torch.no_grad()
def count_reading(encoders):
    """The same for the number of things, one to three, in captions that count those that are alike."""
    counts = [i % 3 + 1 for i in range(500)]
    scenes = [sample_scene(WORLD + 1, i, count, alike=count > 1) for i, count in enumerate(counts)]
    texts = [counting_caption(scene, rng(WORLD, "count", i)) for i, scene in enumerate(scenes)]
    return share_read(text_states(texts, encoders), torch.tensor(counts) - 1)


def text_states(texts, encoders):
    """What a linear reading reads of 500 texts: the mean context [500,D] and the pooled vector [500,D]."""
    outputs = [encode_prompts(texts[i:i + 50], encoders) for i in range(0, 500, 50)]
    context, pooled = map(torch.cat, zip(*outputs))
    return context.mean(1), pooled


def share_read(states, right):
    """The share of the last 100 texts in which a reading fitted to the first 400 finds what is right [500], the worse
    of both `text_states`."""
    wanted = torch.nn.functional.one_hot(right).double()[:400]
    found = []
    for x in states:
        x = torch.cat([x, torch.ones(500, 1)], dim=1).double()
        fit = torch.linalg.solve(x[:400].T @ x[:400] + torch.eye(x.shape[1]), x[:400].T @ wanted)
        found.append(((x[400:] @ fit).argmax(1) == right[400:]).double().mean().item())
    return min(found)


def sweep(judge, pipeline, asked, prompts, rendered, **settings):
    """Whole-caption accuracy and Frechet distance of half as many pictures drawn with other settings."""
    half = len(prompts) // 2
    images = draw(pipeline, prompts[:half], 7 * 10**6, **settings)
    return {"whole": probe.accuracy(asked[:half], probe.read(judge, images))["whole"],
            "frechet": probe.frechet(probe.embed(judge, images), rendered)}


def show(results):
    for name, rows in results.items():
        if not isinstance(rows, list):
            print(f"{name:30} {rows}")
            continue
        cells = []
        for fact in rows[0]:
            values = [row[fact] for row in rows]
            if values[0] == values[0]:  # nan: nothing was asked
                spread = f"±{max(values) - min(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{fact} {statistics.mean(values):.3f}{spread}")
        print(f"{name:30} " + "  ".join(cells))


if __name__ == "__main__":
    main()
