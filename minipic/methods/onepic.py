"""ONE-PIC: a task is one picture, half given and half drawn; a LoRA on the frozen model learns it (arXiv 2412.05619).

In-visual-context tuning: what is given and what is wanted stand side by side in one picture, as the model knows them.
Masking: the wanted half is masked and only that is predicted. Control, edits, subjects and try-on then differ in their
pictures alone; the network stays as it is. The authors' code was never published and the abstract has no formulas, so
two choices are switches here: whether the UNet sees the given half clean or as noisy as the rest (--visible), and
whether the loss counts the wanted half or all (--loss-on). Each half is encoded by itself: encoded together, the VAE's
convolutions and attention would carry the answer into the half that is given.
"""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from minipic.adapters import TOKENIZERS
from minipic.common import InputError, from_json, option, random
from minipic.data import Pair
from minipic.folder import SUFFIXES
from minipic.image import cover, flatten, labelled_grid, open_picture, to_pictures, to_tensor, white
from minipic.layers import lora
from minipic.methods import t2i
from minipic.pipeline import latent_mask
from minipic.weights import read_header, save_lora

GIVEN = {"edges": "its edges", "depth": "its depth", "normals": "its normals", "segmentation": "its parts in colours",
         "boxes": "boxes around its objects", "blur": "a blurred picture", "small": "a picture of few pixels",
         "masked": "a picture with a hole", "edit": "the picture before", "view": "another view",
         "subject": "the same object", "wear": "the garment"}  # every task, and what the prompt calls the given half
LAYERS = r"(down|mid|up)_block.*"  # attention's alone learn more slowly
VISIBLE = ("clean", "noised")
GREY = 128  # hides the part of the wanted picture that is to be drawn, where the rest of it is given


@dataclass
class Recipe(t2i.Pairs, t2i.Photos):
    """Teach a model a task by a LoRA: given and wanted picture side by side, of the world or of a folder (--data)."""

    data: str = option("", "folder with target/ (pictures with captions), source/ (what is given, of the same names) "
                       "and perhaps mask/ (white where to draw); empty: the world")
    task: str = option("edit", "the world's pairs: a task of minipic/world/tasks.py", tuple(GIVEN))
    visible: str = option("clean", "how the UNet sees what is given: clean, or as noisy as the rest",
                          VISIBLE)
    loss_on: str = option("masked", "where the prediction counts: in what is to be drawn, or in all", ("masked", "all"))
    prompt: str = option("two panels: {given} | {text}", "the prompt of both halves; {text} is the wanted one's, "
                         "{given} the task's word for the other")
    lora_rank: int = option(32, "rank of the LoRA")
    steps: int = option(2000, "optimizer steps in all")
    batch: int = option(16, "pairs a step")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(20, "steps over which the learning rate rises")

    LEAST = t2i.Pairs.LEAST | {"lora_rank": 1}

    def __post_init__(self):
        super().__post_init__()
        if "{text}" not in self.prompt:
            raise InputError(f"--prompt {self.prompt}: lacks {{text}}, where the wanted half is described")
        if self.data and "{given}" in self.prompt:
            raise InputError('--data: say in --prompt what is given, e.g. --prompt "two panels: a sketch | {text}"')


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
        how = from_json(Context, dict(json.loads(read_header(path)[1]["onepic"])), {"visible": VISIBLE}, path)
        _, _ = how.size
        return how
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--lora {path}: was not made by train.py onepic, and cannot draw beside --source") from None


# ---- training ---------------------------------------------------------------------------------------------------

def build(config):
    return t2i.load(config, stays=True)


def setup(pipeline, config):
    return lora.inject(pipeline.unet, config.lora_rank, match=LAYERS)


