"""DreamBooth: a subject bound to a rare word, without forgetting its class (arXiv 2208.12242).

Equation 2 there: the diffusion loss on the subject's pictures, and the same on pictures of its
class that the model itself drew before training. Everything else is t2i: the whole UNet, or a LoRA.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minipic.common import InputError
from minipic.image import save_new
from minipic.latents import LatentData, denoising_loss
from minipic.pipeline import Pipeline
from minipic.recipes import t2i
from minipic.recipes.t2i import build, export, sample, setup  # noqa: F401 - the recipe's own
from minipic.training.flags import option
from minipic.training.processes import is_main_process, wait_for_everyone
from minipic.training.settings import DATA, LOSS

PRIOR = "prior "  # begins the keys of the class's half of a batch


@dataclass
class Settings(t2i.Settings):
    """Teach a model a subject from a few pictures (--data), keeping its class as it was."""

    class_prompt: str = option(
        "", 'what the subject is one of, such as "a dog"; the model draws pictures of it to keep',
        group=DATA)
    num_class_images: int = option(
        64, "pictures of the class, drawn once into OUT/prior", group=DATA)
    prior_loss_weight: float = option(1.0, "how much the class counts", group=LOSS)
    steps: int = option(400)
    batch: int = option(4, "pictures of the subject per step, and as many of the class")
    lr: float = option(1e-4)
    ema: float = option(0.0)
    caption_dropout: float = option(0.0)

    MINIMUM = t2i.Settings.MINIMUM | {"num_class_images": 1, "prior_loss_weight": 0}

    def __post_init__(self):
        super().__post_init__()
        if not self.data or not self.class_prompt:
            raise InputError(
                "dreambooth needs --data FOLDER, pictures of the subject, and --class-prompt "
                '"a dog"')


class SubjectData(LatentData):
    """Batches of the subject with as many pictures of its class, whose keys begin with PRIOR."""

    def __init__(self, subject: LatentData, prior: LatentData):
        self.subject = subject
        self.prior = prior
        self.pictures = subject.pictures

    def batch(self, step: int, indices: list[int]) -> dict:
        batch = self.subject.batch(step, indices)
        for key, value in self.prior.batch(step, indices).items():
            batch[PRIOR + key] = value
        return batch


def data(pipeline: Pipeline, config: Settings) -> SubjectData:
    # Another class, model or seed gets a folder of its own.
    name = f"{config.class_prompt[:80]}-{Path(config.model).name}-{config.seed}"
    folder = Path(config.out, "prior", re.sub(r"\W+", "-", name))
    if is_main_process():
        draw_class(pipeline, folder, config)
    wait_for_everyone()
    prior = replace(config, data=str(folder), caption=config.class_prompt, seed=config.seed + 1)
    prior_data = t2i.data(pipeline, prior)
    return SubjectData(t2i.data(pipeline, config), prior_data)


def draw_class(pipeline: Pipeline, folder: Path, config: Settings):
    """Draw the pictures of the class that are missing, with the model as it is before training."""
    pipeline.eval()
    present = len(list(folder.glob("*.png")))
    for i in tqdm(range(present, config.num_class_images), "class", leave=False, mininterval=2):
        seed = (10**6 * (config.seed + 1) + i) % 2**63
        picture = pipeline.generate(config.class_prompt, seed=seed, progress=False)[0]
        save_new(picture, folder / f"{i:04d}.png")
    pipeline.train()


def loss(pipeline: Pipeline, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    prior = {}
    for key, value in batch.items():
        if key.startswith(PRIOR):
            prior[key.removeprefix(PRIOR)] = value
    subject_loss = denoising_loss(pipeline, batch, config)
    prior_loss = denoising_loss(pipeline, prior, config)
    logged = {"subject": subject_loss.detach(), "prior": prior_loss.detach()}
    return subject_loss + config.prior_loss_weight * prior_loss, logged
