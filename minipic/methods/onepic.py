"""ONE-PIC: every task is one picture, half given and half drawn; a LoRA on the frozen model learns it (arXiv 2412.05619).

In-visual-context tuning: what is given and what is wanted stand side by side in one picture, as the model knows them.
Masking: the wanted half is masked and only that is predicted. Control, edits, subjects and try-on then differ in their
pictures alone; the network stays as it is. The authors' code was never published and the abstract has no formulas, so
two choices are switches here: whether the UNet sees the given half clean or as noisy as the rest (--visible), and
whether the loss counts the wanted half or all (--loss-on). Each half is encoded by itself: encoded together, the VAE's
convolutions and attention would carry the answer into the half that is given.
"""

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from minipic.adapters import TOKENIZERS
from minipic.common import InputError, from_json, option, random
from minipic.image import cover, flatten, labelled_grid, to_pictures, to_tensor, white
from minipic.layers import lora
from minipic.methods import t2i
from minipic.pipeline import latent_mask
from minipic.weights import read_header, save_lora

GIVEN = {"edges": "its edges", "depth": "its depth", "normals": "its normals", "segmentation": "its parts in colours",
         "boxes": "boxes around its objects", "blur": "a blurred picture", "small": "a picture of few pixels",
         "masked": "a picture with a hole", "edit": "the picture before", "view": "another view",
         "subject": "the same object", "wear": "the garment"}  # every task, and what the prompt calls the given half
GREY = 128  # what hides the part of the wanted picture that is to be drawn, where the rest of it is given


@dataclass
class Recipe(t2i.Pairs):
    """Teach a model a task by a LoRA: given and wanted pictures of the world side by side, the wanted one to draw."""

    task: str = option("edges", "what is given: a task of minipic/world/tasks.py", tuple(GIVEN))
    visible: str = option("clean", "how the UNet sees what is given: clean, or as noisy as the rest", ("clean", "noised"))
    loss_on: str = option("masked", "where the prediction counts: in what is to be drawn, or in all", ("masked", "all"))
    prompt: str = option("two panels: {given} | {text}", "the prompt of both halves together")
    lora_rank: int = option(32, "rank of the LoRA")
    steps: int = option(1000, "optimizer steps in all")
    batch: int = option(16, "pairs a step")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(30, "steps over which the learning rate rises")

    LEAST = t2i.Pairs.LEAST | {"lora_rank": 1}

    def __post_init__(self):
        super().__post_init__()
        if "{text}" not in self.prompt:
            raise InputError(f"--prompt {self.prompt}: lacks {{text}}, where the wanted half is described")


@dataclass(frozen=True)
class Context:
    """What a LoRA was trained with, which drawing must repeat; it is kept in the file's metadata."""

    visible: str
    prompt: str
    size: tuple[int, int]  # (width, height) of each half, in pixels

    def said(self, text):
        return self.prompt.replace("{text}", text)


def context_of(path):
    """The Context in a LoRA's file. Raises InputError for a LoRA of another recipe."""
    try:
        return from_json(Context, json.loads(read_header(path)[1]["onepic"]), {}, path)
    except (KeyError, TypeError, json.JSONDecodeError):
        raise InputError(f"--lora {path}: was not made by train.py onepic, and cannot draw beside --source") from None


def context(pipeline, config):
    size = (config.side or pipeline.size[0], config.side or pipeline.size[1])
    return Context(config.visible, config.prompt.replace("{given}", GIVEN[config.task]), size)


# ---- training ---------------------------------------------------------------------------------------------------

def build(config):
    return t2i.load(config, stays=True)


def setup(pipeline, config):
    return lora.inject(pipeline.unet, config.lora_rank)


def data(pipeline, config):
    """t2i's batches of canvases [B,4,h,2w]: x0, noise, `known`, of which the UNet sees what `mask` [B,1,h,2w] leaves."""
    how, vae = context(pipeline, config), pipeline.vae
    pictures = [replace(pair, text=how.said(pair.text))
                for pair in t2i.pairs_of(config.task, pipeline, config, 0, config.scenes)]
    given = t2i.encode_pictures(vae, [replace(pair, image=pair.source) for pair in pictures])
    masks = [latent_mask(part_of(pair, config.task).float(), vae.config.factor)[0] for pair in pictures]
    rest = given if config.task != "wear" else t2i.encode_pictures(
        vae, [replace(pair, image=pair.image.masked_fill(pair.mask, GREY)) for pair in pictures])
    batch_of = t2i.batches(pipeline, pictures, {}, config)

    def batch(step, indices):
        found = batch_of(step, indices)
        left, right = (torch.stack([latents[row][0].float() for row in found["rows"]]) for latents in (given, rest))
        noise = torch.stack([torch.randn(left.shape[1:], generator=random(config.seed, "given", i)) for i in indices])
        mask = torch.stack([masks[row] for row in found["rows"]])
        (width, height), count = how.size, len(indices)
        return found | {
            "x0": beside(left, found["x0"]), "noise": beside(noise, found["noise"]), "known": beside(left, right),
            "mask": beside(torch.zeros_like(mask), mask).bool(),
            "size_ids": torch.tensor([[height, 2 * width, 0, 0, height, 2 * width]] * count, dtype=torch.float32)}
    return batch


