"""DreamBooth: a subject bound to a rare word, without forgetting its class (arXiv 2208.12242).

Equation 2 there: the diffusion loss on the subject's pictures, and the same on pictures of its
class that the model itself drew before training. Everything else is t2i: the whole UNet, or a LoRA.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from minipic.common import ParameterError
from minipic.image import save_new
from minipic.latents import (
    LatentData, choose_trained, denoising_loss, export_trained, load_pipeline, photo_latents,
    sample_captions)
from minipic.pipeline import Pipeline
from minipic.training.flags import option
from minipic.training.processes import is_main_process, wait_for_everyone
from minipic.training.settings import DATA, LOSS, LoraSettings

PRIOR = "prior "  # begins the keys of the class's half of a batch


@dataclass
class Settings(LoraSettings):
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

    MINIMUM = LoraSettings.MINIMUM | {"num_class_images": 1, "prior_loss_weight": 0}

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ParameterError("data", "name a folder of pictures of the subject")
        if not self.class_prompt:
            raise ParameterError("class_prompt", 'say what the subject is one of, such as "a dog"')


def build(config: Settings) -> Pipeline:
    return load_pipeline(config, frozen=config.lora_rank > 0)


setup = choose_trained


class SubjectData:
    """Batches of the subject with as many pictures of its class, whose keys begin with PRIOR."""

    def __init__(self, subject: LatentData, prior: LatentData):
        self.subject = subject
        self.prior = prior
        self.pictures = subject.pictures  # for the sample

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
    return SubjectData(photo_latents(pipeline, config), photo_latents(pipeline, prior))


def draw_class(pipeline: Pipeline, folder: Path, config: Settings):
    """Draw the pictures of the class that are missing, with the model as it is before training."""
    pipeline.eval()
    for unfinished in folder.glob("*.png.part"):  # of this run, before it was killed
        unfinished.unlink()
    for i in tqdm(range(config.num_class_images), "class", leave=False, mininterval=2):
        path = folder / f"{i:04d}.png"
        if path.exists():
            continue
        seed = (10**6 * (config.seed + 1) + i) % 2**63
        picture = pipeline.generate(config.class_prompt, seed=seed, progress=False)[0]
        save_new(picture, path)
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


sample = sample_captions
export = export_trained
