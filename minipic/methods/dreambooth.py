"""DreamBooth: a subject bound to a rare word, without forgetting its class (arXiv 2208.12242).

Equation 2 there: the diffusion loss on the subject's pictures, and the same on pictures of its class that the model
itself drew before training. Everything else is t2i: the whole UNet, or a LoRA.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from minipic import training
from minipic.common import InputError, option
from minipic.image import save_new
from minipic.methods import t2i
from minipic.methods.t2i import build, export, sample, setup  # noqa: F401

PRIOR = "prior "  # begins the keys of the class's half of a batch


@dataclass
class Recipe(t2i.Recipe):
    """Teach a model a subject from a few pictures (--data), keeping its class as it was."""

    prior: str = option("", 'what the subject is one of, e.g. "a dog"; the model draws pictures of it to keep')
    prior_pictures: int = option(64, "pictures of the class, drawn once into OUT/prior")
    prior_weight: float = option(1.0, "how much the class counts")
    steps: int = option(400, "optimizer steps in all")
    batch: int = option(4, "pictures of the subject a step, and as many of the class")
    lr: float = option(1e-4, "peak learning rate")
    ema: float = option(0.0, "decay of the weight average that is exported; 0: none")
    drop: float = option(0.0, "share of captions left out")

    LEAST = t2i.Recipe.LEAST | {"prior_pictures": 1, "prior_weight": 0}

    def __post_init__(self):
        super().__post_init__()
        if not self.data or not self.prior:
            raise InputError('dreambooth needs --data FOLDER, pictures of the subject, and --prior "a dog", its class')


def data(pipeline, config):
    """Batches of the subject with as many pictures of its class, whose keys begin with PRIOR."""
    drawn = f"{config.prior[:80]}-{Path(config.model).name}-{config.seed}"  # of another class or model, other pictures
    folder = Path(config.out, "prior", re.sub(r"\W+", "-", drawn))
    if training.first():
        draw_prior(pipeline, folder, config)
    training.wait()
    kept = replace(config, data=str(folder), caption=config.prior, seed=config.seed + 1)
    classes, subjects = t2i.data(pipeline, kept), t2i.data(pipeline, config)
    return lambda step, indices: subjects(step, indices) | {
        PRIOR + key: value for key, value in classes(step, indices).items()}


def draw_prior(pipeline, folder, config):
    """Draw the pictures of the class that are not there yet, with the model as it is before training."""
    pipeline.eval()
    drawn = len(list(folder.glob("*.png")))
    for i in tqdm(range(drawn, config.prior_pictures), "class", leave=False, mininterval=2):
        picture = pipeline.generate(config.prior, seed=(10**6 * (config.seed + 1) + i) % 2**63)[0]
        save_new(picture, folder / f"{i:04d}.png")
    pipeline.train()


def loss(pipeline, batch, config):
    prior = {key.removeprefix(PRIOR): value for key, value in batch.items() if key.startswith(PRIOR)}
    subject, kept = t2i.loss(pipeline, batch, config), t2i.loss(pipeline, prior, config)
    return subject + config.prior_weight * kept, {"subject": subject.detach(), "prior": kept.detach()}