def data(pipeline, config):
    """t2i's batches of canvases [B,4,h,2w]: x0, noise, `known`, of which the UNet sees what `mask` [B,1,h,2w] leaves.

    Besides, pipeline.how becomes the Context, and pipeline.examples four (wanted, given, mask) to show.
    """
    wanted, given, masks = folder_of(pipeline, config) if config.data else world_of(pipeline, config, 0, config.scenes)
    size = Counter(picture.size for picture in wanted).most_common(1)[0][0][::-1]
    how = pipeline.how = Context(config.visible, config.prompt.replace("{given}", GIVEN[config.task]), size)
    pipeline.examples = list(zip(wanted, given, masks))[:4] if config.data else list(
        zip(*world_of(pipeline, config, config.scenes, 4)))
    wanted = [replace(picture, text=how.said(picture.text)) for picture in wanted]
    encode = t2i.encode_photos if config.data else lambda vae, pictures, cache: t2i.encode_pictures(vae, pictures)
    left = [latents[0] for latents in encode(pipeline.vae, given, config.cache)]
    right, parts = left, [torch.ones(1, *latents.shape[1:]) for latents in left]
    if masks[0] is not None:
        chunk = 1 if config.data else 64  # photos may be large
        right = [x[0] for x in t2i.encode_pictures(pipeline.vae, list(map(hidden, wanted, masks)), chunk)]
        parts = [latent_mask(mask.float(), pipeline.vae.config.factor)[0] for mask in masks]
    batch_of = t2i.batches(pipeline, wanted, {}, config)

    def batch(step, indices):
        found = batch_of(step, indices)
        first, second, part = (torch.stack([table[row] for row in found["rows"]]).float()
                               for table in (left, right, parts))
        noise = torch.stack([torch.randn(first.shape[1:], generator=random(config.seed, "given", i)) for i in indices])
        height, width = wanted[found["rows"][0]].size
        return found | {
            "x0": beside(first, found["x0"]), "noise": beside(noise, found["noise"]), "known": beside(first, second),
            "mask": beside(torch.zeros_like(part), part).bool(),
            "size_ids": torch.tensor([[height, 2.0 * width, 0, 0, height, 2 * width]] * len(indices))}
    return batch


def world_of(pipeline, config, first, count):
    """Wanted and given pictures of a task of the world, and masks [1,H,W], true where the wanted one is to be drawn:
    None where all of it is, as everywhere but in trying on, where only the garment is."""
    pairs = t2i.pairs_of(config.task, pipeline, config, first, count)
    return pairs, [replace(pair, image=pair.source) for pair in pairs], [
        pair.mask if config.task == "wear" else None for pair in pairs]


def folder_of(pipeline, config):
    """The same of --data: its target/, source/ and mask/, by their names."""
    wanted = t2i.pictures_of(pipeline, replace(config, data=str(Path(config.data, "target"))))
    masked = Path(config.data, "mask").is_dir()
    files = {kind: {path.stem: path for path in sorted(Path(config.data, kind).glob("*"))
                    if path.suffix.lower() in SUFFIXES} for kind in ("source", "mask")[:1 + masked]}
    for kind, found in files.items():
        missing = [photo.path.stem for photo in wanted if photo.path.stem not in found]
        if missing:
            raise InputError(f"--data {config.data}: {kind}/ lacks {len(missing)} of the pictures in target/, the "
                             f"first is {missing[0]}")
    given = [replace(photo, path=path, original=open_picture(path).size[::-1])  # so that all have been opened
             for photo in wanted for path in [files["source"][photo.path.stem]]]
    factor = pipeline.vae.config.factor
    return wanted, given, [mask_of(photo, files["mask"][photo.path.stem], factor) if masked else None
                           for photo in wanted]


def mask_of(photo, path, factor):
    """The mask of a photo as the photo is cut. Raises InputError for one that does not fit or masks nothing."""
    mask = open_picture(path)
    if mask.size != photo.original[::-1]:
        raise InputError("{} has {}x{} pixels and its picture {}x{}; make both the same size".format(
            path, *mask.size, *photo.original[::-1]))
    mask = white(mask, photo.size[::-1])
    if not latent_mask(mask, factor).any():
        raise InputError(f"{path}: hardly anything is white, so nothing is to be drawn; leave the pair out")
    return mask.bool()


def hidden(picture, mask):
    """The picture with GREY where `mask` is true, as a Pair."""
    image, = type(picture).draw([picture])
    image = ((image + 1) * 127.5).round().to(torch.uint8).masked_fill(mask, GREY)
    return Pair(image, image, "", None, None)


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
    """Four times the given picture, what it draws beside it, and the wanted one: pairs of the world that it never saw,
    or the first of --data."""
    cells, device = [], pipeline.device.type
    for wanted, given, mask in pipeline.examples:
        left, right = to_pictures(torch.cat([torch.stack(type(x).draw([x])) for x in (given, wanted)]))
        part = None if mask is None else to_pictures(mask.expand(1, 3, -1, -1) * 2.0 - 1)[0]
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):  # for two kinds of weights
            drawn, = generate(pipeline, wanted.text, left, pipeline.how, right, part, steps=20, size=right.size)
        cells += [(left, "given"), (drawn, wanted.text), (right, "wanted")]
    return labelled_grid(*zip(*cells), columns=3)


def export(pipeline, folder, config):
    """The LoRA, which says in its file how to draw with it; example.png is a given picture to try."""
    save_lora({"unet": lora.lora_state_dict(pipeline.unet)}, folder / "lora.safetensors",
              {"onepic": json.dumps(asdict(pipeline.how))})
    given = pipeline.examples[0][1]
    to_pictures(torch.stack(type(given).draw([given])))[0].save(folder / "example.png")


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