def part_of(pair, task):
    """Which pixels of the wanted picture are to be drawn, bool [1,H,W]: all, but of a figure only the garment."""
    return pair.mask if task == "wear" else torch.ones(1, *pair.size, dtype=torch.bool)


def beside(left, right):
    """Two of [B,C,h,w] -> [B,C,h,2w]."""
    return torch.cat([left, right], dim=3)


def fill(x, t, known, noise, mask, visible, objective):
    """What the UNet sees: x [B,4,h,w] where `mask` is true, elsewhere the latents `known`: clean, or "noised" with
    `noise` as x is at the timesteps t, a scalar or [B]."""
    if visible == "noised":
        sigma = objective.schedule.sigma(t).to(known).reshape(-1, 1, 1, 1)
        known = objective.scaled(objective.mix(known, noise, sigma), sigma)
    return torch.where(mask, x, known.to(x.dtype))


def loss(pipeline, batch, config):
    def network(x, t, *told):
        seen = fill(x, t, *(batch[key] for key in ("known", "noise", "mask")), config.visible,
                    pipeline.schedule.objective)
        return pipeline.unet(seen, t, *told)
    return t2i.loss(pipeline, batch, config, network, batch["mask"] if config.loss_on == "masked" else None)


def sample(pipeline, config):
    """Of four pairs that it never saw: the given picture, what it draws beside it, and the wanted one."""
    cells, device = [], pipeline.device.type
    for pair in t2i.pairs_of(config.task, pipeline, config, config.scenes, 4):
        given, wanted = to_pictures(torch.stack([pair.source, pair.image]) / 127.5 - 1)
        part = to_pictures(part_of(pair, config.task)[None].expand(1, 3, -1, -1) * 2.0 - 1)[0]
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):  # for two kinds of weights
            drawn, = generate(pipeline, pair.text, given, context(pipeline, config), wanted, part, steps=20)
        cells += [(given, GIVEN[config.task]), (drawn, pair.text), (wanted, "wanted")]
    return labelled_grid(*zip(*cells), columns=3)


def export(pipeline, folder, config):
    """The LoRA, which says in its file how to draw with it; example.png is a given picture to try."""
    save_lora({"unet": lora.lora_state_dict(pipeline.unet)}, folder / "lora.safetensors",
              {"onepic": json.dumps(asdict(context(pipeline, config)))})
    pair, = t2i.pairs_of(config.task, pipeline, config, config.scenes, 1)
    to_pictures(pair.source[None] / 127.5 - 1)[0].save(folder / "example.png")


# ---- drawing ----------------------------------------------------------------------------------------------------

@contextmanager
def shown(pipeline, known, noise, mask, visible):
    """Inside, whatever x the pipeline's UNet is given, it sees `known` where `mask` is false; see `fill`."""
    def see(unet, given):
        x, t, *told = given
        rows = len(x) // len(known)  # with and without the text, see Pipeline.predictor
        return fill(x, t, known.repeat(rows, 1, 1, 1), noise.repeat(rows, 1, 1, 1), mask, visible,
                    pipeline.schedule.objective), t, *told
    handle = pipeline.unet.register_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def steps(pipeline, text, source, how, target=None, mask=None, seed=0, n=1, size=None, **settings):
    """Yield (x_t, predicted x0) of the wanted half, each [n,4,h,w], as Pipeline.steps does of a whole picture.

    `source`: the given PIL picture; `how`: the LoRA's Context; size: (width, height) of each half, as trained if None.
    `target`, `mask`: PIL pictures of one size, of which the black part of `mask` is given too. `settings`: see there.
    """
    size, prompt = size or how.size, how.said(text)
    pipeline.encode(prompt, settings.get("negative"))
    pipeline.free(*TOKENIZERS)
    pipeline.fetch("unet")  # here, for another one would not be the one that `shown` changes
    part = torch.ones(1, *size[::-1]) if mask is None else white(mask, size)
    wanted = torch.zeros(3, *size[::-1]) if mask is None else to_tensor(cover(flatten(target), size))
    wanted = torch.where(part.bool(), GREY / 127.5 - 1, wanted)
    left, right = (pipeline.vae.scale(pipeline.moments(x)[0]).to(pipeline.device)
                   for x in (to_tensor(cover(flatten(source), size)), wanted))
    part = latent_mask(part, pipeline.vae.config.factor).bool().to(left.device)
    known, masked = beside(left, right), beside(torch.zeros_like(part), part)
    noise = torch.stack([torch.randn(known.shape[1:], generator=random(seed + i, "given")) for i in range(n)])
    if how.visible == "noised":  # looks up the noise of t on the CPU, which no graph can record
        settings["graph"] = False
    with shown(pipeline, known.expand(n, -1, -1, -1), noise.to(known), masked, how.visible):
        for pair in pipeline.steps(prompt, size=(2 * size[0], size[1]), seed=seed, n=n, **settings):
            yield tuple(torch.where(part, x.chunk(2, dim=3)[1], right.to(x)) for x in pair)


def generate(pipeline, text, source, how, target=None, mask=None, **settings):
    """Draw beside `source` -> list of PIL pictures; see `steps`."""
    for x, _ in steps(pipeline, text, source, how, target, mask, **settings):
        pass
    return pipeline.decode(x)
